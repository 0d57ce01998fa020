//! A server for each test, people who use it, and a way to crash their clients.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    path::{Path, PathBuf},
    task::Poll,
    time::Duration,
};

use qpq_client::{
    Client, ConversationId, DeliveryState, Entry, Event, Fingerprint, Messenger, Options, Password,
    Trust, Username,
};
use qpq_runtime::{config::ListenOn, http::Http};
use qpq_server::{Config, Running, compose};
use tempfile::TempDir;

pub(crate) const PASSWORD: &str = "correct horse battery staple";

/// A server that can be stopped and started again: same port, same data.
pub(crate) struct Server {
    config: Config,
    running: Option<Running>,
    pub(crate) addr: SocketAddr,
    pub(crate) fingerprint: Fingerprint,
    dir: TempDir,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    pub(crate) async fn start_with(configure: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            data_dir: dir.path().join("data"),
            http: Http { listen: ListenOn::Off },
            ..Config::default()
        };
        config.limits.enabled = false;
        configure(&mut config);
        let running = Box::pin(compose(&config)).await.unwrap();
        let (addr, fingerprint) = (running.local_addr(), running.fingerprint());
        config.listen = addr.into();
        Self { config, running: Some(running), addr, fingerprint, dir }
    }

    pub(crate) async fn stop(&mut self) {
        self.running.take().expect("it runs").shutdown(std::future::ready(())).await;
    }

    /// Stops the server as on SIGTERM: clients are notified, calls in progress end.
    pub(crate) async fn drain(&mut self) {
        self.running.take().expect("it runs").shutdown(std::future::pending()).await;
    }

    /// Changes the configuration of the next start.
    pub(crate) fn configure(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
    }

    pub(crate) async fn start_again(&mut self) {
        // The tasks of the connections that were closed release the port soon after.
        let addr = self.addr;
        soon(async move {
            while std::net::UdpSocket::bind(addr).is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        self.running = Some(Box::pin(compose(&self.config)).await.unwrap());
    }

    /// Copies the data directory while the server is stopped. Returns the path of the copy.
    pub(crate) async fn copy_data(&mut self) -> PathBuf {
        self.stop().await;
        let copy = self.dir.path().join("night");
        copy_dir(&self.config.data_dir, &copy);
        self.start_again().await;
        copy
    }

    /// Replaces the data directory by an older copy.
    pub(crate) async fn restore_data(&mut self, copy: &Path) {
        self.stop().await;
        std::fs::remove_dir_all(&self.config.data_dir).unwrap();
        copy_dir(copy, &self.config.data_dir);
        self.start_again().await;
    }

    pub(crate) fn options(&self) -> Options {
        Options::new(self.addr.to_string(), Trust::Pinned(self.fingerprint))
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.options()).unwrap()
    }

    pub(crate) fn certificate(&self) -> PathBuf {
        self.config.data_dir.join("server-cert.der")
    }

    pub(crate) fn profile(&self, name: &str) -> PathBuf {
        self.dir.path().join("profiles").join(name)
    }

    /// Registers a user, with KeyPackages on the server.
    pub(crate) async fn user(&self, name: &str) -> Messenger {
        Messenger::register(&self.profile(name), self.options(), &username(name), &password(), None)
            .await
            .unwrap()
    }

    /// Registers an account under each of the names, one after another.
    pub(crate) async fn users<const N: usize>(&self, names: [&str; N]) -> [Messenger; N] {
        let mut users = Vec::with_capacity(N);
        for name in names {
            users.push(self.user(name).await);
        }
        users.try_into().unwrap()
    }
}

/// Copies a directory of files.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

pub(crate) fn username(name: &str) -> Username {
    Username::parse(name).unwrap()
}

pub(crate) fn password() -> Password {
    Password::from(PASSWORD)
}

/// Returns the direct conversation of one user with another.
pub(crate) async fn dm(from: &Messenger, to: &str) -> ConversationId {
    from.conversation_with(&username(to)).await.unwrap()
}

