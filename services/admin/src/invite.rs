//! `qpq-admin invite`: creates, lists and revokes invites of a single node or a cluster. The
//! servers may be running or stopped.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use anyhow::bail;
use clap::Subcommand;
use qpq_domain::{InviteCode, InviteId, MAX_INVITE_NOTE, MAX_INVITE_USES, UnixMillis, Username};
use qpq_ports::{Clock as _, Invite, InviteRevocation, Invites, NewInvite, SystemClock};
use qpq_runtime::config::{Leaf as _, Value};
use qpq_store_embedded::InvitesOperator;
use rand::{RngCore as _, rngs::OsRng};
use serde_json::json;

use crate::{
    backup::{Store, StoreArgs},
    block_on, print, roughly,
    settings::connect_with_retry,
};

/// The longest lifetime of an invite.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// The arguments of `invite`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create an invite and print its code, which is shown only now.
    ///
    /// A server with auth.registration = "invite" accepts new accounts only with such a code:
    /// `qpq register NAME --invite CODE`.
    Create(CreateArgs),
    /// List the invites, the newest first. Codes are not stored and not shown.
    List(ListArgs),
    /// Revoke an invite. Accounts that were registered with it stay.
    Revoke(RevokeArgs),
}

/// The arguments of `invite create`.
#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// The number of accounts that can be registered with the invite.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_INVITE_USES)))]
    uses: u32,
    /// The time until the invite expires, as in 12h or 30d.
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = lifetime)]
    expires: Duration,
    /// The only username that can be registered. Usernames in admin.usernames need such an invite.
    #[arg(long, value_name = "NAME", conflicts_with = "uses")]
    username: Option<Username>,
    /// A note for the operator, which `invite list` shows.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = note)]
    note: String,
    #[command(flatten)]
    shared: SharedArgs,
}

/// The arguments of `invite list`.
#[derive(Debug, clap::Args)]
struct ListArgs {
    /// List at most this many invites.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    #[command(flatten)]
    shared: SharedArgs,
}

/// The arguments of `invite revoke`.
#[derive(Debug, clap::Args)]
struct RevokeArgs {
    /// The code of the invite, or its id, as `qpq-admin invite list` shows it.
    #[arg(value_name = "CODE_OR_ID", value_parser = code_or_id)]
    invite: InviteId,
    #[command(flatten)]
    shared: SharedArgs,
}

/// The arguments of all commands for invites.
#[derive(Debug, clap::Args)]
struct SharedArgs {
    /// Print one JSON object per invite.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// The invites of a single node or of a cluster.
enum Book {
    Node(InvitesOperator),
    Cluster(Arc<dyn Invites>),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    match &args.command {
        Command::Create(args) => create(args),
        Command::List(args) => list(args),
        Command::Revoke(args) => revoke(args),
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<()> {
    let store = args.shared.store.store()?;
    let mut random = [0; InviteCode::DIGITS];
    OsRng.fill_bytes(&mut random);
    let code = InviteCode::from_random(random);
    let new = NewInvite {
        code: code.hash(),
        uses: args.uses,
        lifetime: args.expires,
        username: args.username.clone(),
        note: args.note.clone(),
        now: SystemClock.now(),
    };
    let invite = block_on(async { Book::open(&store).await?.create(new).await })?;
    if args.shared.json {
        let mut object = object(&invite);
        object["code"] = code.expose().into();
        return print(format_args!("{object}\n"));
    }
    let scope = match &invite.username {
        Some(username) => format!("the account {username}"),
        None if invite.uses == 1 => "one account".into(),
        None => format!("{} accounts", invite.uses),
    };
    print(format_args!(
        "{}\n\nThis code registers {scope} within {}. It is not shown again.\n\
         To revoke it: qpq-admin invite revoke {}\n",
        code.expose(),
        roughly(invite.expires_at.since(invite.created_at)),
        invite.id
    ))
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let store = args.shared.store.store()?;
    let invites = block_on(async { Book::open(&store).await?.list(args.limit).await })?;
    if args.shared.json {
        return print(
            invites.iter().map(|invite| format!("{}\n", object(invite))).collect::<String>(),
        );
    }
    print(table(&invites, SystemClock.now()))
}

fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    let (store, id) = (args.shared.store.store()?, args.invite);
    match block_on(async { Book::open(&store).await?.revoke(id).await })? {
        InviteRevocation::NotFound => {
            bail!("there is no invite {id}. See `qpq-admin invite list`")
        }
        InviteRevocation::Revoked if args.shared.json => {
            print(format_args!("{}\n", json!({ "id": id.to_string(), "revoked": true })))
        }
        InviteRevocation::Revoked => print(format_args!("Invite {id} is revoked.\n")),
    }
}

impl Book {
    async fn open(store: &Store) -> anyhow::Result<Self> {
        match store {
            Store::Node(dir, _) => Ok(Self::Node(InvitesOperator::open(dir).await?)),
            Store::Cluster(settings) => {
                // The commands for invites do not check the OPAQUE setup, which identifies a
                // cluster.
                let database = settings.database([0; 32])?;
                let connect = async || qpq_store_cluster::operator_invites(&database).await;
                Ok(Self::Cluster(connect_with_retry(database.start_timeout, connect).await?))
            }
        }
    }

