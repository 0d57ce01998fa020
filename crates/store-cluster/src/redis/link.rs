//! One connection to any kind of Redis: a single server, the primary of Sentinels, or a Cluster.
//! The connection reconnects by itself.

use std::{fmt, sync::Arc, time::Duration};

use redis::{
    Client, Cmd, ConnectionInfo, IntoConnectionInfo as _, Pipeline, RedisFuture, RedisResult,
    TlsCertificates, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
    io::tcp::TcpSettings,
};
use secrecy::ExposeSecret;

use super::{node::Access, sentinel::Primary};
use crate::{Config, ConnectError, error::Server};

const SETTING: &str = "redis.url";
const EXPECTED: &str = "it must be like redis://host:6379, rediss://host:6379, redis+cluster://a:6379,b:6379 or redis+sentinel://a:26379,b:26379/primary";

#[derive(Clone)]
pub(super) enum Link {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
    Sentinel(Arc<Primary>),
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Single(_) => "Single",
            Self::Cluster(_) => "Cluster",
            Self::Sentinel(_) => "Sentinel",
        })
    }
}

impl Link {
    pub(super) async fn connect(config: &Config) -> Result<Self, ConnectError> {
        let address = Address::parse(&config.redis.url)?;
        let tls =
            config.redis.authorities(Server::Redis)?.map(|ca| address.trusting(ca)).transpose()?;
        let password = config.redis.password.as_ref();
        let nodes = address.nodes(password.map(ExposeSecret::expose_secret))?;
        let timeout = config.redis_timeout;
        let access = Access { tls: tls.clone(), timeout };
        let opened = match address.kind {
            Topology::Single => match access.try_out(&nodes[0]).await {
                Ok(()) => single(nodes[0].clone(), tls, timeout).await,
                // Returned here, because the client would retry by itself without an error.
                Err(error) => Err(error),
            },
            Topology::Cluster => cluster(nodes.clone(), tls, timeout).await,
            Topology::Sentinel => {
                // Less than the timeout of a call, so that the call returns the error of the node
                // and the Sentinels are asked again.
                let access = Access { tls, timeout: timeout.mul_f64(0.8) };
                let primary = Primary::find(nodes.clone(), address.path, access).await;
                primary.map(|primary| Self::Sentinel(Arc::new(primary)))
            }
        };
        match opened {
            Ok(link) => Ok(link),
            Err(error) => Err(access.why(&error, &nodes).await),
        }
    }
}

async fn single(
    node: ConnectionInfo,
    tls: Option<TlsCertificates>,
    timeout: Duration,
) -> RedisResult<Link> {
    let client = match tls {
        Some(tls) => Client::build_with_tls(node, tls)?,
        None => Client::open(node)?,
    };
    let config = ConnectionManagerConfig::new()
        .set_min_delay(Duration::from_millis(50))
        .set_max_delay(Duration::from_millis(500))
        .set_number_of_retries(3)
        .set_connection_timeout(Some(timeout))
        // Every call has a timeout of its own, which includes the time for a new connection.
        .set_response_timeout(Some(timeout));
    ConnectionManager::new_with_config(client, config).await.map(Link::Single)
}

async fn cluster(
    nodes: Vec<ConnectionInfo>,
    tls: Option<TlsCertificates>,
    timeout: Duration,
) -> RedisResult<Link> {
    let mut builder = ClusterClientBuilder::new(nodes)
        .retries(4)
        .connection_timeout(timeout)
        .response_timeout(timeout)
        .tcp_settings(tcp());
    if let Some(tls) = tls {
        builder = builder.certs(tls);
    }
    builder.build()?.get_async_connection().await.map(Link::Cluster)
}

/// Returns TCP settings that send small requests immediately.
fn tcp() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

impl ConnectionLike for Link {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(link) => link.req_packed_command(cmd),
            Self::Cluster(link) => link.req_packed_command(cmd),
            Self::Sentinel(primary) => Box::pin(async move {
                let mut current = primary.current().await?;
                let outcome = current.connection.req_packed_command(cmd).await;
                primary.judge(&current, outcome)
            }),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(link) => link.req_packed_commands(pipeline, offset, count),
            Self::Cluster(link) => link.req_packed_commands(pipeline, offset, count),
            Self::Sentinel(primary) => Box::pin(async move {
                let mut current = primary.current().await?;
                let outcome = current.connection.req_packed_commands(pipeline, offset, count).await;
                primary.judge(&current, outcome)
            }),
        }
    }

    fn get_db(&self) -> i64 {
        0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Single,
    Cluster,
    Sentinel,
}

/// The parts of a URL that the client library does not parse.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    kind: Topology,
    /// `redis` or `rediss`.
    scheme: String,
    /// User and password with a final `@`, or empty.
    user_info: String,
    hosts: Vec<String>,
    /// The path without the leading `/`.
    path: String,
}

