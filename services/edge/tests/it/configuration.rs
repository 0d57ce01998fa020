//! The configuration of the binary: its layers, `config show` and `config check`.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    time::Duration,
};

use qpq_ports::{Clock as _, SystemClock};

use crate::harness::{Data, output, refusal};

async fn shown(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let arguments: Vec<_> = arguments.iter().copied().chain(["config", "show"]).collect();
    let output = output(&arguments, variables).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn flags_precede_variables_and_variables_precede_the_file() {
    let data = Data::new();
    let file = data.file("qpq.toml");
    fs::write(&file, "listen = \"127.0.0.1:1\"\n[tls]\ncert = \"f\"\nkey = \"f\"\n").unwrap();
    let file = file.to_str().unwrap();
    let shown = shown(
        &["--config", file, "--listen", "127.0.0.1:3"],
        &[("QPQ_LISTEN", "127.0.0.1:2"), ("QPQ_TLS_CERT", "e"), ("RUST_LOG", "debug")],
    )
    .await;
    for line in [
        "listen = \"127.0.0.1:3\"  # --listen",
        "data_dir = \"data\"  # default",
        "cert = \"e\"  # QPQ_TLS_CERT",
        &format!("key = \"f\"  # file {file}"),
        "filter = \"debug\"  # RUST_LOG",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line} not in {shown}");
    }
}

#[tokio::test]
async fn the_shown_configuration_can_be_loaded() {
    let data = Data::new();
    let first = shown(&[], &[("QPQ_CONFIG", ""), ("QPQ_LIMITS__LOGIN__IP", "1 + 2/h")][1..]).await;
    let file = data.file("qpq.toml");
    fs::write(&file, &first).unwrap();
    let second = shown(&["--config", file.to_str().unwrap()], &[]).await;
    let values = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split("  # ").next().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(values(&first), values(&second));
    assert!(first.contains("login.ip = \"1 + 2/h\"  # QPQ_LIMITS__LOGIN__IP"), "{first}");
}

const FREE: [(&str, &str); 2] = [("QPQ_LISTEN", "127.0.0.1:0"), ("QPQ_HTTP__LISTEN", "off")];

