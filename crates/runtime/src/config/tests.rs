//! Tests of the layers with a small configuration.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use secrecy::SecretString;

use super::*;

crate::section! {
    /// All settings.
    struct Root {
        /// The address to listen on.
        listen: SocketAddr = "0.0.0.0:5001".parse().unwrap(),
            variable: "SHORT_LISTEN", flag: "--listen";
        /// The names of the guests.
        guests: Vec<String> = Vec::new();
        /// A nested section.
        tls: Tls = Tls::default();
        /// A second nested section.
        queue: Queue = Queue::default();
    }
}

crate::section! {
    /// Certificates.
    struct Tls {
        /// The certificate.
        cert: Option<PathBuf> = None, unset: "server-cert.der in the data directory";
        /// The passphrase of the key.
        passphrase: SecretString = SecretString::default();
    }
}

crate::section! {
    /// The limits of the queue.
    struct Queue {
        /// The maximum size of a message.
        max_payload: Size = Size(1 << 20);
        /// The maximum time that a message waits.
        ttl: Duration = Duration::from_secs(30 * 86_400);
        /// Turns the queue on.
        enabled: bool = true;
    }
}

impl Settings for Root {
    fn validate(&self) -> Vec<Broken> {
        let too_small = self.queue.max_payload.0 < 16;
        too_small
            .then(|| Broken { path: "queue.max_payload", must_be: "at least 16B".into() })
            .into_iter()
            .collect()
    }
}

fn sources(
    file: &Path,
    variables: &[(&str, &str)],
    flags: &[(&'static str, &'static str, &str)],
) -> Sources {
    Sources {
        file: Some(file.into()),
        environment: variables.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        flags: flags
            .iter()
            .map(|(name, path, value)| Flag { name, path, value: (*value).into() })
            .collect(),
        foreign: &["QPQ_ELSEWHERE"],
    }
}

fn file_of(text: &str) -> tempfile::TempPath {
    let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    fs::write(&file, text).unwrap();
    file
}

fn loaded(
    file: &str,
    variables: &[(&str, &str)],
    flags: &[(&'static str, &'static str, &str)],
) -> Result<Loaded<Root>, ConfigError> {
    load(sources(&file_of(file), variables, flags))
}

fn problems(file: &str, variables: &[(&str, &str)]) -> String {
    loaded(file, variables, &[]).unwrap_err().to_string()
}

#[test]
fn without_sources_the_defaults_apply() {
    let loaded = load::<Root>(Sources::default()).unwrap();
    assert_eq!(loaded.settings.listen.port(), 5001);
    assert_eq!(loaded.settings.tls.cert, None);
    assert_eq!(loaded.settings.queue.max_payload, Size(1 << 20));
}

#[test]
fn a_later_layer_takes_precedence() {
    let file = "listen = '1.1.1.1:1'\n[queue]\nttl = '1h'\nmax_payload = 4096\nenabled = false\n";
    let long = ("QPQ_LISTEN", "2.2.2.2:2");
    let short = ("SHORT_LISTEN", "3.3.3.3:3");
    let others = [("QPQ_QUEUE__TTL", "90s"), ("QPQ_ELSEWHERE", "1"), ("PATH", "/bin")];
    let port = |variables: &[(&str, &str)], flags: &[(&'static str, &'static str, &str)]| {
        loaded(file, variables, flags).unwrap().settings.listen.port()
    };
    assert_eq!(port(&[], &[]), 1);
    assert_eq!(port(&[short], &[]), 3);
    assert_eq!(port(&[long, short], &[]), 2);
    assert_eq!(port(&[short, long], &[]), 2, "whatever their order");
    assert_eq!(port(&[long, short], &[("--listen", "listen", "4.4.4.4:4")]), 4);

    let queue = loaded(file, &others, &[]).unwrap().settings.queue;
    assert_eq!(queue.ttl, Duration::from_secs(90));
    assert_eq!(queue.max_payload, Size(4096));
    assert!(!queue.enabled);
}

