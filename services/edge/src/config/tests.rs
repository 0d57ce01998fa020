//! The rules of the configuration, and the parts that other crates receive.

use qpq_proto::{LimitClass, LimitSubject};
use qpq_runtime::config::{ConfigError, Sources, load};

use super::*;

fn with(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let environment = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
    let sources = Sources { environment, foreign: FOREIGN_VARIABLES, ..Sources::default() };
    load(sources).map(|loaded| loaded.settings)
}

#[test]
fn the_defaults_are_valid_and_equal_those_of_the_other_crates() {
    let config = with(&[]).unwrap();
    assert_eq!(config.listen.to_string(), "0.0.0.0:5001");
    assert_eq!(config.delivery(), qpq_domain::DeliveryLimits::default());
    assert_eq!(config.key_packages(), qpq_domain::KeyPackageLimits::default());
    let (ours, theirs) = (config.rpc(), qpq_rpc::Config::default());
    assert_eq!(ours.domain, "localhost");
    assert_eq!(ours.key_package_suites, theirs.key_package_suites);
    assert_eq!(ours.waiting_logins, theirs.waiting_logins);
    assert_eq!(ours.answers, theirs.answers);
    assert_eq!(
        format!("{:?}", config.transport()),
        format!("{:?}", qpq_transport::Config::new(config.listen.0[0]))
    );
}

#[test]
fn the_short_names_of_variables_are_known() {
    let config = with(&[
        ("QPQ_LISTEN", "127.0.0.1:1"),
        ("QPQ_DATA_DIR", "/d"),
        ("QPQ_TLS_CERT", "/c"),
        ("QPQ_TLS_KEY", "/k"),
        ("RUST_LOG", "warn"),
        ("QPQ_DRAIN_TIMEOUT", "5"),
        ("QPQ_PASSWORD", "not ours"),
    ])
    .unwrap();
    assert_eq!((config.listen.0[0].port(), config.drain.timeout.as_secs()), (1, 5));
    assert_eq!(config.data_dir, PathBuf::from("/d"));
    assert_eq!(config.tls_files(), ("/c".into(), "/k".into()));
}

#[test]
fn certificate_and_key_are_in_the_data_directory_by_default() {
    let config = with(&[("QPQ_DATA_DIR", "/d"), ("QPQ_TLS__KEY", "/k")]).unwrap();
    assert_eq!(config.tls_files(), ("/d/server-cert.der".into(), "/k".into()));
}

#[test]
fn a_created_certificate_has_each_name_once() {
    let config =
        with(&[("QPQ_DOMAIN", "example.org"), ("QPQ_TLS__NAMES", "10.0.0.1,localhost")]).unwrap();
    assert_eq!(config.tls_names(), ["example.org", "localhost", "127.0.0.1", "::1", "10.0.0.1"]);
}

#[test]
fn limits_can_be_turned_off_and_changed_one_by_one() {
    let off = with(&[("QPQ_LIMITS__ENABLED", "false")]).unwrap().rpc().limits;
    assert!(!off.enabled);
    let changed = with(&[("QPQ_LIMITS__LOGIN__USERNAME", "3 + 6/m")]).unwrap().rpc().limits;
    let bucket = changed.overrides[&(LimitClass::Login, LimitSubject::Username)];
    assert_eq!((bucket.burst, bucket.per_second), (3, 0.1));
    let unchanged = changed.overrides[&(LimitClass::Login, LimitSubject::Ip)];
    assert_eq!(unchanged.burst, LimitClass::Login.defaults()[0].burst);
}

#[test]
fn the_dispatcher_receives_the_configured_values() {
    let config = with(&[
        ("QPQ_AUTH__IDENTITY_PROOF", "required"),
        ("QPQ_ADMIN__USERNAMES", "Alice,bob"),
        ("QPQ_SESSION__IDLE", "1h"),
        ("QPQ_KEYS__SUITES", "0x0001,3"),
    ])
    .unwrap()
    .rpc();
    assert_eq!(config.identity_proof, qpq_rpc::IdentityProof::Required);
    assert_eq!(config.sessions.idle, Duration::from_secs(3_600));
    assert_eq!(config.key_package_suites, [1, 3]);
    assert_eq!(config.admins, ["alice", "bob"].map(|name| Username::parse(name).unwrap()).into());
}

