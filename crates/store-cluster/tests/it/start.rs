//! The start of an edge: unreachable servers are retried until a timeout, and permanent errors are
//! reported immediately. The errors are the same for all three servers.

use std::{fs, sync::Arc, time::Duration};

use qpq_domain::StoreLimits;
use qpq_ports::{Bucket, LimitKey, Verdict};
use qpq_store_cluster::{ClusterStore, Config, ConnectError, Migrate};
use qpq_test_services::{
    Authority, Nats, Redis, RedisCluster, RedisSentinel,
    proxy::{Link, TcpProxy, Way},
};
use rand::{SeedableRng as _, rngs::StdRng};

use crate::{
    backend::{AnyRedis, Servers, edge, eventually},
    people::NOW,
};

/// Longer than any of these tests.
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);
/// A start timeout for servers that do not answer.
const BRIEF: Duration = Duration::from_secs(1);
const WRONG: &str = "not-the-password";

async fn ready<R: AnyRedis>(servers: &Servers<R>) -> Config {
    Config { start_timeout: FOREVER, ..servers.cluster(StoreLimits::default()).await }
}

async fn failure(config: &Config) -> ConnectError {
    let error = ClusterStore::connect(config).await.expect_err("it cannot start");
    let said = error.to_string();
    assert!(!said.contains(WRONG) && !said.contains("://"), "{said}");
    error
}

/// Asserts that the start fails because `server` refuses the edge, for a reason that contains
/// `why`.
async fn is_refused(config: &Config, name: &str, section: &str, why: &str) {
    let error = failure(config).await;
    let said = error.to_string();
    let ConnectError::Refused { server, url, password, cause } = error else {
        panic!("{why}: {said}")
    };
    let settings = (format!("{section}.url"), format!("{section}.password_file"));
    assert_eq!((server, url, password), (name, settings.0.as_str(), settings.1.as_str()));
    assert!(cause.contains(why), "{cause}");
    assert!(said.contains(url) && said.contains(password), "{said}");
}

