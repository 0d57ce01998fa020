//! The people who may register: everyone, those with an invite, nobody; and the usernames of
//! administrators, which need an invite of their own.

use std::{collections::HashSet, time::Duration};

use qpq_domain::{IdentityKey, InviteCode, Username};
use qpq_ports::{Clock as _, NewInvite};
use qpq_proto::{Status, methods::OpaqueRegisterFinish, v1::OpaqueRegisterFinishRequest};
use qpq_rpc::{Config, RateLimits, RegistrationMode};

use crate::harness::{Client, Refused, Server, new_identity, registration};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn code(n: u8) -> InviteCode {
    InviteCode::from_random([n; 28])
}

impl Server {
    async fn invite(&self, n: u8, uses: u32, username: Option<&str>) {
        let invite = NewInvite {
            code: code(n).hash(),
            uses,
            lifetime: HOUR,
            username: username.map(|name| Username::parse(name).expect("a username")),
            note: String::new(),
            now: self.clock.now(),
        };
        self.rpc.app().stores.invites.create(invite).await.expect("create");
    }

    async fn uses_left(&self) -> u32 {
        let invites = self.rpc.app().stores.invites.list(9).await.expect("list");
        invites.iter().map(|invite| invite.uses_left).sum()
    }
}

/// Returns the request of a registration with an invite.
async fn request(
    client: &Client,
    name: &str,
    identity: &IdentityKey,
    invite: &str,
) -> OpaqueRegisterFinishRequest {
    let upload = client.upload(name, "password").await.expect("RegisterStart is always answered");
    let invite = invite.to_owned();
    OpaqueRegisterFinishRequest { invite, ..registration(name, &upload, identity) }
}

async fn register(client: &Client, name: &str, invite: &str) -> Result<(), Refused> {
    let request = request(client, name, &new_identity(), invite).await;
    client.call::<OpaqueRegisterFinish>(request).await.map(drop)
}

#[track_caller]
fn refused(outcome: Result<(), Refused>, code: &str, field: &str) {
    let refused = outcome.expect_err("a refusal");
    refused.assert(Status::Forbidden, code);
    assert_eq!(refused.field, field);
}

#[tokio::test]
async fn with_open_registration_no_invite_is_needed_or_used() {
    let server = Server::start().await;
    let client = server.connect();
    server.invite(1, 5, None).await;
    let expose = code(1).expose();
    for (name, invite) in [("alice", ""), ("bob", "nonsense"), ("carol", &expose[..])] {
        register(&client, name, invite).await.expect("everyone may register");
    }
    assert_eq!(server.uses_left().await, 5);
}

#[tokio::test]
async fn with_invite_registration_each_account_uses_an_invite() {
    let server = Server::with(|config| config.registration = RegistrationMode::Invite).await;
    let client = server.connect();
    server.invite(1, 2, None).await;
    let typed = format!("  {} ", code(1).expose().to_lowercase());
    for empty in ["", "  "] {
        let outcome = register(&client, "alice", empty).await;
        refused(outcome, "auth.invite_required", "invite");
    }
    for wrong in ["nonsense", &code(2).expose()] {
        let outcome = register(&client, "alice", wrong).await;
        refused(outcome, "auth.invite_invalid", "invite");
    }
    register(&client, "alice", &typed).await.expect("a valid invite");
    refused(register(&client, "alice", &typed).await, "auth.username_taken", "");
    assert_eq!(server.uses_left().await, 1, "a refused registration uses nothing");
    register(&client, "bob", &typed).await.expect("a valid invite");
    // Used up: a taken username is not revealed.
    for name in ["alice", "carol"] {
        refused(register(&client, name, &typed).await, "auth.invite_invalid", "invite");
    }
    client.log_in("bob", "password").await.expect("bob is registered");

    server.invite(3, 1, None).await;
    server.clock.advance(HOUR);
    let outcome = register(&client, "carol", &code(3).expose()).await;
    refused(outcome, "auth.invite_invalid", "invite");
}

#[tokio::test]
async fn a_repeated_registration_succeeds_without_a_second_use() {
    let server = Server::with(|config| config.registration = RegistrationMode::Invite).await;
    let client = server.connect();
    server.invite(1, 1, None).await;
    let first = request(&client, "alice", &new_identity(), &code(1).expose()).await;
    for _ in 0..3 {
        let answer = client.call::<OpaqueRegisterFinish>(first.clone()).await;
        assert!(answer.expect("the same account").success);
    }
    assert_eq!(server.uses_left().await, 0);
    // The answer was lost, and the configuration has changed since.
    let mode = |registration| Config {
        registration,
        domain: "example.org".into(),
        limits: RateLimits { enabled: false, ..RateLimits::default() },
        ..Config::default()
    };
    let without = OpaqueRegisterFinishRequest { invite: String::new(), ..first.clone() };
    for (registration, repeat) in
        [(RegistrationMode::Closed, &first), (RegistrationMode::Invite, &without)]
    {
        let other = server.reconfigured(mode(registration));
        let answer = other.call::<OpaqueRegisterFinish>(repeat.clone()).await;
        assert!(answer.expect("the same account").success);
    }
}

#[tokio::test]
async fn with_closed_registration_nobody_registers_and_accounts_log_in() {
    let server = Server::start().await;
    let client = server.connect();
    register(&client, "alice", "").await.expect("open");
    let closed = server.reconfigured(Config {
        registration: RegistrationMode::Closed,
        limits: RateLimits { enabled: false, ..RateLimits::default() },
        ..Config::default()
    });
    server.invite(1, 1, None).await;
    for (name, invite) in [("bob", ""), ("bob", &code(1).expose()), ("alice", "")] {
        refused(register(&closed, name, invite).await, "auth.registration_closed", "");
    }
    closed.log_in("alice", "password").await.expect("the account stays");
}

#[tokio::test]
async fn the_username_of_an_administrator_is_taken_without_an_invite_that_names_it() {
    for mode in [RegistrationMode::Open, RegistrationMode::Invite] {
        let server = Server::with(|config| {
            config.registration = mode;
            config.admins = HashSet::from([Username::parse("root1").expect("a username")]);
        })
        .await;
        let client = server.connect();
        server.invite(1, 5, None).await;
        server.invite(2, 1, Some("root1")).await;
        let (any, named) = (code(1).expose(), code(2).expose());
        // Also a username that looks like it, and in upper case.
        for name in ["root1", "ROOT1", "rootl"] {
            refused(register(&client, name, &any).await, "auth.username_taken", "");
        }
        let (code, field) = match mode {
            RegistrationMode::Open => ("auth.username_taken", ""),
            _ => ("auth.invite_invalid", "invite"),
        };
        refused(register(&client, "root1", "nonsense").await, code, field);
        refused(register(&client, "rootl", &named).await, code, field);
        if mode == RegistrationMode::Open {
            refused(register(&client, "root1", "").await, "auth.username_taken", "");
        } else {
            refused(register(&client, "other", &named).await, "auth.invite_invalid", "invite");
        }
        assert_eq!(server.uses_left().await, 6);
        register(&client, "Root1", &named).await.expect("the invite names the username");
        assert_eq!(server.uses_left().await, 5);
        refused(register(&client, "root1", &named).await, code, field);
        register(&client, "alice", &any).await.expect("other usernames are free");
    }
}
