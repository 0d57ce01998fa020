//! A Postgres server for one test.
//!
//! `initdb` takes most of a second, so it runs once: its result is kept in the target directory, by
//! version, and copied for each server. The superuser's generated password is next to it with mode
//! 0600. Postgres refuses to run as root; tests of root run it as the user `postgres` or `nobody`.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::Signal,
    unistd::{Uid, User},
};

use crate::{
    authority::Authority,
    port::Port,
    process::{Home, Service, in_url, new_password, write_private},
    program::{self, Program},
};

pub(crate) const USER: &str = "qpq";
const DATABASE: &str = "qpq";
/// Part of the template's name. Increase it when `create_template` changes.
const TEMPLATE_REVISION: u32 = 3;

/// A running Postgres with one empty database. Dropping it ends it and removes its data.
#[derive(Debug)]
pub struct Postgres {
    service: Service,
    port: Port,
    password: String,
    programs: PathBuf,
}

impl Postgres {
    /// Starts a server with Postgres's default settings, as durable as in production.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a server with `settings` over the defaults, such as `("fsync", "off")` for speed
    /// without durability.
    pub async fn start_with(settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        Self::launch(settings, None).await
    }

    /// Starts a server that also accepts TLS.
    pub async fn start_encrypted(
        settings: &[(&str, &str)],
        authority: &Authority,
    ) -> anyhow::Result<Self> {
        Self::launch(settings, Some(authority)).await
    }

    async fn launch(
        settings: &[(&str, &str)],
        authority: Option<&Authority>,
    ) -> anyhow::Result<Self> {
        // Resolves links, because the other programs are in the same folder.
        let program = Program::Postgres.find()?.canonicalize()?;
        // SIGQUIT is an immediate shutdown: it writes no checkpoint, but releases shared memory.
        let home = Home::new("postgres", Signal::SIGQUIT)?;
        let run_as = RunAs::find()?;
        let (home, password) = tokio::task::spawn_blocking({
            let program = program.clone();
            move || {
                run_as.give_ownership(home.path())?;
                let password = copy_template(&program, run_as, home.path())?;
                anyhow::Ok((home, password))
            }
        })
        .await??;
        Self::launch_on(home, password, settings, authority).await
    }

