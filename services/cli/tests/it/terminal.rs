//! `qpq dm` at a terminal: lines appear while another is being typed.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    io::{Read as _, Write as _},
    net::SocketAddr,
    process::Stdio,
    sync::Arc,
};

use nix::pty::{OpenptyResult, Winsize, openpty};
use qpq_runtime::config::Named;
use qpq_server::RegistrationMode;
use tokio::{
    net::UdpSocket,
    process::{Child, Command},
    sync::{mpsc, watch},
};

use crate::harness::{PASSWORD, Person, World, soon};

/// A relay to a server, which can be cut without a notification of either side.
struct Wire {
    address: String,
    is_cut: watch::Sender<bool>,
}

impl Wire {
    async fn to(server: &str) -> Self {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = near.local_addr().unwrap().to_string();
        let server = server.to_owned();
        let (is_cut, cut) = watch::channel(false);
        tokio::spawn(async move {
            // Each socket of the client has one to the server, since its answers could not be
            // distinguished otherwise.
            let mut far = HashMap::<SocketAddr, Arc<UdpSocket>>::new();
            let mut buffer = vec![0; 65_536];
            while let Ok((length, from)) = near.recv_from(&mut buffer).await {
                let socket = match far.entry(from) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => {
                        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                        socket.connect(&server).await.unwrap();
                        tokio::spawn(answers(
                            Arc::clone(&socket),
                            Arc::clone(&near),
                            from,
                            cut.clone(),
                        ));
                        new.insert(socket)
                    }
                };
                if !*cut.borrow() {
                    socket.send(&buffer[..length]).await.unwrap();
                }
            }
        });
        Self { address, is_cut }
    }
}

async fn answers(
    far: Arc<UdpSocket>,
    near: Arc<UdpSocket>,
    to: SocketAddr,
    cut: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(length) = far.recv(&mut buffer).await {
        if !*cut.borrow() {
            near.send_to(&buffer[..length], to).await.unwrap();
        }
    }
}

/// A command at a terminal, and the output that the terminal received.
struct Terminal {
    child: Child,
    keyboard: File,
    screen: mpsc::UnboundedReceiver<Vec<u8>>,
    shown: String,
}

impl Terminal {
    fn start(person: &Person, args: &[&str]) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).unwrap();
        // setsid makes this the terminal of the command: /dev/tty, at which passwords are asked
        // for.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_qpq")]).args(args).env_clear();
        command.envs(person.environment()).env("TERM", "xterm");
        command.stdin(Stdio::from(slave.try_clone().unwrap()));
        command.stdout(Stdio::from(slave.try_clone().unwrap())).stderr(Stdio::from(slave));
        let child = command.kill_on_drop(true).spawn().unwrap();
        drop(command);
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().unwrap();
        let (got, screen) = mpsc::unbounded_channel();
        tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 4096];
            // A read of the terminal fails after the last process has closed it.
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                if got.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keyboard, screen, shown: String::new() }
    }

    fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for the end. Returns the exit code and the last output.
    async fn ends(mut self) -> (Option<i32>, String) {
        let status = soon(self.child.wait()).await.unwrap();
        while let Some(more) = soon(self.screen.recv()).await {
            self.shown.push_str(&String::from_utf8_lossy(&more));
        }
        (status.code(), self.shown)
    }

    /// Waits until `text` was shown, and drops the output up to it.
    async fn shows(&mut self, text: &str) {
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return;
            }
            let more = soon(self.screen.recv()).await;
            let Some(more) = more else { panic!("it ended without {text:?}: {:?}", self.shown) };
            self.shown.push_str(&String::from_utf8_lossy(&more));
        }
    }
}

#[tokio::test]
async fn a_line_that_arrives_while_another_is_typed_does_not_disturb_it() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    bob.ok(&["send", "alice", "before"]).await;
    let mut terminal = Terminal::start(&alice, &["dm", "bob"]);
    terminal.shows("Chat with bob").await;
    terminal.shows("before").await;
    terminal.shows("you: ").await;

    terminal.types("hel");
    terminal.shows("hel").await;
    bob.ok(&["send", "alice", "interrupting\x1b[2J"]).await;
    terminal.shows("interrupting\\u{1b}[2J").await;
    terminal.shows("you: hel").await;
    terminal.types("lo\r");
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: hello\n");

    // The arrow key brings the line back; it is edited and sent again.
    terminal.types("\x1b[A!\r");
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: hello!\n");
    terminal.types("/help\r");
    terminal.shows("/quit").await;
    terminal.types("/quit\r");
    assert_eq!(terminal.ends().await.0, Some(0));
    assert_eq!(alice.ok(&["recv", "--json"]).await, "", "all was seen");
}

#[tokio::test]
async fn texts_typed_while_the_server_is_down_are_saved_and_sent_later() {
    let mut world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let mut terminal = Terminal::start(&alice, &["dm", "bob"]);
    terminal.shows("you: ").await;
    terminal.types("one\r");
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: one\n");
    world.stop().await;
    terminal.shows("connection lost").await;
    terminal.types("two\rthree\r/quit\r");
    let (code, shown) = terminal.ends().await;
    assert_eq!(code, Some(4), "{shown}");
    assert!(shown.contains("saved, but not sent yet"), "{shown}");

    world.start_again().await;
    alice.ok(&["send", "bob", "four"]).await;
    assert_eq!(bob.ok(&["recv"]).await, "alice: two\nalice: three\nalice: four\n");
}

