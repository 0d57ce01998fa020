//! A `qpq-server` process for one test.

use std::{net::SocketAddr, path::Path};

use qpq_tests::{
    client::{Client, Pin, endpoint},
    process::{Server, sibling},
};
use tokio::process::Command;

/// A running server with its address and pin.
pub(crate) struct Running {
    pub(crate) process: Server,
    pub(crate) addr: SocketAddr,
    pub(crate) pin: Pin,
}

/// Starts a server without rate limits on a free port of 127.0.0.1, with its data in `dir`.
pub(crate) async fn start(dir: &Path) -> Running {
    start_with(dir, &[("QPQ_LIMITS__ENABLED", "false"), ("QPQ_HTTP__LISTEN", "off")]).await
}

/// Starts a server with these settings on a free port of 127.0.0.1, with its data in `dir`.
pub(crate) async fn start_with(dir: &Path, variables: &[(&str, &str)]) -> Running {
    let mut command = Command::new(sibling("qpq-server").expect("the server's binary"));
    command
        .args(["--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir)
        .envs(variables.iter().copied())
        .env("RUST_LOG", "warn");
    let process =
        Server::start(command, |line| line.contains(" dm bob")).await.expect("the server starts");
    let words: Vec<&str> = process.said.iter().flat_map(|line| line.split_whitespace()).collect();
    let after = |flag: &str| {
        words.iter().skip_while(|w| **w != flag).nth(1).copied().expect("the greeting has it")
    };
    let (addr, pin) =
        (after("--server").parse().expect("an address"), after("--pin").parse().expect("a pin"));
    Running { process, addr, pin }
}

impl Running {
    pub(crate) async fn connect(&self) -> Client {
        let endpoint = endpoint(self.pin).expect("a socket");
        Client::connect(&endpoint, self.addr).await.expect("the server accepts")
    }
}
