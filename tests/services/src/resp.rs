//! Connections with which tests inspect or change a Redis directly, with the `redis` crate.
//!
//! [`Reply`] has only the kinds of replies that tests compare, and hides the crate, so that a new
//! version of the crate concerns this file alone.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, IntoConnectionInfo as _,
    RedisError, Value, aio::MultiplexedConnection,
};

use crate::process::TIMEOUT;

/// A reply of Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Nil,
    Status(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Array(Vec<Reply>),
}

impl Reply {
    /// Returns the text of a status or a bulk string.
    pub fn text(&self) -> anyhow::Result<&str> {
        match self {
            Self::Status(text) => Ok(text),
            Self::Bulk(bytes) => Ok(std::str::from_utf8(bytes)?),
            other => bail!("the reply of Redis is {other:?} instead of a text"),
        }
    }

    pub fn integer(&self) -> anyhow::Result<i64> {
        match self {
            Self::Integer(number) => Ok(*number),
            other => bail!("the reply of Redis is {other:?} instead of a number"),
        }
    }

    pub fn array(&self) -> anyhow::Result<&[Self]> {
        match self {
            Self::Array(replies) => Ok(replies),
            other => bail!("the reply of Redis is {other:?} instead of a list"),
        }
    }
}

impl TryFrom<Value> for Reply {
    type Error = anyhow::Error;

    fn try_from(value: Value) -> anyhow::Result<Self> {
        Ok(match value {
            Value::Nil => Self::Nil,
            Value::Okay => Self::Status("OK".into()),
            Value::SimpleString(text) => Self::Status(text),
            Value::Int(number) => Self::Integer(number),
            Value::BulkString(bytes) => Self::Bulk(bytes),
            Value::Array(values) => {
                Self::Array(values.into_iter().map(Self::try_from).collect::<Result<_, _>>()?)
            }
            // The other kinds belong to RESP3, which these connections do not use.
            other => bail!("a reply of an unexpected kind: {other:?}"),
        })
    }
}

/// A connection to one server.
#[derive(Debug)]
pub struct Connection(MultiplexedConnection);

impl Connection {
    /// Connects and authenticates.
    pub async fn open(addr: SocketAddr, password: &str) -> anyhow::Result<Self> {
        let node = ConnectionAddr::Tcp(addr.ip().to_string(), addr.port());
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(TIMEOUT))
            // A frozen server does not answer until the test thaws it.
            .set_response_timeout(None::<Duration>);
        let client = Client::open(node.into_connection_info()?)?;
        let connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .with_context(|| format!("cannot connect to Redis at {addr}"))?;
        let mut connection = Self(connection);
        connection.command(["AUTH", password]).await?;
        Ok(connection)
    }

    /// Sends a command and returns its reply. An error reply of Redis becomes an `Err`.
    pub async fn command<A: AsRef<[u8]>>(
        &mut self,
        parts: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Reply> {
        let mut command = Cmd::new();
        for part in parts {
            command.arg(part.as_ref());
        }
        match command.query_async::<Value>(&mut self.0).await {
            Ok(value) => value.try_into(),
            Err(error) => Err(describe(error)),
        }
    }
}

/// Returns an error with the error text of the server.
fn describe(error: RedisError) -> anyhow::Error {
    match (error.code(), error.detail()) {
        (Some(code), detail) => {
            anyhow::anyhow!("Redis refused: {code} {}", detail.unwrap_or_default())
        }
        _ if error.kind() == ErrorKind::Io => {
            anyhow::Error::new(error).context("Redis closed the connection")
        }
        _ => anyhow::Error::new(error),
    }
}