#[tokio::test]
async fn a_silent_server_is_announced_and_typed_text_arrives_when_it_answers() {
    let world = World::new().await;
    let bob = world.user("bob").await;
    let wire = Wire::to(&world.address).await;
    let mut alice = world.person("alice");
    alice.server.clone_from(&wire.address);
    alice.ok(&["register", "alice", "--pin", &world.fingerprint]).await;

    let mut terminal = Terminal::start(&alice, &["dm", "bob"]);
    terminal.shows("you: ").await;
    terminal.types("one\r");
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: one\n");
    wire.is_cut.send_replace(true);
    terminal.types("two\r");
    terminal.shows("saved, but not sent yet: the server does not answer").await;
    wire.is_cut.send_replace(false);
    terminal.shows("* sent").await;
    assert_eq!(bob.ok(&["recv", "--timeout", "50"]).await, "alice: two\n");
    terminal.types("/quit\r");
    assert_eq!(terminal.ends().await.0, Some(0));
}

#[tokio::test]
async fn ctrl_c_ends_a_chat_with_exit_code_zero() {
    let world = World::new().await;
    let (alice, _bob) = (world.user("alice").await, world.user("bob").await);
    let mut terminal = Terminal::start(&alice, &["dm", "bob"]);
    terminal.shows("you: ").await;
    terminal.types("half a line\x03");
    assert_eq!(terminal.ends().await.0, Some(0));
}

#[tokio::test]
async fn passwords_are_asked_for_unseen_and_twice_for_a_new_account() {
    let world = World::new().await;
    let alice = world.person("alice");
    let mut terminal = Terminal::start(&alice, &["register", "alice"]);
    terminal.shows("Password: ").await;
    terminal.types(&format!("{PASSWORD}\r"));
    terminal.shows("Again: ").await;
    terminal.types(&format!("{PASSWORD}x\r"));
    let (code, shown) = terminal.ends().await;
    assert_eq!(code, Some(1));
    assert!(shown.contains("the two passwords differ") && !shown.contains(PASSWORD), "{shown}");

    let mut terminal = Terminal::start(&alice, &["register", "alice"]);
    for prompt in ["Password: ", "Again: "] {
        terminal.shows(prompt).await;
        terminal.types(&format!("{PASSWORD}\r"));
    }
    let (code, shown) = terminal.ends().await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("is registered on") && !shown.contains(PASSWORD), "{shown}");

    let mut terminal = Terminal::start(&alice, &["login"]);
    terminal.shows("Password: ").await;
    terminal.types("half\x03");
    let (code, shown) = terminal.ends().await;
    assert_eq!(code, Some(130), "{shown}");
    assert!(shown.contains("interrupted") && !shown.contains("half"), "{shown}");
}

#[tokio::test]
async fn the_invite_is_asked_for_if_the_server_needs_one() {
    let mode = Named(RegistrationMode::Invite);
    let world = World::with(|config| config.auth.registration = mode).await;
    let code = world.invite(1, None).await;
    let alice = world.person("alice");
    let mut terminal = Terminal::start(&alice, &["register", "alice"]);
    for prompt in ["Password: ", "Again: "] {
        terminal.shows(prompt).await;
        terminal.types(&format!("{PASSWORD}\r"));
    }
    terminal.shows("Invite code: ").await;
    terminal.types(&format!("{code}\r"));
    let (end, shown) = terminal.ends().await;
    assert_eq!(end, Some(0), "{shown}");
    assert!(shown.contains("is registered on") && !shown.contains(code), "{shown}");
}

#[tokio::test]
async fn requests_are_listed_and_decided_on_while_chatting() {
    let world = World::new().await;
    let [alice, _bob, mallory] =
        [world.user("alice").await, world.user("bob").await, world.user("mallory").await];
    let mut terminal = Terminal::start(&alice, &["dm", "bob"]);
    terminal.shows("you: ").await;
    for group in ["offers", "party"] {
        mallory.ok(&["group", "create", group, "alice"]).await;
    }
    terminal.shows("mallory wants to add you to the group offers: see `qpq requests`").await;
    mallory.ok(&["group", "send", "party", "hi"]).await;
    terminal.types("/requests\r");
    terminal.shows("wants to add you to the group offers, 2 members").await;
    terminal.types("/accept nobody\r");
    terminal.shows("no request from nobody, and none for a group called nobody").await;
    terminal.types("/decline offers\r");
    terminal.shows("Declined the group").await;
    terminal.types("/accept party\r");
    terminal.shows("You joined the group").await;
    terminal.shows("mallory has written to a group").await;
    terminal.types("/quit\r");
    assert_eq!(terminal.ends().await.0, Some(0));
    assert!(alice.json(&["requests"]).await.is_empty());
}

#[tokio::test]
async fn a_new_device_is_linked_by_a_person_at_two_terminals() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let laptop = world.person("alice-laptop");
    let mut new = Terminal::start(&laptop, &["device", "link", "--name", "laptop", "alice"]);
    new.shows("Password: ").await;
    new.types(&format!("{PASSWORD}\r"));
    new.shows("qpq device approve ").await;
    new.shows("This device waits for 10 min").await;

    let mut old = Terminal::start(&alice, &["device", "approve"]);
    old.shows("Does the new device show ").await;
    old.types("\r");
    assert_eq!(old.ends().await.0, Some(0), "no is the answer unless it is yes");
    assert_eq!(alice.json(&["device", "list"]).await.len(), 1);

    let mut old = Terminal::start(&alice, &["device", "approve"]);
    old.shows("? [y/N] ").await;
    old.types("y\r");
    old.shows("Password: ").await;
    old.types(&format!("{PASSWORD}\r"));
    old.shows(" is now a device of yours.").await;
    assert_eq!(old.ends().await.0, Some(0));
    new.shows("This device is linked to ").await;
    assert_eq!(new.ends().await.0, Some(0));
    assert_eq!(laptop.json(&["device", "list"]).await.len(), 2);
}