#[test]
fn a_config_flag_overrides_qpq_config() {
    let by_flag = file_of("listen = '1.1.1.1:1'");
    let by_variable = file_of("listen = '2.2.2.2:2'");
    let environment = vec![("QPQ_CONFIG".into(), by_variable.as_os_str().into())];
    let only_variable = Sources { environment: environment.clone(), ..Sources::default() };
    assert_eq!(load::<Root>(only_variable).unwrap().settings.listen.port(), 2);
    let both = Sources { environment, ..sources(&by_flag, &[], &[]) };
    assert_eq!(load::<Root>(both).unwrap().settings.listen.port(), 1);
}

#[test]
fn values_are_read_in_their_natural_forms() {
    let set = |name, text| loaded("", &[(name, text)], &[]).unwrap().settings;
    for (text, bytes) in [("4MiB", 4 << 20), ("64 KiB", 64 << 10), ("17", 17), ("1GiB", 1 << 30)] {
        assert_eq!(set("QPQ_QUEUE__MAX_PAYLOAD", text).queue.max_payload, Size(bytes));
    }
    for (text, millis) in [("250ms", 250), ("2", 2_000), ("15m", 900_000), ("30d", 2_592_000_000)] {
        assert_eq!(set("QPQ_QUEUE__TTL", text).queue.ttl, Duration::from_millis(millis));
    }
    assert_eq!(set("QPQ_GUESTS", "ann, bob,").guests, ["ann", "bob"]);
    let from_file = loaded("guests = ['ann', 'bob']", &[], &[]).unwrap().settings;
    assert_eq!(from_file.guests, ["ann", "bob"]);
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_name() {
    let text = problems("lisen = 'x'\n[tls]\ncret = 'x'\n[queeue]\n[colours]\nred = 1\n", &[]);
    assert!(text.contains(": there is no lisen; did you mean listen?"), "{text}");
    assert!(text.contains(": there is no tls.cret; did you mean tls.cert?"), "{text}");
    assert!(text.contains(": there is no queeue; did you mean queue?"), "{text}");
    assert!(text.contains(": there is no colours; see docs/configuration.md"), "{text}");
    assert_eq!(text.matches("\n  file /").count(), 4, "each names the file: {text}");
    let moved = problems("[queue]\ncert = 'x'\n", &[]);
    assert!(moved.contains("there is no queue.cert; did you mean tls.cert?"), "{moved}");
    let nested = problems("[listen]\nport = 1\n", &[]);
    assert!(nested.contains("listen must be an address and port"), "{nested}");
}

#[test]
fn an_unknown_variable_is_refused_with_the_nearest_name() {
    let text = problems("", &[("QPQ_LISTN", "x"), ("QPQ_TLS_CERT", "x"), ("QPQ_WHATEVER", "x")]);
    assert!(text.contains("there is no variable QPQ_LISTN; did you mean QPQ_LISTEN?"), "{text}");
    assert!(
        text.contains("there is no variable QPQ_TLS_CERT; did you mean QPQ_TLS__CERT?"),
        "{text}"
    );
    assert!(
        text.contains("there is no variable QPQ_WHATEVER; see docs/configuration.md"),
        "{text}"
    );
}

#[test]
fn a_refused_value_is_reported_with_its_origin_and_the_allowed_values() {
    let file = "tls = 1\n[queue]\nttl = 'soon'\nenabled = 'perhaps'\nmax_payload = -1\n";
    let text = problems(file, &[("QPQ_LISTEN", "5001")]);
    assert!(text.contains(": tls is a section: write [tls]"), "{text}");
    assert!(text.contains(": queue.ttl is \"soon\", but must be a duration, as in"), "{text}");
    assert!(text.contains(": queue.enabled is \"perhaps\", but must be true or false"), "{text}");
    assert!(text.contains(": queue.max_payload is \"-1\", but must be a size"), "{text}");
    assert!(
        text.contains("\n  QPQ_LISTEN: listen is \"5001\", but must be an address and port"),
        "{text}"
    );
    for overflow in ["999999999999d", "d", "1.5h", "1 week"] {
        assert!(
            problems("", &[("QPQ_QUEUE__TTL", overflow)]).contains("must be a duration"),
            "{overflow}"
        );
    }
}

#[test]
fn a_broken_rule_is_reported_with_the_origin_of_the_value() {
    let text = problems("", &[("QPQ_QUEUE__MAX_PAYLOAD", "1")]);
    assert!(
        text.ends_with("\n  QPQ_QUEUE__MAX_PAYLOAD: queue.max_payload must be at least 16B"),
        "{text}"
    );
}

#[test]
fn an_unreadable_or_malformed_file_is_reported_by_name() {
    let missing = Sources { file: Some("/nonexistent/qpq.toml".into()), ..Sources::default() };
    let text = load::<Root>(missing).unwrap_err().to_string();
    assert!(text.contains("file /nonexistent/qpq.toml: cannot be read: No such file"), "{text}");
    let text = problems("listen = = 1", &[]);
    assert!(text.contains("is not TOML: ") && text.contains("line 1"), "{text}");
}

#[test]
fn show_is_toml_with_origins_and_without_secrets() {
    let file = "[tls]\npassphrase = 'hunter2'\n";
    let file = file_of(file);
    let mut sources =
        sources(&file, &[("QPQ_QUEUE__TTL", "90s")], &[("--listen", "listen", "[::]:5")]);
    let origin = format!("file {}", file.display());
    let loaded = load::<Root>(sources.clone()).unwrap();
    let shown = loaded.show();
    let expected = format!(
        "listen = \"[::]:5\"  # --listen\nguests = []  # default\n\n[tls]\n\
         # cert =  # server-cert.der in the data directory\n\
         passphrase = \"[redacted]\"  # {origin}\n\n[queue]\n\
         max_payload = \"1MiB\"  # default\nttl = \"90s\"  # QPQ_QUEUE__TTL\nenabled = true  # default\n"
    );
    assert_eq!(shown, expected);
    assert!(!format!("{loaded:?} {sources:?}").contains("hunter2"));

    fs::write(&file, &shown).unwrap();
    sources.environment.clear();
    sources.flags.clear();
    let again = load::<Root>(sources).unwrap();
    assert_eq!(
        again.settings.queue.ttl,
        Duration::from_secs(90),
        "what is shown can be used as a file"
    );
}

#[test]
fn changes_lists_the_changed_settings() {
    let before = loaded("guests = ['ann']\n[queue]\nttl = '1h'\n", &[], &[]).unwrap();
    let after = loaded("guests = ['ann']\n[queue]\nttl = '2h'\nenabled = false\n", &[], &[]);
    assert_eq!(before.changes(&after.unwrap()), ["queue.ttl", "queue.enabled"]);
    assert!(before.changes(&before).is_empty());
}

#[test]
fn a_refused_secret_is_not_in_the_error() {
    let text = problems("[tls]\npassphrase = ['hunter2']\n", &[]);
    assert!(text.contains("tls.passphrase must be text") && !text.contains("hunter2"), "{text}");
}

#[test]
fn the_reference_lists_every_setting_with_its_default() {
    let page = markdown::<Root>();
    let row = "| `listen` | address | `\"0.0.0.0:5001\"` | The address to listen on. Also `--listen`, `SHORT_LISTEN`. |";
    assert!(page.contains(row), "{page}");
    assert!(page.contains("## `[queue]`\n\nA second nested section.\n"), "{page}");
    assert!(
        page.contains(
            "| `cert` | path | server-cert.der in the data directory | The certificate. |"
        )
    );
}