/// Runs `config check`, which must succeed. Returns its output.
async fn checked(variables: &[(&str, &str)]) -> String {
    let variables: Vec<_> = FREE.iter().chain(variables).copied().collect();
    let output = output(&["config", "check"], &variables).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `config check`, which must fail. Returns the problems.
async fn found_wrong(variables: &[(&str, &str)]) -> String {
    let variables: Vec<_> = FREE.iter().chain(variables).copied().collect();
    refusal(2, &["config", "check"], &variables).await
}

#[tokio::test]
async fn a_valid_configuration_is_confirmed_and_nothing_is_created() {
    let data = Data::new();
    let new = data.file("below/new");
    let dir = ("QPQ_DATA_DIR", new.to_str().unwrap());
    let printed = checked(&[dir, ("QPQ_PASSWORD", "the client's")]).await;
    assert!(printed.starts_with("the configuration is valid\n"), "{printed}");
    assert!(printed.contains("below/new, to be created\n") && !printed.contains("note:"));
    assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_check_recognizes_its_running_server() {
    let data = Data::new();
    let server = data.start().await;
    let (listen, http) = (server.address.to_string(), server.http.to_string());
    let ports = [("QPQ_LISTEN", listen.as_str()), ("QPQ_HTTP__LISTEN", &http)];
    let own = [&ports[..], &[("QPQ_DATA_DIR", data.path())]].concat();
    let printed = checked(&own).await;
    assert_eq!(printed.matches("in use while this server runs").count(), 2, "{printed}");
    let fingerprint = server.fingerprint.to_string();
    assert!(printed.contains(&fingerprint) && printed.contains("matches its key"), "{printed}");
    let other = Data::new();
    let said = found_wrong(&[&ports[..], &[("QPQ_DATA_DIR", other.path())]].concat()).await;
    assert!(said.contains(&format!("cannot listen on UDP {listen}")), "{said}");
    assert!(said.contains(&format!("cannot listen on TCP {http}")), "{said}");
}

#[tokio::test]
async fn the_check_reads_the_named_files() {
    let data = Data::new();
    data.start().await.kill().await;
    let dir = ("QPQ_DATA_DIR", data.path());
    let (cert, key) = (data.file("server-cert.der"), data.file("server-key.der"));
    let absent = data.file("absent.pem");
    let (cert, key, absent) =
        (cert.to_str().unwrap(), key.to_str().unwrap(), absent.to_str().unwrap());

    let said = found_wrong(&[("QPQ_DATA_DIR", cert)]).await;
    assert!(said.contains("is not a directory"), "{said}");
    let said = found_wrong(&[dir, ("QPQ_TLS_CERT", key)]).await;
    assert!(said.contains("the certificate: "), "{said}");
    let said = found_wrong(&[("QPQ_DATA_DIR", absent), ("QPQ_TLS_CERT", cert)]).await;
    assert!(said.contains("tls.cert is set and tls.key is not"), "{said}");
    let missing = [dir, ("QPQ_TLS_CERT", absent), ("QPQ_TLS_KEY", "/nonexistent/key.pem")];
    let printed = checked(&missing).await;
    assert!(printed.contains("note: tls.cert or tls.key names a file that does not exist"));
    let never = [&missing[..], &[("QPQ_TLS__GENERATE", "never")]].concat();
    let said = found_wrong(&never).await;
    assert!(said.contains("there is neither a certificate at"), "{said}");

    fs::rename(data.file("opaque-setup.bin"), data.file("away")).unwrap();
    fs::write(data.file("delivery-key.bin"), "short").unwrap();
    let said = found_wrong(&[dir]).await;
    assert!(said.contains("opaque-setup.bin is missing although there is a database"), "{said}");
    assert!(said.contains("delivery-key.bin is damaged"), "every problem is named: {said}");
}

/// Writes a certificate and its key. The certificate expires `not_after` after the start of 1970.
/// Returns the paths of both files.
fn write_certificate(data: &Data, not_after: Duration) -> [String; 2] {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + not_after;
    let certificate = params.self_signed(&key).unwrap();
    let write = |name: &str, pem: String| {
        let path = data.file(name);
        fs::write(&path, pem).unwrap();
        // The key must not be readable by others.
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    [write("cert.pem", certificate.pem()), write("key.pem", key.serialize_pem())]
}

#[tokio::test]
async fn the_check_has_a_note_about_a_certificate_that_expires_soon_or_has_expired() {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let now = Duration::from_millis(SystemClock.now().0);
    for (not_after, note) in [
        (now - 2 * DAY - DAY / 2, Some("note: the certificate expired 3 days ago: clients that")),
        (now + 10 * DAY + DAY / 2, Some("note: the certificate expires in 10 days: renew it")),
        (now + 31 * DAY, None),
    ] {
        let data = Data::new();
        let [cert, key] = write_certificate(&data, not_after);
        let new = data.file("new");
        let printed = checked(&[
            ("QPQ_DATA_DIR", new.to_str().unwrap()),
            ("QPQ_TLS_CERT", &cert),
            ("QPQ_TLS_KEY", &key),
        ])
        .await;
        assert!(printed.contains("matches its key"), "{printed}");
        match note {
            Some(note) => assert!(printed.contains(note), "{printed}"),
            None => assert!(!printed.contains("note:"), "{printed}"),
        }
    }
}

#[tokio::test]
async fn the_check_of_a_cluster_needs_no_connection() {
    let data = Data::new();
    let password = data.file("password");
    let variables = [
        ("QPQ_POSTGRES__URL", "postgres://qpq@192.0.2.1/qpq"),
        ("QPQ_REDIS__URL", "memcached://192.0.2.1"),
        ("QPQ_NATS__URL", "nats://192.0.2.1:port"),
        ("QPQ_CLUSTER__SECRETS_DIR", data.path()),
    ];
    let said = found_wrong(&variables).await;
    for expected in ["cluster-id", "redis.url", "nats.url"] {
        assert!(said.contains(expected) || expected == "cluster-id", "{expected} not in {said}");
    }
    assert!(said.contains("is missing. All edges share the directory"), "{said}");
    let secret = ("QPQ_REDIS__PASSWORD_FILE", password.to_str().unwrap());
    let said = found_wrong(&[&variables[..], &[secret]].concat()).await;
    assert!(said.contains("which redis.password_file names, cannot be read"), "{said}");
    let half = [&variables[..], &[("QPQ_TLS_CERT", "/cert.pem")]].concat();
    let said = found_wrong(&half).await;
    assert!(said.contains("tls.key must be given too"), "{said}");
}

#[tokio::test]
async fn unknown_keys_and_variables_are_refused() {
    let data = Data::new();
    let file = data.file("qpq.toml");
    fs::write(&file, "lissten = \"x\"\n[delivery]\nmax_paylod = \"1MiB\"\n").unwrap();
    let file = file.to_str().unwrap();
    let variables = [("QPQ_LISTN", "x"), ("QPQ_TLS__CRET", "x")];
    for command in [&["config", "check"][..], &["config", "show"], &["run"], &[]] {
        let arguments: Vec<_> = ["--config", file].iter().chain(command).copied().collect();
        let said = refusal(2, &arguments, &variables).await;
        for expected in [
            &*format!("file {file}: there is no lissten; did you mean listen?"),
            &*format!(
                "file {file}: there is no delivery.max_paylod; did you mean delivery.max_payload?"
            ),
            "there is no variable QPQ_LISTN; did you mean QPQ_LISTEN?",
            "there is no variable QPQ_TLS__CRET; did you mean QPQ_TLS__CERT?",
        ] {
            assert!(said.contains(expected), "{expected} not in {said}");
        }
    }
}

#[tokio::test]
async fn the_error_names_a_missing_configuration_file() {
    let said = refusal(2, &[], &[("QPQ_CONFIG", "/nonexistent.toml")]).await;
    assert!(said.contains("file /nonexistent.toml: cannot be read"), "{said}");
}

#[tokio::test]
async fn a_wrong_command_line_is_refused_with_the_usage() {
    let said = refusal(2, &["--lisen", "127.0.0.1:1"], &[]).await;
    assert!(said.contains("--listen") && said.contains("Usage: "), "{said}");
    let said = refusal(2, &["--listen", "nowhere"], &[]).await;
    assert!(
        said.contains("--listen: listen is \"nowhere\", but must be an address and port"),
        "{said}"
    );
}

#[tokio::test]
async fn version_and_help_are_printed() {
    let version = output(&["--version"], &[]).await;
    assert_eq!(version.stdout, concat!("qpq-server ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
    let help = output(&["--help"], &[]).await;
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for expected in
        ["--listen", "--data-dir", "--tls-cert", "--tls-key", "--config", "docs/configuration.md"]
    {
        assert!(help.contains(expected), "{expected} not in {help}");
    }
}
