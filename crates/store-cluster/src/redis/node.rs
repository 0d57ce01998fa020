//! Connections to one node of a Redis, and the errors of failed connections.

use std::time::Duration;

use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, ErrorKind, RedisConnectionInfo, RedisError,
    RedisResult, TlsCertificates, aio::MultiplexedConnection,
};

use crate::{ConnectError, error::Server};

/// The settings that all nodes share.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) tls: Option<TlsCertificates>,
    /// Timeout of a connection, and of each answer.
    pub(super) timeout: Duration,
}

impl Access {
    /// Connects to this node alone. Sends the password by a separate command, because the client
    /// library would replace the server's error message by its own, for example that of a server
    /// without free connections.
    pub(super) async fn open(&self, node: &ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let mut connection = self.open_anonymously(node).await?;
        let credentials = node.redis_settings();
        if let Some(password) = credentials.password() {
            let mut auth = Cmd::new();
            auth.arg("AUTH").arg(credentials.username()).arg(password);
            auth.exec_async(&mut connection).await?;
        }
        Ok(connection)
    }

    /// Connects to this node without a password. See [`open`](Self::open).
    pub(super) async fn open_anonymously(
        &self,
        node: &ConnectionInfo,
    ) -> RedisResult<MultiplexedConnection> {
        let node = node.clone().set_redis_settings(RedisConnectionInfo::default());
        let client = match &self.tls {
            Some(tls) => Client::build_with_tls(node, tls.clone())?,
            None => Client::open(node)?,
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout));
        client.get_multiplexed_async_connection_with_config(&config).await
    }

    /// Returns the reason why no node could be used. The error of the client library is not
    /// specific, so each node is tried.
    pub(super) async fn why(&self, error: &RedisError, nodes: &[ConnectionInfo]) -> ConnectError {
        let mut why = failed(error);
        for node in nodes {
            if !matches!(why, ConnectError::Unreachable { .. }) {
                break;
            }
            if let Err(error) = self.try_out(node).await {
                why = failed(&error);
            }
        }
        why
    }

    /// Checks that this node accepts the credentials and answers.
    pub(super) async fn try_out(&self, node: &ConnectionInfo) -> RedisResult<()> {
        Cmd::new().arg("PING").exec_async(&mut self.open(node).await?).await
    }
}

/// Returns whether the server rejects the credentials, or a command that they do not permit.
pub(super) fn is_refusal(error: &RedisError) -> bool {
    match error.code() {
        Some("WRONGPASS" | "NOAUTH" | "NOPERM" | "DENIED") => true,
        _ => error.detail().is_some_and(|said| said.contains("without any password configured")),
    }
}

/// Returns the error for a failure of Redis at the start.
pub(super) fn failed(error: &RedisError) -> ConnectError {
    let server = Server::Redis;
    if is_refusal(error) {
        return server
            .refuses([error.code(), error.detail()].map(Option::unwrap_or_default).join(" "));
    }
    match error.kind() {
        ErrorKind::InvalidClientConfig => server.untrusted(error),
        _ => server.tls_failure(error).unwrap_or_else(|| server.unreachable(error)),
    }
}
