//! A running server: its output, its files and its answers.

use std::{fs, os::unix::fs::PermissionsExt as _};

use nix::sys::signal::Signal;
use qpq_transport::{
    Identity,
    client::{Dialer, Trust},
};

use crate::harness::{Data, HANGS, ServerProcess, page, secrets_in};

#[tokio::test]
async fn the_banner_has_the_addresses_and_three_commands() {
    let data = Data::new();
    let server = data.start().await;
    let (address, fingerprint) = (server.address, server.fingerprint);
    let banner: Vec<_> = server.banner.lines().collect();
    assert_eq!(banner[0], concat!("qpq-server ", env!("CARGO_PKG_VERSION"), " is ready"));
    assert_eq!(banner[1], format!("  listening on  {address} (UDP)"));
    assert_eq!(banner[2], format!("  health        http://{}/livez /readyz /metrics", server.http));
    let place = fs::canonicalize(data.path()).unwrap();
    assert_eq!(banner[3], format!("  data in       {}", place.display()));
    assert_eq!(banner[4], format!("  fingerprint   {fingerprint}"));
    assert_eq!(
        banner[5],
        format!("  registration  open: everyone who reaches {address} can create an account")
    );
    let lines: Vec<_> =
        banner[8..].iter().map(|line| line.trim().split_once("qpq ").unwrap().1).collect();
    assert_eq!(lines[0], format!("-p alice register alice --server {address} --pin {fingerprint}"));
    assert_eq!(lines[1], format!("-p bob   register bob   --server {address} --pin {fingerprint}"));
    assert!(
        lines[2].starts_with("-p alice dm bob        # and in another terminal: "),
        "{}",
        lines[2]
    );
    assert_eq!(lines.len(), 3);
    assert_ne!(address.port(), 0, "the real port is printed");
}

#[tokio::test]
async fn the_banner_says_who_may_register_and_how_to_invite() {
    let data = Data::new();
    let variables = [("QPQ_AUTH__REGISTRATION", "invite"), ("QPQ_ADMIN__USERNAMES", "Root")];
    let server = ServerProcess::start(data.path(), &variables).await;
    let create = format!("qpq-admin invite create --data-dir {}", data.path());
    for expected in [
        format!(
            "  registration  with an invite, at {}. Create one with: {create}\n",
            server.address
        ),
        format!("  administrator root has no account, needs an invite: {create} --username root\n"),
        " --invite CODE\n".to_owned(),
    ] {
        assert!(server.banner.contains(&expected), "{expected} is not in {}", server.banner);
    }
    server.kill().await;

    let closed = [("QPQ_AUTH__REGISTRATION", "closed")];
    let server = ServerProcess::start(data.path(), &closed).await;
    let expected = "  registration  closed: nobody can create an account\n";
    assert!(server.banner.contains(expected), "{}", server.banner);
    assert!(!server.banner.contains("register alice"), "{}", server.banner);
}

#[tokio::test]
async fn health_is_answered_over_quic() {
    let data = Data::new();
    let server = ServerProcess::start(data.path(), &[("QPQ_DOMAIN", "example.org")]).await;
    let health = server.health().await;
    assert_eq!((&*health.status, &*health.domain), ("ok", "example.org"));
    assert_eq!(health.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(health.server_key.len(), 32);
}

#[tokio::test]
async fn created_files_are_readable_only_by_their_owner() {
    let data = Data::new();
    let made = data.file("deeper/data");
    let _server = ServerProcess::start(made.to_str().unwrap(), &[]).await;
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&made), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(&made).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    for expected in [
        "at-rest-keys",
        "delivery-key.bin",
        "opaque-setup.bin",
        "qpq.db",
        "server-cert.der",
        "server-key.der",
    ] {
        assert!(names.iter().any(|name| name == expected), "{expected} not in {names:?}");
    }
}