/// Receives entries and marks them as seen. Returns them as lines such as "name: text" and "+name".
pub(crate) async fn read(messenger: &Messenger) -> Vec<String> {
    let entries = messenger.receive().await.unwrap();
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    messenger.mark_seen(&ids).await.unwrap();
    entries.iter().map(line).collect()
}

/// Receives, accepts every request, and reads.
pub(crate) async fn accept_and_read(messenger: &Messenger) -> Vec<String> {
    messenger.receive().await.unwrap();
    for request in messenger.requests().await.unwrap().waiting {
        messenger.accept(request.id).await.unwrap();
    }
    read(messenger).await
}

pub(crate) async fn history(messenger: &Messenger, conversation: ConversationId) -> Vec<String> {
    messenger.history(conversation, usize::MAX).await.unwrap().iter().map(line).collect()
}

pub(crate) fn line(entry: &Entry) -> String {
    let names = |people: &[qpq_client::Person]| {
        people.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    };
    match &entry.event {
        Event::Sent { text, delivery: DeliveryState::Sent, .. } => format!("me: {text}"),
        Event::Sent { text, delivery, .. } => format!("me: {text} ({delivery:?})"),
        Event::Received { from, text, .. } => format!("{from}: {text}"),
        Event::Joined { by } => format!("joined by {by}"),
        Event::Requested { by, group: Some(name) } => format!("{by} asks for {name}"),
        Event::Requested { by, group: None } => format!("{by} asks"),
        Event::Added { members } => format!("+{}", names(members)),
        Event::Removed { members, .. } => format!("-{}", names(members)),
        Event::Unreadable { from: None, reason } => format!("unreadable: {reason}"),
        Event::Unreadable { from: Some(from), reason } => format!("unreadable of {from}: {reason}"),
        Event::WentBack => "the server went back".to_owned(),
        Event::Restored => "the profile went back".to_owned(),
        Event::Missing { first, last } => format!("missing {}-{}", first.0, last.0),
        Event::NameRefuted { claimed, .. } => format!("not {claimed}"),
        Event::NewKey { person } => person.to_string(),
        Event::DeviceRequested { name } => format!("{name} asks to be linked"),
        Event::DeviceAdded { person, device } => format!("{person} added {device}"),
        Event::DeviceRemoved { person, device } => format!("{person} removed {device}"),
        Event::Rejoined { person, device } => format!("{person} rejoined on {device}"),
        Event::Renamed { by, name } => format!("{by} named it {name}"),
        Event::Promoted { members } => format!("admins: {}", names(members)),
        Event::Demoted { members } => format!("no admins: {}", names(members)),
        Event::NotChanged { reason } => format!("not changed: {reason}"),
        Event::Undeliverable { to, reason } => format!("undeliverable to {to}: {reason}"),
    }
}

/// Opens a profile as after a crash: with the key, without logging in.
pub(crate) async fn reopen(dir: &Path, key: &qpq_client::VaultKey) -> Messenger {
    Messenger::unlock_with_key(dir, key.clone()).await.unwrap()
}

/// Opens a profile as [`reopen`] does, once the crashed process has ended and its last change is
/// saved.
pub(crate) async fn restart(dir: &Path, key: &qpq_client::VaultKey) -> Messenger {
    let lock = std::fs::File::open(dir.join("lock")).unwrap();
    tokio::task::spawn_blocking(move || lock.lock()).await.unwrap().unwrap();
    reopen(dir, key).await
}

/// Drops a future after `polls` polls; returns its output if it ended before.
pub(crate) fn crash_after<F: Future>(
    polls: usize,
    future: F,
) -> impl Future<Output = Option<F::Output>> {
    let mut future = Box::pin(future);
    let mut left = polls;
    poll_fn(move |cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            // The polls are used up: the crash happens now, not at the next event.
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
}

/// Fails a test that would otherwise hang.
pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it takes much too long")
}
