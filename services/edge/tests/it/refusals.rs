//! Starts that cannot succeed: one line with the reason and what to do, an exit code, and no change
//! to the data.

use std::{fs, path::Path};

use crate::harness::{Data, ServerProcess, refusal, secrets_in};

const QUIET: (&str, &str) = ("QPQ_HTTP__LISTEN", "off");

/// Starts on `data_dir`, which must fail. Returns its error, which must be one line.
async fn refused(data_dir: &str, variables: &[(&str, &str)]) -> String {
    let variables: Vec<_> = variables.iter().copied().chain([QUIET]).collect();
    let said = refusal(1, &["--listen", "127.0.0.1:0", "--data-dir", data_dir], &variables).await;
    assert!(said.starts_with("qpq-server: cannot start: ") && said.lines().count() == 1, "{said}");
    said
}

#[tokio::test]
async fn a_second_server_on_the_same_directory_is_refused_and_the_first_keeps_serving() {
    let data = Data::new();
    let first = data.start().await;
    let said = refused(data.path(), &[]).await;
    assert!(said.contains(&format!("{} is in use by another server", data.path())), "{said}");
    assert_eq!(first.health().await.status, "ok");
}

#[tokio::test]
async fn the_error_names_a_udp_port_in_use_and_the_flag_to_change() {
    let (data, other) = (Data::new(), Data::new());
    let first = data.start().await;
    let address = first.address.to_string();
    let said = refusal(1, &["--listen", &address, "--data-dir", other.path()], &[QUIET]).await;
    let expected = format!("UDP port {} of 127.0.0.1 is in use", first.address.port());
    assert!(said.contains(&expected) && said.contains("--listen"), "{said}");
    let again = ServerProcess::start(other.path(), &[]).await;
    assert_eq!(again.health().await.status, "ok", "the refused start left a usable directory");
}

#[tokio::test]
async fn the_error_names_an_http_port_in_use_and_the_variable_to_change() {
    let (data, other) = (Data::new(), Data::new());
    let first = data.start().await;
    let taken = first.http.to_string();
    let arguments = ["--listen", "127.0.0.1:0", "--data-dir", other.path()];
    let said = refusal(1, &arguments, &[("QPQ_HTTP__LISTEN", &taken)]).await;
    assert!(
        said.contains(&format!("another program uses TCP port {taken}"))
            && said.contains("QPQ_HTTP__LISTEN"),
        "{said}"
    );
}

#[tokio::test]
async fn an_address_of_another_machine_is_refused() {
    let data = Data::new();
    // TEST-NET-1 (RFC 5737), which no machine has.
    let said =
        refusal(1, &["--listen", "192.0.2.1:5001", "--data-dir", data.path()], &[QUIET]).await;
    assert!(
        said.contains("cannot listen on UDP 192.0.2.1:5001") && said.contains("--listen"),
        "{said}"
    );
}

#[tokio::test]
async fn damaged_secrets_are_refused_and_stay_unchanged() {
    let damages: [(&str, &[u8], &str); 4] = [
        (
            "opaque-setup.bin",
            b"short",
            "opaque-setup.bin is damaged: it has 5 bytes instead of 128",
        ),
        (
            "opaque-setup.bin",
            &[0xff; 128],
            "opaque-setup.bin is damaged: the OPAQUE setup contains no valid key",
        ),
        (
            "delivery-key.bin",
            &[1; 33],
            "delivery-key.bin is damaged: it has 33 bytes instead of 32",
        ),
        ("server-key.der", b"noise", "server-key.der does not contain a private key"),
    ];
    let data = Data::new();
    data.start().await.kill().await;
    for (name, damage, expected) in damages {
        let good = fs::read(data.file(name)).unwrap();
        fs::write(data.file(name), damage).unwrap();
        let before = secrets_in(Path::new(data.path()));
        let said = refused(data.path(), &[]).await;
        assert!(said.contains(expected), "{said}");
        assert_eq!(secrets_in(Path::new(data.path())), before, "{name}");
        fs::write(data.file(name), good).unwrap();
    }
    assert_eq!(data.start().await.health().await.status, "ok");
}

