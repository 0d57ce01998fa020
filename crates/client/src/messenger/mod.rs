//! A complete messenger: one account's conversations, end-to-end encrypted, with all its state in a
//! profile on disk.
//!
//! | file | contents |
//! |---|---|
//! | `open` | register, unlock, log out; `password`: change the password |
//! | `changes` | changes of groups that wait for the server |
//! | `groups` | creating, inviting, removing, renaming, admins, joining again |
//! | `devices` | this account's devices, and those of people in our conversations |
//! | `link` | a new device becomes one of the account's |
//! | `recovery` | the recovery bundle, and devices that are restored from it |
//! | `rotation` | renewal of keys that a member has asked for |
//! | `directory` | names to keys and back; our own KeyPackages |
//! | `send` | messages: encrypt, save, then send |
//! | `inbox` | Peek, process, save, then Ack; `page`: processing of one page |
//! | `note` | the entries in the history for received messages |
//! | `listen` | the live stream |
//! | `marker` | detection of a profile whose own state went back in time |
//! | `block` | people whose messages are refused |
//! | `leave` | groups that are left |
//! | `requests` | strangers' groups, which wait to be accepted |
//! | `repair` | requests to repeat messages that cannot be read, and the answers |
//! | `prune` | removal of records that are no longer needed |
//! | `store`, `state` | the sealed state; `log`, `people`, `outbox` are its parts |
//! | `tables`, `records` | the saved form of the state; `legacy`: that of earlier releases |

mod account;
mod block;
mod changes;
#[cfg(test)]
mod cost;
mod decisions;
mod devices;
mod directory;
mod enqueue;
mod files;
mod groups;
mod inbox;
mod leave;
mod legacy;
mod link;
mod listen;
mod log;
mod marker;
mod moderation;
mod note;
mod open;
mod outbox;
mod page;
mod password;
mod people;
mod prune;
mod reconcile;
mod records;
mod recovery;
mod repair;
mod requests;
mod rotation;
mod send;
mod state;
mod store;
mod tables;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use qpq_domain::{IdentityKey, UnixMillis};
use qpq_mls::{GroupKind, GroupSummary, vault::VaultKey};
use qpq_ports::{Clock as _, SystemClock};
use tokio::sync::Mutex;

pub use self::{
    devices::{FIRST_DEVICE, MAX_DEVICE_NAME, OwnDevice},
    files::{Existing, NewFile},
    groups::{GroupMember, MAX_GROUP_NAME, Role},
    link::{InvalidLinkCode, LINK_REQUEST_LIFETIME, LinkCode, LinkRequest, Linking},
    listen::Listener,
    log::{ConversationId, DeliveryState, Entry, EntryId, Event},
    moderation::GroupBan,
    open::NewAccount,
    password::PasswordChanged,
    people::{Person, Standing},
    recovery::{InvalidRecoveryCode, RecoveryCheck, RecoveryCode, RecoveryStatus},
    requests::{ContactRequest, MAX_STRANGERS, Requests},
    send::{MAX_TEXT, SendOutcome, Sent},
};
use self::{state::State, store::StateStore};
use crate::{client::Client, error::Error, profile::Profile};

/// An account in use. Cheap to clone; all clones share one state. Other processes may use the same
/// profile.
#[derive(Clone)]
pub struct Messenger {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    profile: Profile,
    store: StateStore,
    /// Held while the inbox is read.
    reading: Mutex<()>,
    /// Whether the state was compared with the newest marker in the inbox.
    verified: AtomicBool,
    /// Held while the outbox is sent.
    flushing: Mutex<()>,
    /// Held while groups are changed.
    changing: Mutex<()>,
    /// Whether our KeyPackages on the server were counted since the profile was opened. KeyPackages
    /// also expire without being used.
    keys_checked: AtomicBool,
    /// Whether the server refused our newest KeyPackages.
    keys_refused: AtomicBool,
}

/// A conversation, as shown in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The conversation's id.
    pub id: ConversationId,
    /// A group or a direct conversation.
    pub kind: ConversationKind,
    /// The number of entries that were not marked as seen.
    pub unseen: usize,
    /// The time of the conversation's latest entry.
    pub last: Option<UnixMillis>,
}

/// The kind of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConversationKind {
    /// Between us and one other person.
    Direct {
        /// The other person.
        peer: Person,
    },
    /// A group.
    Group {
        /// The group's name.
        name: String,
        /// The person who created the group.
        creator: Person,
        /// The members who add and remove members and rename the group.
        admins: Vec<Person>,
        /// The number of members, including us.
        members: usize,
        /// Whether this account is a member.
        membership: Membership,
    },
}

/// Our membership in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Membership {
    /// We are a member.
    Member,
    /// We were removed: no message can be sent or read.
    Removed,
}

impl Messenger {
    /// Returns the profile of this messenger.
    pub fn profile(&self) -> &Profile {
        &self.shared.profile
    }