#[test]
fn an_invalid_value_is_refused_with_the_name_of_its_setting() {
    let refused = [
        ("QPQ_DOMAIN", "Example.org", "domain must be a domain name in lower case"),
        ("QPQ_DOMAIN", "", "domain must be a domain name"),
        ("QPQ_ADMIN__USERNAMES", "a@b", "admin.usernames must be valid usernames"),
        ("QPQ_SESSION__IDLE", "100d", "session.idle must be at most session.absolute"),
        ("QPQ_SESSION__IDLE", "0s", "session.idle must be more than zero"),
        ("QPQ_DELIVERY__MAX_WAIT", "1s", "delivery.default_wait must be at most delivery.max_wait"),
        ("QPQ_DELIVERY__MAX_TTL", "1d", "delivery.default_ttl must be at most delivery.max_ttl"),
        (
            "QPQ_DELIVERY__MAX_PAYLOAD",
            "4MiB",
            "delivery.max_payload must be between 1B and 4092KiB",
        ),
        (
            "QPQ_DELIVERY__MAX_BYTES",
            "1KiB",
            "delivery.max_bytes must be at least delivery.max_payload",
        ),
        (
            "QPQ_CLUSTER__ROTATE_TICKET_KEYS",
            "2d",
            "cluster.rotate_ticket_keys must be between 5m and 24h",
        ),
        (
            "QPQ_TRANSPORT__MAX_REQUEST_BYTES_PER_CONNECTION",
            "4095KiB",
            "transport.max_request_bytes_per_connection must be at least 4MiB",
        ),
        (
            "QPQ_TRANSPORT__MAX_REQUEST_BYTES_PER_IP",
            "4095KiB",
            "transport.max_request_bytes_per_ip must be at least \
             transport.max_request_bytes_per_connection",
        ),
        (
            "QPQ_TRANSPORT__MAX_REQUEST_BYTES",
            "4095KiB",
            "transport.max_request_bytes must be at least transport.max_request_bytes_per_ip",
        ),
        (
            "QPQ_TRANSPORT__MAX_REQUEST_BYTES",
            "1025GiB",
            "transport.max_request_bytes must be at least transport.max_request_bytes_per_ip and \
             at most 1024GiB",
        ),
        ("QPQ_TRANSPORT__MAX_STREAMS", "0", "transport.max_streams must be between 1 and 65536"),
        ("QPQ_TLS__RELOAD_INTERVAL", "0", "tls.reload_interval must be more than zero"),
        ("QPQ_DRAIN__TIMEOUT", "2d", "drain.timeout must be at most 1d"),
        ("QPQ_KEYS__SUITES", "x", "keys.suites is \"x\", but must be a list of numbers"),
        ("QPQ_LIMITS__LOGIN__IP", "many", "limits.login.ip is \"many\", but must be a burst"),
        ("QPQ_LIMITS__LOGIN__IPP", "1 + 1/s", "did you mean QPQ_LIMITS__LOGIN__IP?"),
    ];
    for (name, value, expected) in refused {
        let text = with(&[(name, value)]).unwrap_err().to_string();
        assert!(text.contains(expected), "{name}={value}: {text}");
    }
}

#[test]
fn the_bounds_of_request_memory_themselves_are_accepted() {
    let names = ["_PER_CONNECTION", "_PER_IP", ""]
        .map(|name| format!("QPQ_TRANSPORT__MAX_REQUEST_BYTES{name}"));
    for (value, bytes) in [("4MiB", 4 << 20), ("1024GiB", 1 << 40)] {
        let transport = with(&names.each_ref().map(|name| (&name[..], value))).unwrap().transport();
        assert_eq!(transport.limits.max_request_bytes_per_connection, bytes);
        assert_eq!(transport.limits.max_request_bytes_per_ip, bytes);
        assert_eq!(transport.limits.max_request_bytes, bytes);
    }
}

#[test]
fn the_people_who_may_register_are_configured() {
    for (value, expected) in [
        ("open", RegistrationMode::Open),
        ("invite", RegistrationMode::Invite),
        ("closed", RegistrationMode::Closed),
    ] {
        let config = with(&[("QPQ_AUTH__REGISTRATION", value)]).unwrap();
        assert_eq!(config.rpc().registration, expected);
    }
    let text = with(&[("QPQ_AUTH__REGISTRATION", "friends")]).unwrap_err().to_string();
    assert!(text.contains("auth.registration is \"friends\", but must be"), "{text}");
}

#[test]
fn settings_without_effect_are_refused() {
    let edge = [
        ("QPQ_POSTGRES__URL", "postgres://qpq@db/qpq"),
        ("QPQ_REDIS__URL", "redis://redis"),
        ("QPQ_NATS__URL", "nats://nats"),
        ("QPQ_CLUSTER__SECRETS_DIR", "/shared"),
    ];
    let names = ("QPQ_TLS__NAMES", "chat.example.org");
    let generate = ("QPQ_TLS__GENERATE", "never");
    let poll = ("QPQ_CLUSTER__POLL", "1s");
    for (variables, refused) in [
        (vec![poll], Some("cluster.poll must be left out: the server is a single node")),
        (vec![("QPQ_REDIS__PASSWORD_FILE", "/p")], Some("redis.password_file must be left out")),
        (vec![names], None),
        (vec![generate], None),
        (vec![names, generate], Some("tls.names must be left out: with tls.generate")),
        (edge.to_vec(), None),
        ([&edge[..], &[poll]].concat(), None),
        ([&edge[..], &[names]].concat(), Some("tls.names must be left out: an edge creates no")),
        (
            [&edge[..], &[generate]].concat(),
            Some("tls.generate must be left out: an edge creates no certificate"),
        ),
        // A value that equals the default changes nothing.
        (vec![("QPQ_CLUSTER__NAMESPACE", "qpq")], None),
    ] {
        match (with(&variables), refused) {
            (Ok(_), None) => {}
            (Err(error), Some(expected)) if error.to_string().contains(expected) => {}
            (outcome, _) => panic!("{variables:?}: {:?}", outcome.map(drop)),
        }
    }
}
