//! A Redis behind Sentinels: the primary, as they name it. They are asked when the connection is
//! made, and again when what happens to it says that the primary is gone or is none any more. All
//! of them are asked at once and the first good answer counts, so one that hangs holds nobody up.

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use redis::{
    Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult, ServerErrorKind,
    Value, aio::MultiplexedConnection,
};

use super::node::{Access, is_refusal};

pub(super) struct Primary {
    /// With the credentials, which are those for the primary.
    sentinels: Vec<ConnectionInfo>,
    /// What the Sentinels call it.
    name: String,
    access: Access,
    /// Held by whoever looks for it; the others wait for what that comes to.
    search: tokio::sync::Mutex<()>,
    current: Mutex<Option<Current>>,
}

/// A connection, told from the one before.
#[derive(Clone)]
pub(super) struct Current {
    number: u64,
    pub(super) connection: MultiplexedConnection,
}

impl Primary {
    /// Returns once there is a connection to it.
    pub(super) async fn find(
        sentinels: Vec<ConnectionInfo>,
        name: String,
        access: Access,
    ) -> RedisResult<Self> {
        let primary = Self {
            sentinels,
            name,
            access,
            search: tokio::sync::Mutex::default(),
            current: Mutex::default(),
        };
        primary.current().await?;
        Ok(primary)
    }

    pub(super) async fn current(&self) -> RedisResult<Current> {
        if let Some(current) = &*self.current.lock() {
            return Ok(current.clone());
        }
        let _search = self.search.lock().await;
        // Whoever searched before has it by now.
        if let Some(current) = &*self.current.lock() {
            return Ok(current.clone());
        }
        let new = Current { number: rand::random(), connection: self.ask_all().await? };
        *self.current.lock() = Some(new.clone());
        Ok(new)
    }

    /// Looks at what came of a command on `used`, and lets go of that if the primary is another by
    /// now.
    pub(super) fn judge<T>(&self, used: &Current, outcome: RedisResult<T>) -> RedisResult<T> {
        if outcome.as_ref().is_err_and(lost_primary) {
            let mut current = self.current.lock();
            // Many calls share a connection and fail together; the last of them must not take the
            // new one away.
            if current.as_ref().is_some_and(|current| current.number == used.number) {
                *current = None;
            }
        }
        outcome
    }

    async fn ask_all(&self) -> RedisResult<MultiplexedConnection> {
        let mut asked: FuturesUnordered<_> =
            self.sentinels.iter().map(|sentinel| self.ask(sentinel)).collect();
        let mut worst = None;
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(connection) => return Ok(connection),
                // What needs somebody to do something is what has to be said.
                Err(error) if is_refusal(&error) => worst = Some(error),
                Err(error) => worst = worst.or(Some(error)),
            }
        }
        Err(worst.expect("there is at least one Sentinel"))
    }

    /// The primary that this Sentinel names, if it is one.
    async fn ask(&self, sentinel: &ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let (mut connection, refusal) = match self.access.open(sentinel).await {
            // Many a Sentinel knows no password where the servers behind it want one.
            Err(refusal) if is_refusal(&refusal) => {
                (self.access.open_anonymously(sentinel).await?, Some(refusal))
            }
            opened => (opened?, None),
        };
        let mut ask = Cmd::new();
        ask.arg("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name);
        let answer = ask.query_async(&mut connection).await;
        let named: Option<(String, u16)> = answer.map_err(|error| match refusal {
            Some(refusal) if is_refusal(&error) => refusal,
            _ => error,
        })?;
        let (host, port) = named.ok_or((
            ErrorKind::MasterNameNotFoundBySentinel,
            "the Sentinel knows no primary of this name",
            self.name.clone(),
        ))?;
        let addr = match sentinel.addr() {
            ConnectionAddr::TcpTls { .. } => {
                ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
            }
            _ => ConnectionAddr::Tcp(host, port),
        };
        let mut primary = self.access.open(&sentinel.clone().set_addr(addr)).await?;
        let mut role = Cmd::new();
        role.arg("ROLE");
        let role: Vec<Value> = role.query_async(&mut primary).await?;
        match role.first() {
            Some(Value::BulkString(role)) if role == b"master" => Ok(primary),
            // The Sentinel is behind: it will know better in a moment.
            _ => Err((
                ErrorKind::Server(ServerErrorKind::MasterDown),
                "what the Sentinel names is no primary",
            )
                .into()),
        }
    }
}

/// One that does not answer in time counts as gone, too: the Sentinels know whether it is.
fn lost_primary(error: &RedisError) -> bool {
    use ServerErrorKind::{MasterDown, ReadOnly};
    error.is_unrecoverable_error()
        || error.is_io_error()
        || matches!(error.kind(), ErrorKind::Server(ReadOnly | MasterDown))
}