/// Checks an address, without a connection.
pub(crate) fn check_url(url: &str) -> Result<(), ConnectError> {
    Address::parse(url).map(drop)
}

impl Address {
    fn parse(url: &str) -> Result<Self, ConnectError> {
        let wrong = |cause: &str| ConnectError::Url {
            setting: SETTING,
            cause: cause.into(),
            expected: EXPECTED,
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("it has no scheme"))?;
        let (scheme, kind) = match scheme.split_once('+') {
            None => (scheme, Topology::Single),
            Some((scheme, "cluster")) => (scheme, Topology::Cluster),
            Some((scheme, "sentinel")) => (scheme, Topology::Sentinel),
            Some(_) => return Err(wrong("that kind of Redis is unknown")),
        };
        if !["redis", "rediss"].contains(&scheme) {
            return Err(wrong("the scheme is neither redis nor rediss"));
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user_info, hosts) = match authority.rsplit_once('@') {
            Some((user_info, hosts)) => (format!("{user_info}@"), hosts),
            None => (String::new(), authority),
        };
        let hosts: Vec<_> = hosts.split(',').map(str::to_owned).collect();
        if hosts.iter().any(String::is_empty) {
            return Err(wrong("it names no host"));
        }
        if kind == Topology::Single && hosts.len() > 1 {
            return Err(wrong(
                "several hosts are a cluster or sentinels, and it does not say which",
            ));
        }
        if kind == Topology::Sentinel && path.is_empty() {
            return Err(wrong("it does not name the primary of the hosts"));
        }
        Ok(Self { kind, scheme: scheme.into(), user_info, hosts, path: path.into() })
    }

    /// Returns the TLS settings for an authority. An authority for an unencrypted connection is a
    /// mistake in the configuration.
    fn trusting(&self, root_cert: Vec<u8>) -> Result<TlsCertificates, ConnectError> {
        if self.scheme != "rediss" {
            let cause = "redis.ca is given, but the scheme asks for no encryption".into();
            return Err(ConnectError::Url {
                setting: SETTING,
                cause,
                expected: "it must begin with rediss",
            });
        }
        Ok(TlsCertificates { client_tls: None, root_cert: Some(root_cert) })
    }

    fn nodes(&self, password: Option<&str>) -> Result<Vec<ConnectionInfo>, ConnectError> {
        // With Sentinels and in a Cluster, the path does not name a database.
        let path = if self.kind == Topology::Single { self.path.as_str() } else { "" };
        let node = |host: &String| {
            let node = format!("{}://{}{host}/{path}", self.scheme, self.user_info)
                .into_connection_info()?;
            let settings = match password {
                Some(password) => node.redis_settings().clone().set_password(password),
                None => node.redis_settings().clone(),
            };
            Ok(node.set_redis_settings(settings).set_tcp_settings(tcp()))
        };
        self.hosts.iter().map(node).collect::<RedisResult<_>>().map_err(|error| ConnectError::Url {
            setting: SETTING,
            // The message of the library may contain the URL.
            cause: format!("{:?}", error.kind()),
            expected: EXPECTED,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Address {
        Address::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    #[test]
    fn each_kind_of_address_is_parsed() {
        assert_eq!(parse("redis://localhost:6379/2").kind, Topology::Single);
        let cluster = parse("rediss+cluster://:p%40ss@a:1,b:2");
        assert_eq!(
            (cluster.kind, cluster.scheme.as_str(), cluster.hosts.len()),
            (Topology::Cluster, "rediss", 2)
        );
        let nodes = cluster.nodes(None).expect("two nodes");
        assert_eq!(nodes[1].redis_settings().password(), Some("p@ss"));
        let sentinel = parse("redis+sentinel://a:26379,b:26379/primary");
        assert_eq!((sentinel.kind, sentinel.path.as_str()), (Topology::Sentinel, "primary"));
    }

    #[test]
    fn a_password_of_its_own_replaces_the_one_in_the_url() {
        let nodes = parse("redis://user:old@localhost:6379").nodes(Some("new")).expect("a node");
        assert_eq!(nodes[0].redis_settings().password(), Some("new"));
        assert_eq!(nodes[0].redis_settings().username(), Some("user"));
    }

    #[test]
    fn errors_in_an_address_do_not_contain_the_password() {
        for url in [
            "localhost:6379",
            "http://:secret@localhost",
            "redis://:secret@a,b",
            "redis+sentinel://:secret@a:1",
            "redis+ring://:secret@a:1",
            "redis://:secret@",
        ] {
            let said = Address::parse(url).expect_err(url).to_string();
            assert!(
                said.starts_with("redis.url cannot be understood") && !said.contains("secret"),
                "{said}"
            );
        }
    }
}