/// Asserts that the start fails because `server` is not trusted, for a reason that contains `why`.
async fn is_untrusted(config: &Config, name: &str, section: &str, why: &str) {
    let error = failure(config).await;
    let said = error.to_string();
    let ConnectError::Untrusted { server, url, ca, cause } = error else { panic!("{why}: {said}") };
    let settings = (format!("{section}.url"), format!("{section}.ca"));
    assert_eq!((server, url, ca), (name, settings.0.as_str(), settings.1.as_str()));
    assert!(cause.contains(why), "{cause}");
    assert!(said.contains(url) && said.contains(ca), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_postgres_is_reported_immediately() {
    let servers = Servers::start().await;
    let good = ready(&servers).await;
    let refused = async |url: String, why| {
        let mut config = good.clone();
        config.postgres.url = url;
        is_refused(&config, "Postgres", "postgres", why).await;
        config.migrate = Migrate::AtStart;
        is_refused(&config, "Postgres", "postgres", why).await;
        let migrated = qpq_store_cluster::migrate(&config).await;
        assert!(matches!(migrated, Err(ConnectError::Refused { .. })), "{migrated:?}");
    };
    let url = &good.postgres.url;
    let (before, database) = url.rsplit_once('/').expect("a database");
    let (_, host) = before.rsplit_once('@').expect("a host");
    let as_user = |user: &str| format!("postgres://{user}:{WRONG}@{host}/{database}");

    let mut wrong_password = good.clone();
    wrong_password.postgres.password = Some(WRONG.into());
    is_refused(&wrong_password, "Postgres", "postgres", "password authentication failed").await;
    refused(as_user("qpq"), "password authentication failed for user \"qpq\"").await;
    refused(as_user("nobody"), "password authentication failed for user \"nobody\"").await;
    refused(format!("{before}/nothing"), "database \"nothing\" does not exist").await;

    let sql = async |sql: &str| servers.postgres.sql(sql).await.expect("Postgres");
    sql(&format!(
        "CREATE ROLE sleeper PASSWORD '{WRONG}' NOLOGIN; CREATE ROLE guest PASSWORD '{WRONG}' LOGIN"
    ))
    .await;
    refused(as_user("sleeper"), "\"sleeper\" is not permitted to log in").await;
    sql(&format!("REVOKE CONNECT ON DATABASE {database} FROM PUBLIC")).await;
    refused(as_user("guest"), "permission denied for database").await;
    let hba = sql("SHOW hba_file").await;
    sql(&format!(
        "COPY (SELECT 'host all qpq 127.0.0.1/32 scram-sha-256') TO '{hba}'; SELECT pg_reload_conf()"
    ))
    .await;
    let mut stranger = good.clone();
    stranger.postgres.url = as_user("guest");
    eventually("the new pg_hba.conf", || async {
        failure(&stranger).await.to_string().contains("pg_hba.conf")
    })
    .await;
    refused(as_user("guest"), "no pg_hba.conf entry").await;
    edge(&good).await.close().await;
}

async fn a_redis_refuses<R: AnyRedis>(servers: &Servers<R>) {
    let mut config = ready(servers).await;
    edge(&config).await.close().await;
    config.redis.password = Some(WRONG.into());
    is_refused(&config, "Redis", "redis", "WRONGPASS").await;
    config.redis.password = None;
    let (scheme, rest) = config.redis.url.split_once("://").expect("a scheme");
    let (_, hosts) = rest.split_once('@').expect("a password");
    config.redis.url = format!("{scheme}://{hosts}");
    is_refused(&config, "Redis", "redis", "NOAUTH").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_redis_is_reported_immediately() {
    let servers = Servers::start().await;
    a_redis_refuses(&servers).await;
    let mut config = ready(&servers).await;
    let weak = ["ACL", "SETUSER", "weak", "on", &format!(">{WRONG}"), "~*", "+ping"];
    servers.redis.command(weak).await.expect("Redis");
    config.redis.url = format!("redis://weak:{WRONG}@{}", servers.redis.addr());
    is_refused(&config, "Redis", "redis", "NOPERM").await;

    // A server without a password refuses one, which may be meant for another server.
    servers.redis.command(["CONFIG", "SET", "requirepass", ""]).await.expect("Redis");
    config.redis.url = format!("redis://:{WRONG}@{}", servers.redis.addr());
    is_refused(&config, "Redis", "redis", "without any password configured").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_a_redis_cluster_is_reported_immediately() {
    a_redis_refuses(&*Servers::with(RedisCluster::start(1)).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_a_sentinel_or_its_primary_is_reported_immediately() {
    let servers = Servers::with(RedisSentinel::start()).await;
    a_redis_refuses(&servers).await;
    let config = ready(&servers).await;
    let sentinel = servers.redis.sentinel();
    // A Sentinel without a password, in front of servers with one, as is usual.
    sentinel.command(["CONFIG", "SET", "requirepass", ""]).await.ok();
    sentinel.command(["ACL", "SETUSER", "default", "nopass"]).await.expect("the Sentinel");
    edge(&config).await.close().await;
    let mut wrong = config.clone();
    wrong.redis.password = Some(WRONG.into());
    is_refused(&wrong, "Redis", "redis", "WRONGPASS").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_of_nats_is_reported_immediately() {
    let servers = Servers::start().await;
    let mut config = ready(&servers).await;
    config.nats.password = Some(WRONG.into());
    is_refused(&config, "NATS", "nats", "authorization violation").await;
    config.nats.password = None;
    config.nats.url = format!("nats://{}", servers.nats.addr());
    is_refused(&config, "NATS", "nats", "authorization violation").await;
}

/// The token is in the URL or in a file. All other tests use a user and a password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nats_that_requires_a_token_receives_the_token() {
    let servers = Servers::start().await;
    let nats = Nats::start_with_token().await.expect("NATS");
    let mut config = ready(&servers).await;
    config.nats.url = nats.url();
    edge(&config).await.close().await;
    config.nats.url = format!("nats://{}", nats.addr());
    config.nats.password = Some(nats.password().into());
    edge(&config).await.close().await;
    config.nats.password = Some(WRONG.into());
    is_refused(&config, "NATS", "nats", "authorization violation").await;
    config.nats.url = "nats://%ff@127.0.0.1".to_owned();
    let error = ClusterStore::connect(&config).await.expect_err("no text");
    assert!(matches!(error, ConnectError::Url { setting: "nats.url", .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_untrusted_certificate_is_reported_immediately() {
    let servers = Servers::start_encrypted().await;
    let good = ready(&servers).await;
    edge(&good).await.close().await;
    let other = Authority::new().expect("an authority");
    let mut config = good.clone();
    config.postgres.ca = Some(other.file());
    is_untrusted(&config, "Postgres", "postgres", "UnknownIssuer").await;
    config = good.clone();
    config.redis.ca = Some(other.file());
    is_untrusted(&config, "Redis", "redis", "UnknownIssuer").await;
    config = good.clone();
    config.nats.ca = Some(other.file());
    is_untrusted(&config, "NATS", "nats", "UnknownIssuer").await;

    let by_name = |url: &str| url.replace("127.0.0.1", "localhost");
    config = good.clone();
    config.postgres.url = by_name(&good.postgres.url);
    is_untrusted(&config, "Postgres", "postgres", "not valid for name \"localhost\"").await;
    config = good.clone();
    config.redis.url = by_name(&good.redis.url);
    is_untrusted(&config, "Redis", "redis", "not valid for name \"localhost\"").await;
    config = good.clone();
    config.nats.url = by_name(&good.nats.url);
    is_untrusted(&config, "NATS", "nats", "not valid for name \"localhost\"").await;

    // The URL alone can require the same of Postgres.
    config = good.clone();
    let ca = config.postgres.ca.take().expect("an authority");
    config.postgres.url += &format!("?sslmode=verify-full&sslrootcert={}", ca.display());
    edge(&config).await.close().await;
    config.postgres.url =
        config.postgres.url.replace(&ca.display().to_string(), &other.file().display().to_string());
    is_untrusted(&config, "Postgres", "postgres", "UnknownIssuer").await;
}

/// Asserts that an edge connects if it trusts the servers' authority, and is refused otherwise.
async fn trusts_its_authority<R: AnyRedis>(servers: &Servers<R>) {
    let mut config = ready(servers).await;
    let store = edge(&config).await;
    let limiter = store.stores().limiter;
    for n in 0..30 {
        // In a Redis Cluster, the keys are on different nodes.
        let (key, bucket) =
            (LimitKey { class: "start", subject: [n; 16] }, Bucket { burst: 1, per_second: 0.001 });
        assert_eq!(limiter.take(key, bucket, 1, NOW).await.expect("take"), Verdict::Allowed);
    }
    store.close().await;
    let other = Authority::new().expect("an authority");
    config.redis.ca = Some(other.file());
    is_untrusted(&config, "Redis", "redis", "UnknownIssuer").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encrypted_redis_cluster_is_trusted_by_its_authority() {
    let authority = Authority::new().expect("an authority");
    let redis = RedisCluster::start_encrypted(3, &authority).await.expect("Redis");
    trusts_its_authority(&*Servers::encrypted(redis, authority).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_sentinels_and_their_primary_are_trusted_by_their_authority() {
    let authority = Authority::new().expect("an authority");
    let redis = RedisSentinel::start_encrypted(&authority).await.expect("Redis");
    let servers = Servers::encrypted(redis, authority).await;
    trusts_its_authority(&*servers).await;
    let store = edge(&ready(&*servers).await).await;
    servers.redis.lose_primary().await.expect("the Sentinel");
    eventually("the new primary to be found", || async {
        store.stores().maintenance.check().await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let servers = Servers::start().await;
    let good = ready(&servers).await;
    let authority = Authority::new().expect("an authority");
    let mut config = good.clone();
    config.postgres.ca = Some(authority.file());
    is_untrusted(&config, "Postgres", "postgres", "does not support TLS").await;
    config = good.clone();
    config.nats.ca = Some(authority.file());
    is_untrusted(&config, "NATS", "nats", "InvalidContentType").await;
    config = good.clone();
    config.redis.ca = Some(authority.file());
    let said = failure(&config).await.to_string();
    assert!(said.contains("redis.ca is given") && said.contains("rediss"), "{said}");
    config.redis.url = config.redis.url.replace("redis://", "rediss://");
    config.start_timeout = BRIEF;
    // A Redis without TLS reads the first byte of a TLS handshake as the start of a command, and
    // waits for the rest.
    fails_after_the_start_timeout(&config, "Redis", "redis.url", "no answer within").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_without_authorities_is_refused_by_name() {
    let servers = Servers::start_encrypted().await;
    let good = ready(&servers).await;
    let dir = tempfile::tempdir().expect("a directory");
    let (empty, missing) = (dir.path().join("empty.pem"), dir.path().join("missing.pem"));
    fs::write(&empty, "no certificate\n").expect("a file");
    for (file, why) in [(&empty, "there is no certificate in it"), (&missing, "No such file")] {
        for setting in ["postgres.ca", "redis.ca", "nats.ca"] {
            let mut config = good.clone();
            let endpoint = match setting {
                "postgres.ca" => &mut config.postgres,
                "redis.ca" => &mut config.redis,
                _ => &mut config.nats,
            };
            endpoint.ca = Some(file.clone());
            let said = failure(&config).await.to_string();
            let path = file.display().to_string();
            assert!(said.contains(setting) && said.contains(why) && said.contains(&path), "{said}");
        }
    }
}

/// Asserts that the edge stops waiting for the server, and that its error names the timeout and the
/// setting.
async fn fails_after_the_start_timeout(config: &Config, name: &str, setting: &str, why: &str) {
    let said = failure(config).await.to_string();
    assert!(
        said.contains(&format!("{name} cannot be reached")) && said.contains(setting),
        "{said}"
    );
    assert!(said.contains(why) && said.contains("cluster.start_timeout, 1s, is over"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_fails_the_start_after_its_timeout() {
    let servers = Servers::start().await;
    let config = Config { start_timeout: BRIEF, ..ready(&servers).await };
    // Only `start_timeout` ends the start.
    let config = Config { redis_timeout: FOREVER, postgres_timeout: FOREVER, ..config };
    servers.nats.freeze();
    fails_after_the_start_timeout(&config, "NATS", "nats.url", "no answer within").await;
    servers.redis.freeze();
    fails_after_the_start_timeout(&config, "Redis", "redis.url", "no answer within").await;
    servers.postgres.freeze();
    fails_after_the_start_timeout(&config, "Postgres", "postgres.url", "no answer within").await;
    let migrating = Config { migrate: Migrate::AtStart, ..config.clone() };
    fails_after_the_start_timeout(&migrating, "Postgres", "postgres.url", "no answer within").await;
    let migrated = qpq_store_cluster::migrate(&migrating).await;
    assert!(matches!(migrated, Err(ConnectError::Unreachable { .. })), "{migrated:?}");
    servers.postgres.thaw();
    servers.redis.thaw();
    servers.nats.thaw();
    edge(&config).await.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_without_answers_fails_the_start_after_its_timeout() {
    let servers = Servers::start().await;
    let good = Config { start_timeout: BRIEF, redis_timeout: FOREVER, ..ready(&servers).await };
    let random = || StdRng::seed_from_u64(1);
    let to_postgres = TcpProxy::start(servers.postgres.addr(), random()).await.expect("a proxy");
    let to_redis = TcpProxy::start(servers.redis.addr(), random()).await.expect("a proxy");
    let to_nats = TcpProxy::start(servers.nats.addr(), random()).await.expect("a proxy");
    let database = good.postgres.url.rsplit_once('/').expect("a database").1.to_owned();
    let through = servers.postgres.url_via(to_postgres.addr());
    let mut config = good.clone();
    config.postgres.url = format!("{}/{database}", through.rsplit_once('/').expect("a database").0);
    config.redis.url = servers.redis.url_via(to_redis.addr());
    config.nats.url = servers.nats.url_via(to_nats.addr());
    edge(&config).await.close().await;
    let ways = [
        (&to_nats, "NATS", "nats.url"),
        (&to_redis, "Redis", "redis.url"),
        (&to_postgres, "Postgres", "postgres.url"),
    ];
    for (proxy, name, setting) in ways {
        proxy.switch().change(|faults| faults.link = Link::Blackhole(Way::ToClient));
        fails_after_the_start_timeout(&config, name, setting, "no answer within").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_server_fails_the_start_after_its_timeout() {
    let servers = Servers::start().await;
    let config = Config { start_timeout: BRIEF, ..ready(&servers).await };
    servers.nats.kill9().await.expect("NATS");
    fails_after_the_start_timeout(&config, "NATS", "nats.url", "refused").await;
    servers.redis.kill9().await.expect("Redis");
    fails_after_the_start_timeout(&config, "Redis", "redis.url", "refused").await;
    servers.postgres.kill9().await.expect("Postgres");
    fails_after_the_start_timeout(&config, "Postgres", "postgres.url", "refused").await;
    let mut nowhere = config.clone();
    nowhere.postgres.url = "postgres://qpq@nowhere.invalid/qpq".into();
    fails_after_the_start_timeout(&nowhere, "Postgres", "postgres.url", "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_start_later_are_retried() {
    let servers = Servers::start().await;
    let config = ready(&servers).await;
    servers.postgres.kill9().await.expect("Postgres");
    servers.redis.kill9().await.expect("Redis");
    servers.nats.kill9().await.expect("NATS");
    let starts = async {
        // The servers start one after the other. Postgres is the first, and reports its recovery
        // while it starts.
        servers.postgres.start_again().await.expect("Postgres");
        servers.redis.start_again().await.expect("Redis");
        servers.nats.start_again().await.expect("NATS");
    };
    let (store, ()) = tokio::join!(edge(&config), starts);
    store.stores().maintenance.check().await.expect("healthy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_loads_its_dump_is_retried() {
    // Redis loads its dump slowly, with pauses in which it reports that it loads.
    let slow = [("key-load-delay", "1000"), ("loading-process-events-interval-bytes", "1024")];
    let servers = Servers::with(Redis::start_with(&slow)).await;
    let config = ready(&servers).await;
    let fill = "for i = 1, 3000 do redis.call('SET', 'filling' .. i, string.rep('x', 100)) end";
    servers.redis.command(["EVAL", fill, "0"]).await.expect("Redis");
    let dump = servers.redis.snapshot().await.expect("a dump");
    let loads = {
        let servers = Arc::clone(&servers);
        tokio::spawn(async move { servers.redis.roll_back_to(&dump).await })
    };
    eventually("Redis to say that it loads", || async {
        let answer = servers.redis.command(["PING"]).await;
        answer.is_err_and(|error| error.to_string().contains("LOADING"))
    })
    .await;
    let store = edge(&config).await;
    store.stores().maintenance.check().await.expect("healthy");
    loads.await.expect("no panic").expect("the dump");
}
