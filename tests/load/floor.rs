//! The floors without a server: the expensive step of OPAQUE, and SQLite with batches.

use std::{path::Path, time::Duration};

use nix::time::{ClockId, clock_gettime};
use opaque_ke::{
    ClientLogin, ClientRegistration, ClientRegistrationFinishParameters, ServerLogin,
    ServerLoginParameters, ServerRegistration, ServerSetup, rand::rngs::OsRng,
};
use sqlx::{
    Connection as _, Executor as _,
    sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous},
};
use tokio::time::Instant;

use qpq_tests::accounts::Suite;

/// Returns the CPU time of this process.
pub(crate) fn own_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).expect("every process has this clock").into()
}

/// Returns the CPU microseconds of one `ServerLogin::start`, including parsing of record and
/// request.
pub(crate) fn login_start(times: usize) -> anyhow::Result<f64> {
    let setup = ServerSetup::<Suite>::new(&mut OsRng);
    let registration = ClientRegistration::<Suite>::start(&mut OsRng, b"floor")?;
    let response = ServerRegistration::start(&setup, registration.message, b"floor")?;
    let upload = registration
        .state
        .finish(
            &mut OsRng,
            b"floor",
            response.message,
            ClientRegistrationFinishParameters::default(),
        )?
        .message;
    let record = ServerRegistration::finish(upload).serialize();
    let requests: Vec<_> = (0..times)
        .map(|_| {
            ClientLogin::<Suite>::start(&mut OsRng, b"floor").map(|login| login.message.serialize())
        })
        .collect::<Result<_, _>>()?;
    let before = own_cpu();
    for request in &requests {
        let record = ServerRegistration::<Suite>::deserialize(&record)?;
        let request = opaque_ke::CredentialRequest::deserialize(request)?;
        let started = ServerLogin::start(
            &mut OsRng,
            &setup,
            Some(record),
            request,
            b"floor",
            ServerLoginParameters::default(),
        )?;
        std::hint::black_box(started.message.serialize());
    }
    Ok((own_cpu() - before).as_secs_f64() * 1e6 / times as f64)
}

/// The result of durable inserts with SQLite alone, through the same driver.
pub(crate) struct SqliteFloor {
    pub(crate) rows_per_second: f64,
    pub(crate) cpu_per_row: f64,
}

pub(crate) async fn sqlite(
    dir: &Path,
    batch: usize,
    payload: usize,
    duration: Duration,
) -> anyhow::Result<SqliteFloor> {
    let options = SqliteConnectOptions::new()
        .filename(dir.join("floor.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    connection
        .execute(
            "create table message (id integer primary key, inbox integer not null, \
             seq integer not null, payload blob not null, unique (inbox, seq))",
        )
        .await?;
    let payload = vec![7_u8; payload];
    let (before, start) = (own_cpu(), Instant::now());
    let mut rows = 0_i64;
    while start.elapsed() < duration {
        let mut transaction = connection.begin_with("begin immediate").await?;
        for _ in 0..batch {
            sqlx::query("insert into message (inbox, seq, payload) values (?, ?, ?)")
                .bind(rows % 64)
                .bind(rows / 64)
                .bind(&payload)
                .execute(&mut *transaction)
                .await?;
            rows += 1;
        }
        transaction.commit().await?;
    }
    let elapsed = start.elapsed().as_secs_f64();
    Ok(SqliteFloor {
        rows_per_second: rows as f64 / elapsed,
        cpu_per_row: (own_cpu() - before).as_secs_f64() * 1e6 / rows as f64,
    })
}
