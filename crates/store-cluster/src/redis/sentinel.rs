//! The primary of a Redis with Sentinels. The Sentinels are asked for its address before the first
//! connection, and again when a failure shows that the node is unreachable or no longer the
//! primary. All Sentinels are asked concurrently and the first valid answer counts, so a hanging
//! Sentinel delays no call.

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use redis::{
    Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult, ServerErrorKind,
    Value, aio::MultiplexedConnection,
};

use super::node::{Access, is_refusal};

pub(super) struct Primary {
    /// The addresses of the Sentinels, with the credentials of the primary.
    sentinels: Vec<ConnectionInfo>,
    /// The name of the primary in the Sentinels.
    name: String,
    access: Access,
    /// Locked by the call that searches for the primary. The others wait for the result.
    search: tokio::sync::Mutex<()>,
    current: Mutex<Option<Current>>,
}

/// A connection to the primary, and a number that distinguishes it from earlier ones.
#[derive(Clone)]
pub(super) struct Current {
    number: u64,
    pub(super) connection: MultiplexedConnection,
}

impl Primary {
    /// Finds the primary and connects to it.
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
        // Another call may have found the primary meanwhile.
        if let Some(current) = &*self.current.lock() {
            return Ok(current.clone());
        }
        let new = Current { number: rand::random(), connection: self.ask_all().await? };
        *self.current.lock() = Some(new.clone());
        Ok(new)
    }

    /// Returns the outcome of a command on `used`, and drops that connection if the outcome shows
    /// that another node is the primary now.
    pub(super) fn judge<T>(&self, used: &Current, outcome: RedisResult<T>) -> RedisResult<T> {
        if outcome.as_ref().is_err_and(lost_primary) {
            let mut current = self.current.lock();
            // Many calls share a connection and fail together. The last of them must not drop the
            // new connection.
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
                // An error that an operator must correct takes precedence.
                Err(error) if is_refusal(&error) => worst = Some(error),
                Err(error) => worst = worst.or(Some(error)),
            }
        }
        Err(worst.expect("there is at least one Sentinel"))
    }

    /// Returns a connection to the primary that this Sentinel names, if that node is a primary.
    async fn ask(&self, sentinel: &ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let (mut connection, refusal) = match self.access.open(sentinel).await {
            // Sentinels often have no password although their servers do.
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
            // The Sentinel has not noticed the failover yet.
            _ => Err((
                ErrorKind::Server(ServerErrorKind::MasterDown),
                "the node that the Sentinel names is not a primary",
            )
                .into()),
        }
    }
}

/// Returns whether the primary must be searched again after this error. A node that does not answer
/// in time counts as lost. The Sentinels decide whether another node is the primary.
fn lost_primary(error: &RedisError) -> bool {
    use ServerErrorKind::{MasterDown, ReadOnly};
    error.is_unrecoverable_error()
        || error.is_io_error()
        || matches!(error.kind(), ErrorKind::Server(ReadOnly | MasterDown))
}
