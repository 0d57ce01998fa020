//! The configuration as the binary takes it.

use std::fs;

use crate::harness::{Data, output, refusal};

async fn shown(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let arguments: Vec<_> = arguments.iter().copied().chain(["config", "show"]).collect();
    let output = output(&arguments, variables).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn flags_win_over_variables_and_variables_over_the_file() {
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
async fn what_is_shown_is_a_configuration() {
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

#[tokio::test]
async fn a_valid_configuration_is_said_to_be() {
    let output = output(&["config", "check"], &[("QPQ_PASSWORD", "the client's")]).await;
    assert!(output.status.success());
    assert_eq!(output.stdout, b"the configuration is valid\n");
}

#[tokio::test]
async fn what_does_not_exist_is_refused_wherever_it_is() {
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
async fn a_file_that_is_not_there_is_named() {
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
async fn version_and_help_are_told() {
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