#[tokio::test]
async fn a_lost_secret_is_not_created_again() {
    let data = Data::new();
    data.start().await.kill().await;
    for name in ["opaque-setup.bin", "delivery-key.bin"] {
        fs::rename(data.file(name), data.file("away")).unwrap();
        let said = refused(data.path(), &[]).await;
        assert!(
            said.contains(&format!("{name} is missing although there is a database")),
            "{said}"
        );
        assert!(!data.file(name).exists());
        fs::rename(data.file("away"), data.file(name)).unwrap();
    }
    assert_eq!(data.start().await.health().await.status, "ok");
}

#[tokio::test]
async fn a_certificate_without_its_key_is_refused() {
    let data = Data::new();
    data.start().await.kill().await;
    fs::remove_file(data.file("server-key.der")).unwrap();
    let said = refused(data.path(), &[]).await;
    assert!(
        said.contains("server-cert.der exists but ") && said.contains("server-key.der does not"),
        "{said}"
    );
    assert!(!data.file("server-key.der").exists());
}

#[tokio::test]
async fn a_missing_certificate_is_refused_if_none_may_be_created() {
    let data = Data::new();
    let said = refused(data.path(), &[("QPQ_TLS__GENERATE", "never")]).await;
    assert!(said.contains("there is neither a certificate at") && said.contains("tls.generate"));
    assert!(!data.file("server-key.der").exists());
    data.start().await.kill().await;
    let never = [("QPQ_TLS__GENERATE", "never")];
    let server = ServerProcess::start(data.path(), &never).await;
    assert_eq!(server.health().await.status, "ok");
}

#[tokio::test]
async fn a_certificate_named_without_its_key_is_refused_with_the_setting_to_change() {
    let (data, other) = (Data::new(), Data::new());
    data.start().await.kill().await;
    for (variable, file, said_of) in [
        ("QPQ_TLS_CERT", "server-cert.der", "tls.cert is set and tls.key is not"),
        ("QPQ_TLS_KEY", "server-key.der", "tls.key is set and tls.cert is not"),
    ] {
        let path = data.file(file);
        let said = refused(other.path(), &[(variable, path.to_str().unwrap())]).await;
        assert!(said.contains(said_of) && !said.contains("remove"), "{said}");
    }
    assert!(!other.file("server-cert.der").exists() && !other.file("server-key.der").exists());
}

#[tokio::test]
async fn an_unfinished_restore_is_refused_before_anything_is_created() {
    let data = Data::new();
    fs::write(data.file("restore-unfinished"), "staging\n").unwrap();
    let said = refused(data.path(), &[]).await;
    assert!(said.contains("qpq-admin restore"), "{said}");
    assert_eq!(fs::read_dir(data.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_file_without_a_certificate_is_refused() {
    let data = Data::new();
    let (cert, key) = (data.file("cert.pem"), data.file("key.pem"));
    fs::write(&cert, "-----BEGIN NONSENSE-----").unwrap();
    fs::write(&key, "-----BEGIN NONSENSE-----").unwrap();
    let files = [("QPQ_TLS_CERT", cert.to_str().unwrap()), ("QPQ_TLS_KEY", key.to_str().unwrap())];
    let said = refused(data.path(), &files).await;
    assert!(
        said.contains(&format!(
            "the certificate: {} does not contain a certificate",
            cert.display()
        )),
        "{said}"
    );
}

#[tokio::test]
async fn a_directory_that_cannot_be_created_is_refused() {
    let data = Data::new();
    fs::write(data.file("file"), "").unwrap();
    let below_a_file = data.file("file/data");
    let said = refused(below_a_file.to_str().unwrap(), &[]).await;
    assert!(said.contains(below_a_file.to_str().unwrap()) && said.contains("--data-dir"), "{said}");
    // Even root cannot create directories in /proc.
    let said = refused("/proc/qpq", &[]).await;
    assert!(said.contains("cannot create the data directory /proc/qpq"), "{said}");
}

#[tokio::test]
async fn a_damaged_database_is_refused() {
    let data = Data::new();
    data.start().await.kill().await;
    for entry in fs::read_dir(data.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("qpq.db") {
            fs::write(&path, [7; 4_096]).unwrap();
        }
    }
    let said = refused(data.path(), &[]).await;
    assert!(said.contains("qpq.db is damaged"), "{said}");
}