    /// Returns the client of this messenger, for other calls and to observe the connection.
    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    /// Returns whether the server refused the KeyPackages that were published last, so that others
    /// may be unable to start a conversation with us. The usual cause is a wrong clock on this
    /// machine, since KeyPackages state the time in which they are valid.
    pub fn are_keys_refused(&self) -> bool {
        self.shared.keys_refused.load(Ordering::Relaxed)
    }

    /// Returns the key of the profile's encrypted state, with which [`Messenger::unlock_with_key`]
    /// opens it. The key is as secret as the account.
    pub async fn vault_key(&self) -> VaultKey {
        self.shared.store.key().await
    }

    /// Returns every conversation, the one with the latest entry first.
    pub async fn conversations(&self) -> Result<Vec<Conversation>, Error> {
        let mut all = self.store().read(conversations).await?;
        all.sort_by_key(|conversation| std::cmp::Reverse(conversation.last));
        Ok(all)
    }

    /// Returns the members of a conversation, including this account.
    pub async fn members(&self, conversation: ConversationId) -> Result<Vec<Person>, Error> {
        self.store()
            .read(move |state| {
                let keys = match conversation {
                    ConversationId::Direct(peer) => vec![state.me(), peer],
                    ConversationId::Group(id) => {
                        let summary = state.mls.group(&id)?.ok_or(Error::NoSuchConversation)?;
                        summary.members.iter().map(|member| member.identity).collect()
                    }
                };
                keys.iter().map(|key| Ok(state.people.person(key)?)).collect()
            })
            .await
    }

    /// Returns the last `limit` entries of a conversation, oldest first.
    pub async fn history(
        &self,
        conversation: ConversationId,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        self.store().read(move |state| shown(state, state.log.last_of(&conversation, limit)?)).await
    }

    /// Returns the entries that were not marked as seen, oldest first. Sends nothing to the server.
    pub async fn unseen(&self) -> Result<Vec<Entry>, Error> {
        self.unseen_after(None, usize::MAX).await
    }

    /// Returns up to `limit` entries after `after` that were not marked as seen, oldest first.
    pub async fn unseen_after(
        &self,
        after: Option<EntryId>,
        limit: usize,
    ) -> Result<Vec<Entry>, Error> {
        self.store().read(move |state| shown(state, state.log.unseen(after, limit)?)).await
    }

    /// Notes that entries were shown to the person. They are not returned again.
    pub async fn mark_seen(&self, entries: &[EntryId]) -> Result<(), Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let entries = entries.to_vec();
        self.store().change(move |state| Ok(state.log.mark_seen(&entries)?)).await
    }

    fn store(&self) -> &StateStore {
        &self.shared.store
    }
}

impl fmt::Debug for Messenger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messenger").field("profile", &self.shared.profile).finish_non_exhaustive()
    }
}

/// Returns the time of the system's clock.
fn now() -> UnixMillis {
    SystemClock.now()
}

/// Returns entries with the names of their people.
fn shown(state: &State, entries: Vec<Entry<IdentityKey>>) -> Result<Vec<Entry>, Error> {
    entries
        .into_iter()
        .map(|Entry { id, conversation, at, event }| {
            let event = event.try_map(|identity| state.people.person(identity))?;
            Ok(Entry { id, conversation, at, event })
        })
        .collect()
}

fn conversations(state: &State) -> Result<Vec<Conversation>, Error> {
    let me = state.me();
    let mut kinds = BTreeMap::new();
    for summary in state.mls.groups()? {
        kinds.insert(ConversationId::of(&summary, &me), kind(state, summary)?);
    }
    let last: BTreeMap<_, _> = state.log.conversations()?.into_iter().collect();
    // Direct conversations that have a history and no group.
    for id in last.keys() {
        if let ConversationId::Direct(peer) = id
            && !kinds.contains_key(id)
        {
            kinds.insert(*id, ConversationKind::Direct { peer: state.people.person(peer)? });
        }
    }
    kinds
        .into_iter()
        .map(|(id, kind)| {
            let unseen = state.log.count_unseen(&id)?;
            Ok(Conversation { id, kind, unseen, last: last.get(&id).copied() })
        })
        .collect()
}

fn kind(state: &State, summary: GroupSummary) -> Result<ConversationKind, Error> {
    Ok(match (ConversationId::of(&summary, &state.me()), summary.kind) {
        (ConversationId::Group(_), GroupKind::Group { name }) => ConversationKind::Group {
            name,
            creator: state.people.person(&summary.creator)?,
            admins: summary
                .admins
                .iter()
                .map(|admin| Ok(state.people.person(admin)?))
                .collect::<Result<_, Error>>()?,
            members: summary.members.len(),
            membership: if summary.active { Membership::Member } else { Membership::Removed },
        },
        (ConversationId::Direct(peer), _) => {
            ConversationKind::Direct { peer: state.people.person(&peer)? }
        }
        (ConversationId::Group(_), GroupKind::Direct { .. }) => {
            unreachable!("a direct group is not a group conversation")
        }
    })
}
