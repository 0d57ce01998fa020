//! A whole messenger: one account's conversations, end to end encrypted, with all its state in a
//! profile on disk.
//!
//! | file | what |
//! |---|---|
//! | `open` | register, unlock, log out |
//! | `directory` | names to keys and back; our own key packages |
//! | `send` | messages and groups: encrypt, save, then send |
//! | `inbox` | Peek, take in, save, then Ack |
//! | `listen` | the live stream |
//! | `keeper`, `state` | the encrypted state; `log`, `people`, `outbox` are its parts |

mod directory;
mod inbox;
mod keeper;
mod listen;
mod log;
mod open;
mod outbox;
mod people;
mod send;
mod state;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use qpq_domain::{Seq, UnixMillis};
use qpq_mls::{GroupSummary, Kind, vault::VaultKey};
use qpq_ports::{Clock as _, SystemClock};
use tokio::sync::Mutex;

use self::{keeper::Keeper, state::State};
pub use self::{
    listen::Listener,
    log::{ConversationId, Delivery, Entry, EntryId, Event},
    people::{Person, Standing},
    send::{MAX_GROUP_NAME, MAX_TEXT, Outcome, Sent},
};
use crate::{client::Client, error::Error, profile::Profile};

/// An account at work. Cheap to clone; all clones are the same one. While one lives, its profile is
/// locked.
#[derive(Clone)]
pub struct Messenger {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    profile: Profile,
    keeper: Keeper,
    /// Held while the inbox is read: up to where it is known to be acknowledged.
    acked: Mutex<Seq>,
    /// Held while the outbox is sent.
    flushing: Mutex<()>,
    /// Whether our key packages were counted since the profile was opened: they also run out by
    /// growing old.
    keys_checked: AtomicBool,
    /// Whether the server refused our newest key packages.
    keys_refused: AtomicBool,
}

/// A conversation, as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    pub id: ConversationId,
    pub kind: ConversationKind,
    /// Entries that were not marked as seen.
    pub unseen: usize,
    /// When anything last happened in it.
    pub last: Option<UnixMillis>,
}

/// What kind of conversation it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConversationKind {
    Direct {
        peer: Person,
    },
    Group {
        name: String,
        /// The only one who adds and removes.
        maker: Person,
        /// How many there are in it, with us.
        members: usize,
        membership: Membership,
    },
}

/// Whether we are in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Membership {
    Member,
    /// We were removed: nothing more can be sent or read.
    Removed,
}

impl Messenger {
    /// The profile it works on.
    pub fn profile(&self) -> &Profile {
        &self.shared.profile
    }

    /// The connection it uses, for calls of your own and to watch it.
    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    /// Returns whether the server refused the key packages that were published last, so that others
    /// may be unable to start a conversation with us. The usual cause is a wrong clock on this
    /// machine: key packages say from when to when they may be used.
    pub fn are_keys_refused(&self) -> bool {
        self.shared.keys_refused.load(Ordering::Relaxed)
    }

    /// The key of the profile's encrypted state, to open it next time with
    /// [`Messenger::unlock_with_key`]. As secret as the account.
    pub async fn vault_key(&self) -> VaultKey {
        self.shared.keeper.key().await
    }

    /// Every conversation, the one where something happened last first.
    pub async fn conversations(&self) -> Result<Vec<Conversation>, Error> {
        let mut all = self.keeper().read(conversations).await?;
        all.sort_by_key(|conversation| std::cmp::Reverse(conversation.last));
        Ok(all)
    }

    /// Who is in a conversation, we among them.
    pub async fn members(&self, conversation: ConversationId) -> Result<Vec<Person>, Error> {
        self.keeper()
            .read(|state| match conversation {
                ConversationId::Direct(peer) => {
                    Ok(vec![state.people.person(&state.me()), state.people.person(&peer)])
                }
                ConversationId::Group(id) => {
                    let summary = state.mls.group(&id).ok_or(Error::NoSuchConversation)?;
                    Ok(summary
                        .members
                        .iter()
                        .map(|member| state.people.person(&member.identity))
                        .collect())
                }
            })
            .await?
    }

    /// The last `limit` entries of a conversation, oldest first.
    pub async fn history(
        &self,
        conversation: ConversationId,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        self.keeper()
            .read(|state| {
                let last = state.log.of(&conversation).rev().take(limit);
                let mut entries: Vec<_> = last.map(|kept| shown(state, &kept.entry)).collect();
                entries.reverse();
                entries
            })
            .await
    }

    /// What was not marked as seen, oldest first, without asking the server.
    pub async fn unseen(&self) -> Result<Vec<Entry>, Error> {
        self.keeper()
            .read(|state| state.log.unseen().into_iter().map(|entry| shown(state, entry)).collect())
            .await
    }

    /// Notes that these were shown to the person: they will not come again.
    pub async fn mark_seen(&self, entries: &[EntryId]) -> Result<(), Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let entries = entries.to_vec();
        self.keeper()
            .change(move |state| {
                state.log.mark_seen(&entries);
                Ok(())
            })
            .await
    }

    fn keeper(&self) -> &Keeper {
        &self.shared.keeper
    }
}

impl fmt::Debug for Messenger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messenger").field("profile", &self.shared.profile).finish_non_exhaustive()
    }
}

/// The time of day.
fn now() -> UnixMillis {
    SystemClock.now()
}

fn shown(state: &State, entry: &Entry<qpq_domain::IdentityKey>) -> Entry {
    let Entry { id, conversation, at, ref event } = *entry;
    Entry { id, conversation, at, event: event.map(|identity| state.people.person(identity)) }
}

fn conversations(state: &State) -> Vec<Conversation> {
    let me = state.me();
    let mut kinds = BTreeMap::new();
    for summary in state.mls.groups() {
        kinds.insert(ConversationId::of(&summary, &me), kind(state, summary));
    }
    // Those with whom nothing but queued or past messages is left.
    for kept in state.log.all() {
        if let Some(id @ ConversationId::Direct(peer)) = kept.entry.conversation {
            kinds
                .entry(id)
                .or_insert_with(|| ConversationKind::Direct { peer: state.people.person(&peer) });
        }
    }
    kinds
        .into_iter()
        .map(|(id, kind)| Conversation {
            id,
            kind,
            unseen: state.log.of(&id).filter(|kept| !kept.seen).count(),
            last: state.log.of(&id).next_back().map(|kept| kept.entry.at),
        })
        .collect()
}

fn kind(state: &State, summary: GroupSummary) -> ConversationKind {
    match (ConversationId::of(&summary, &state.me()), summary.kind) {
        (ConversationId::Group(_), Kind::Group { name }) => ConversationKind::Group {
            name,
            maker: state.people.person(&summary.maker),
            members: summary.members.len(),
            membership: if summary.active { Membership::Member } else { Membership::Removed },
        },
        (ConversationId::Direct(peer), _) => {
            ConversationKind::Direct { peer: state.people.person(&peer) }
        }
        (ConversationId::Group(_), Kind::Direct { .. }) => {
            unreachable!("a direct group is no group conversation")
        }
    }
}