    /// Starts a server on the data in `home`.
    pub(crate) async fn launch_on(
        home: Home,
        password: String,
        settings: &[(&str, &str)],
        authority: Option<&Authority>,
    ) -> anyhow::Result<Self> {
        let program = Program::Postgres.find()?.canonicalize()?;
        let (port, run_as) = (Port::reserve()?, RunAs::find()?);
        let mut command = run_as.command(&program);
        command.arg("-D").arg(home.path().join("data"));
        let number = port.number().to_string();
        let own = [
            ("listen_addresses", "127.0.0.1"),
            ("port", &number),
            ("unix_socket_directories", ""),
            ("max_connections", "200"),
            // Shared memory in files of the data directory is removed together with it.
            ("dynamic_shared_memory_type", "mmap"),
        ];
        for (name, value) in own.iter().chain(settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        if let Some(authority) = authority {
            let issued = authority.issue(home.path())?;
            run_as.give_ownership(&issued.key)?;
            command
                .args(["-c", "ssl=on", "-c"])
                .arg(format!("ssl_cert_file={}", issued.certificate.display()));
            command.arg("-c").arg(format!("ssl_key_file={}", issued.key.display()));
        }
        let programs = program.parent().context("a program lies in a folder")?.to_owned();
        let postgres = Self { service: Service::new(home, command)?, port, password, programs };
        postgres.start_again().await?;
        Ok(postgres)
    }

    /// Returns the URL for clients: as superuser, over TCP, with a password (SCRAM).
    pub fn url(&self) -> String {
        self.url_of(DATABASE, self.port.addr())
    }

    /// Returns the URL with another address, such as a proxy's.
    pub fn url_via(&self, addr: SocketAddr) -> String {
        self.url_of(DATABASE, addr)
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    pub const fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub(crate) fn programs(&self) -> &Path {
        &self.programs
    }

    /// Returns the temporary directory of the server.
    pub(crate) fn path(&self) -> &Path {
        self.service.path()
    }

    /// Creates another empty database and returns its URL.
    pub async fn create_database(&self, name: &str) -> anyhow::Result<String> {
        self.sql(&format!("CREATE DATABASE \"{name}\"")).await?;
        Ok(self.url_of(name, self.port.addr()))
    }

    /// Returns the output of `psql` for `sql`: a line for each row, columns separated by `|`.
    pub async fn sql(&self, sql: &str) -> anyhow::Result<String> {
        self.sql_in(DATABASE, sql).await
    }

    /// Runs `sql` in another database, as [`sql`](Self::sql) does.
    pub async fn sql_in(&self, database: &str, sql: &str) -> anyhow::Result<String> {
        // Without a program in the server's folder, Debian's wrapper on the PATH is used.
        let own = self.programs.join("psql");
        let output = tokio::process::Command::new(if own.is_file() { own } else { "psql".into() })
            .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", USER, "-d", database])
            .args(["-p", &self.port().to_string(), "-c", sql])
            .env("PGPASSWORD", &self.password)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .context("cannot run psql: `apt-get install postgresql-client`")?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    /// Stops the server as an operator does: it disconnects clients and writes a checkpoint.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGINT).await
    }

    /// Kills the server and all its children with SIGKILL.
    pub async fn kill9(&self) -> anyhow::Result<()> {
        self.service.end(Signal::SIGKILL).await
    }

    /// Starts the server after `stop` or `kill9`, with the same data on the same port. Returns when
    /// recovery is done and it accepts connections.
    pub async fn start_again(&self) -> anyhow::Result<()> {
        let pid_file = self.service.path().join("data/postmaster.pid");
        // A killed server leaves its file.
        match fs::remove_file(&pid_file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        // The eighth line is the state of the server. `pg_ctl start` waits for it too.
        self.service
            .start(|| async {
                fs::read_to_string(&pid_file)
                    .is_ok_and(|s| s.lines().nth(7).map(str::trim) == Some("ready"))
            })
            .await
    }

    pub async fn restart(&self) -> anyhow::Result<()> {
        self.stop().await?;
        self.start_again().await
    }

    /// Suspends the server's processes: connections stay open without an answer.
    pub fn freeze(&self) {
        self.service.signal_all(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.service.signal_all(Signal::SIGCONT);
    }

    fn url_of(&self, database: &str, addr: SocketAddr) -> String {
        format!("postgres://{USER}:{}@{addr}/{database}", in_url(&self.password))
    }
}

/// The user that Postgres runs as.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RunAs {
    /// The user that runs the tests.
    Caller,
    /// An unprivileged user, because root runs the tests.
    Other { uid: u32, gid: u32 },
}

impl RunAs {
    pub(crate) fn find() -> anyhow::Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self::Caller);
        }
        let user = match User::from_name("postgres")? {
            Some(user) => user,
            None => User::from_name("nobody")?
                .context("no user `postgres` or `nobody` for Postgres to run as")?,
        };
        Ok(Self::Other { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    }

    pub(crate) fn give_ownership(self, path: &Path) -> anyhow::Result<()> {
        match self {
            Self::Caller => Ok(()),
            Self::Other { uid, gid } => Ok(chown(path, Some(uid), Some(gid))?),
        }
    }

    /// Returns a command that runs as that user, without supplementary groups.
    pub(crate) fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Self::Other { uid, gid } = self {
            command.uid(uid).gid(gid);
        }
        command
    }
}

/// Copies the template to `home/data` and returns its superuser's password.
fn copy_template(program: &Path, run_as: RunAs, home: &Path) -> anyhow::Result<String> {
    let data = home.join("data");
    let Some(target) = target_directory()? else {
        return create_template(program, run_as, home, &data);
    };
    let version: String = program::version(program)?
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let uid = match run_as {
        RunAs::Caller => Uid::effective().as_raw(),
        RunAs::Other { uid, .. } => uid,
    };
    let kept = target.join("test-services").join(format!("{version}-{uid}-{TEMPLATE_REVISION}"));
    fs::create_dir_all(&kept)?;
    let (cluster, password_file) = (kept.join("data"), kept.join("password"));
    // One test creates the template while concurrent tests wait. A rename makes it appear, so it is
    // complete or absent.
    let lock = File::create(kept.join("lock"))?;
    lock.lock()?;
    if !cluster.exists() {
        let password = create_template(program, run_as, home, &data)?;
        let partial = kept.join("half");
        let _leftover = fs::remove_dir_all(&partial);
        copy(&data, &partial)?;
        write_private(&password_file, &password)?;
        fs::rename(&partial, &cluster)?;
        return Ok(password);
    }
    drop(lock);
    copy(&cluster, &data)?;
    Ok(fs::read_to_string(&password_file)?)
}

/// Runs `initdb`, creates one empty database, and returns the generated password.
fn create_template(
    program: &Path,
    run_as: RunAs,
    home: &Path,
    data: &Path,
) -> anyhow::Result<String> {
    let password = new_password();
    let password_file = home.join("password");
    write_private(&password_file, &password)?;
    run_as.give_ownership(&password_file)?;
    let mut initdb = run_as.command(&program.with_file_name("initdb"));
    initdb
        .args([
            "--no-sync",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--username",
            USER,
        ])
        .arg("--pwfile")
        .arg(&password_file)
        .arg("-D")
        .arg(data)
        .current_dir(home);
    run(initdb)?;
    fs::remove_file(&password_file)?;

    let sql = home.join("create.sql");
    // The copied data is mostly databases: one database and its template suffice. Each line is a
    // statement.
    let statements = [
        &format!("ALTER DATABASE postgres RENAME TO {DATABASE}"),
        "UPDATE pg_database SET datistemplate = false WHERE datname = 'template0'",
        "DROP DATABASE template0",
    ];
    fs::write(&sql, statements.join("\n") + "\n")?;
    let mut single = run_as.command(program);
    single
        .args(["--single", "-D"])
        .arg(data)
        .arg("template1")
        .stdin(File::open(&sql)?)
        .current_dir(home);
    run(single)?;
    fs::remove_file(&sql)?;
    Ok(password)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut cp = Command::new("cp");
    cp.arg("-a").arg(from).arg(to);
    run(cp)
}

pub(crate) fn run(mut command: Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Returns Cargo's target directory: the parent of the profile's folder, which has `.fingerprint`.
/// A binary that was copied elsewhere has none.
fn target_directory() -> anyhow::Result<Option<PathBuf>> {
    let own = std::env::current_exe()?;
    let profile = own.ancestors().find(|dir| dir.join(".fingerprint").is_dir());
    Ok(profile.and_then(Path::parent).map(Path::to_owned))
}