#[tokio::test]
async fn probes_and_metrics_are_served_over_http() {
    let data = Data::new();
    let server = data.start().await;
    server.health().await;
    assert_eq!(server.page("/livez").await, ("HTTP/1.1 200 OK".into(), "ok\n".into()));
    assert_eq!(server.page("/readyz").await, ("HTTP/1.1 200 OK".into(), "ok\n".into()));
    let (status, metrics) = server.page("/metrics").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    for expected in [
        concat!("qpq_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        "qpq_rpc_calls_total{method=\"Health\",code=\"ok\"} ",
        "qpq_transport_connections_accepted_total ",
        "qpq_tls_cert_not_after_seconds ",
        "qpq_live 1",
        "qpq_ready 1",
    ] {
        assert!(metrics.contains(expected), "{expected} not in {metrics}");
    }
}

#[tokio::test]
async fn a_killed_server_starts_again_with_the_same_identity() {
    let data = Data::new();
    let first = data.start().await;
    let (fingerprint, key) = (first.fingerprint, first.health().await.server_key);
    let secrets = secrets_in(std::path::Path::new(data.path()));
    first.kill().await;

    let second = data.start().await;
    assert_eq!(second.fingerprint, fingerprint);
    let health = second.health().await;
    assert_eq!((&*health.status, health.server_key), ("ok", key));
    assert_eq!(secrets_in(std::path::Path::new(data.path())), secrets);
}

#[tokio::test]
async fn a_secret_that_others_may_read_is_logged_as_a_warning() {
    let data = Data::new();
    data.start().await.kill().await;
    let shared = fs::Permissions::from_mode(0o640);
    fs::set_permissions(data.file("opaque-setup.bin"), shared).unwrap();
    let server = data.start().await;
    server.signal(Signal::SIGTERM);
    let (_, log) = server.ended().await;
    let warning =
        log.lines().find(|line| line.contains(" WARN ")).unwrap_or_else(|| panic!("{log}"));
    assert!(
        warning.contains("opaque-setup.bin mode=640") && warning.contains("chmod 600"),
        "{warning}"
    );
}

#[tokio::test]
async fn a_log_in_a_file_has_no_colours_and_may_be_json() {
    for format in ["json", "text"] {
        let data = Data::new();
        let server = ServerProcess::start(data.path(), &[("QPQ_LOG__FORMAT", format)]).await;
        page(server.http, "/readyz").await;
        server.signal(Signal::SIGTERM);
        let (_, log) = server.ended().await;
        assert!(log.lines().count() > 3 && !log.contains('\x1b'), "{log}");
        assert!(log.lines().all(|line| line.starts_with('{') == (format == "json")), "{log}");
    }
}

#[tokio::test]
async fn every_number_of_an_access_line_is_a_number_in_json() {
    let data = Data::new();
    let variables = [("QPQ_LOG__FORMAT", "json"), ("RUST_LOG", "qpq::access=debug")];
    let server = ServerProcess::start(data.path(), &variables).await;
    server.health().await;
    server.signal(Signal::SIGTERM);
    let (_, log) = server.ended().await;
    let mut lines =
        log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let health = lines.rfind(|line| line["method"] == "Health").expect("it was called");
    for field in ["us", "bytes_in", "bytes_out"] {
        assert!(health[field].is_u64(), "{field} in {health}");
    }
}

#[tokio::test]
async fn a_named_certificate_that_is_missing_is_created_and_reported() {
    let data = Data::new();
    let (cert, key) = (data.file("tls/cert.pem"), data.file("tls/key.pem"));
    let named = [("QPQ_TLS_CERT", cert.to_str().unwrap()), ("QPQ_TLS_KEY", key.to_str().unwrap())];
    for is_new in [true, false] {
        let server = ServerProcess::start(data.path(), &named).await;
        let line = format!("certificate   self-signed, created now at {}", cert.display());
        assert_eq!(server.banner.contains(&line), is_new, "{}", server.banner);
        server.signal(Signal::SIGTERM);
        let (_, log) = server.ended().await;
        let warned = log.lines().any(|line| line.contains(" WARN ") && line.contains("cert.pem"));
        assert_eq!(warned, is_new, "{log}");
    }
}

/// Replaces certificate and key, and waits until the server uses them.
async fn renew(data: &Data, server: &ServerProcess, hang_up: impl Fn()) {
    let (cert, key) = (data.file("new.der"), data.file("new-key.der"));
    let names = ["localhost".to_owned()];
    let new = Identity::load_or_create(&cert, &key, &names).unwrap().fingerprint();
    fs::rename(key, data.file("server-key.der")).unwrap();
    fs::rename(cert, data.file("server-cert.der")).unwrap();
    hang_up();
    let dialer = Dialer::new(Trust::FirstUse).unwrap();
    let shown = async {
        while dialer.connect(server.address, "localhost").await.unwrap().fingerprint() != new {}
    };
    tokio::time::timeout(HANGS, shown).await.expect("it is shown");
}

#[tokio::test]
async fn sighup_reloads_filter_and_certificate_and_names_other_changes() {
    let data = Data::new();
    let file = data.file("qpq.toml");
    let write = |text: &str| fs::write(&file, text).unwrap();
    write("[log]\nfilter = \"warn\"\n");
    let variables = [("QPQ_CONFIG", file.to_str().unwrap()), ("QPQ_TLS__RELOAD_INTERVAL", "1d")];
    let server = ServerProcess::start(data.path(), &variables).await;
    write("[log]\nfilter = \"info\"\n[delivery]\nmax_wait = \"50s\"\n");
    renew(&data, &server, || server.signal(Signal::SIGHUP)).await;
    write("[log]\nfiller = \"debug\"\n");
    renew(&data, &server, || server.signal(Signal::SIGHUP)).await;
    server.signal(Signal::SIGTERM);
    let (code, log) = server.ended().await;
    assert_eq!(code, Some(0));
    assert!(!log.contains("serving"), "at first only warnings were logged: {log}");
    for expected in [
        "configuration reloaded on SIGHUP changed=log.filter",
        "need a restart, the old ones stay in effect settings=delivery.max_wait",
        "certificate changed",
        "there is no log.filler; did you mean log.filter?",
        "signal received",
    ] {
        assert!(log.contains(expected), "{expected} not in {log}");
    }
}

#[tokio::test]
async fn a_filter_for_errors_leaves_the_log_empty() {
    let data = Data::new();
    let server = ServerProcess::start(data.path(), &[("RUST_LOG", "error")]).await;
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().await, (Some(0), String::new()));
}
