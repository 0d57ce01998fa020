//! Edges that do not start, with the reason: the secrets of another cluster, missing settings, or a
//! store that refuses the password.

use std::process::Stdio;

use qpq_tests::cluster::{Cluster, Place, Plan, init};

const FAILED: Option<i32> = Some(1);
const MISUSED: Option<i32> = Some(2);

/// Runs an edge that ends by itself. Returns its exit code and its output.
async fn refusal(
    cluster: &Cluster,
    change: impl FnOnce(&mut tokio::process::Command),
) -> (Option<i32>, String) {
    let mut command = cluster.command(0).expect("the program");
    // The running edge uses the port of the plan.
    command.env("QPQ_LISTEN", "127.0.0.1:0").stdin(Stdio::null()).stderr(Stdio::piped());
    change(&mut command);
    let output = command.output().await.expect("it ends");
    (output.status.code(), String::from_utf8(output.stderr).expect("text"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_with_another_opaque_setup_does_not_start() {
    let plan = Plan { edges: 1, place: Place::Apart, ..Plan::default() };
    let cluster = Cluster::start(plan).await.unwrap();
    let other = cluster.dir().join("other-cluster");
    init(&other).await.unwrap();
    let (code, said) = refusal(&cluster, |command| {
        command.env("QPQ_CLUSTER__SECRETS_DIR", &other);
    })
    .await;
    assert_eq!(code, FAILED, "{said}");
    assert!(
        said.contains("OPAQUE setup is not the cluster's") && said.contains("qpq-admin init"),
        "{said}"
    );
    // The cluster still works.
    cluster.kill_edge(0).await.unwrap();
    cluster.start_edge(0).await.unwrap();
    cluster.accounts(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_configuration_is_refused_with_the_names_of_missing_settings() {
    let plan = Plan { edges: 1, place: Place::Apart, ..Plan::default() };
    let cluster = Cluster::start(plan).await.unwrap();
    let needed = [
        ("QPQ_POSTGRES__URL", "postgres.url"),
        ("QPQ_REDIS__URL", "redis.url"),
        ("QPQ_NATS__URL", "nats.url"),
        ("QPQ_CLUSTER__SECRETS_DIR", "cluster.secrets_dir"),
    ];
    for (missing, setting) in needed {
        let (code, said) = refusal(&cluster, |command| {
            command.env_remove(missing);
        })
        .await;
        assert_eq!(code, MISUSED, "without {missing}: {said}");
        assert!(said.contains(&format!("{setting} is missing")), "without {missing}: {said}");
    }
    for (given, setting) in needed {
        let (code, said) = refusal(&cluster, |command| {
            needed.iter().filter(|(other, _)| *other != given).for_each(|(other, _)| {
                command.env_remove(other);
            });
        })
        .await;
        assert_eq!(code, MISUSED, "with {given} alone: {said}");
        let others = needed.iter().filter(|(_, other)| *other != setting);
        assert!(
            others.clone().all(|(_, other)| said.contains(other)),
            "with {given} alone: {said}"
        );
        assert!(!said.contains(":1234"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_whose_password_is_refused_names_the_store_and_its_settings() {
    let plan = Plan { edges: 1, place: Place::Apart, ..Plan::default() };
    let cluster = Cluster::start(plan).await.unwrap();
    let file = cluster.dir().join("wrong-password");
    std::fs::write(&file, "not-the-password\n").unwrap();
    for section in ["postgres", "redis", "nats"] {
        let (code, said) = refusal(&cluster, |command| {
            command.env(format!("QPQ_{}__PASSWORD_FILE", section.to_uppercase()), &file);
            // With this time limit, an edge that retries would not end during the test.
            command.env("QPQ_CLUSTER__START_TIMEOUT", "1d");
        })
        .await;
        assert_eq!(code, FAILED, "{section}: {said}");
        assert!(said.contains("does not let this program in"), "{section}: {said}");
        let settings = [format!("{section}.url"), format!("{section}.password_file")];
        assert!(settings.iter().all(|setting| said.contains(setting)), "{section}: {said}");
        assert!(!said.contains("not-the-password"), "{said}");
    }
}