    async fn create(&mut self, new: NewInvite) -> anyhow::Result<Invite> {
        Ok(match self {
            Self::Node(invites) => invites.create(&new).await?,
            Self::Cluster(invites) => invites.create(new).await?,
        })
    }

    async fn list(&mut self, limit: u32) -> anyhow::Result<Vec<Invite>> {
        Ok(match self {
            Self::Node(invites) => invites.list(limit).await?,
            Self::Cluster(invites) => invites.list(limit).await?,
        })
    }

    async fn revoke(&mut self, id: InviteId) -> anyhow::Result<InviteRevocation> {
        Ok(match self {
            Self::Node(invites) => invites.revoke(id).await?,
            Self::Cluster(invites) => invites.revoke(id).await?,
        })
    }
}

/// Returns an invite as JSON. Times are milliseconds since the Unix epoch.
fn object(invite: &Invite) -> serde_json::Value {
    let Invite { id, uses, uses_left, username, note, created_at, expires_at } = invite;
    json!({
        "id": id.to_string(),
        "uses": uses,
        "uses_left": uses_left,
        "username": username.as_ref().map(Username::as_str),
        "note": note,
        "created_at": created_at.0,
        "expires_at": expires_at.0,
    })
}

fn table(invites: &[Invite], now: UnixMillis) -> String {
    if invites.is_empty() {
        return "There are no invites.\n".into();
    }
    let mut text = format!(
        "{:<16}  {:>7} {:>7}  {:<10}  {:<16}  NOTE\n",
        "ID", "LEFT", "OF", "EXPIRES", "USERNAME"
    );
    for Invite { id, uses, uses_left, username, note, expires_at, .. } in invites {
        let left = expires_at.since(now);
        let expires =
            if left.is_zero() { "expired".into() } else { format!("in {}", roughly(left)) };
        let username = username.as_ref().map_or("", Username::as_str);
        let id = id.to_string();
        let line =
            format!("{id:<16}  {uses_left:>7} {uses:>7}  {expires:<10}  {username:<16}  {note}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = Duration::read(&Value::from(text));
    lifetime
        .filter(|lifetime| !lifetime.is_zero() && *lifetime <= LONGEST)
        .ok_or_else(|| "a duration of at most 3650d, as in 12h or 30d".into())
}

fn note(text: &str) -> Result<String, String> {
    if text.len() > MAX_INVITE_NOTE || text.chars().any(char::is_control) {
        return Err(format!("at most {MAX_INVITE_NOTE} bytes without line breaks"));
    }
    Ok(text.to_owned())
}

fn code_or_id(text: &str) -> Result<InviteId, String> {
    let text = text.trim();
    text.parse()
        .or_else(|_| InviteCode::parse(text).map(|code| code.hash().id()))
        .map_err(|_| "an id of 16 hexadecimal digits, or a code of 28 letters and digits".into())
}
