//! The result of mls-rs for a message, as a line that a test can compare.

use std::collections::BTreeMap;

use mls_rs::group::{CommitEffect, CommitMessageDescription, NewEpoch, proposal::Proposal};

use super::profile::{Content, Leaf};

/// The leaves of a group by their places.
pub(crate) type Leaves = BTreeMap<u32, Leaf>;

/// An application message: its sender, and what it says.
pub(crate) fn of_content(from: &str, content: Content) -> String {
    match content {
        Content::Text(text) => {
            assert_eq!(text.id.len(), 16);
            let again = if text.repeats.is_some() { " again" } else { "" };
            format!("{from}{again}: {}", text.text)
        }
        Content::Control(control) if control.leaving => format!("{from} leaves"),
        Content::Control(_) => format!("{from} could not read"),
    }
}

/// A commit: its author, and what it changes.
pub(crate) fn of_commit(before: &Leaves, commit: &CommitMessageDescription) -> String {
    let (epoch, is_removed) = match &commit.effect {
        CommitEffect::NewEpoch(epoch) => (epoch, false),
        CommitEffect::Removed { new_epoch, .. } => (new_epoch, true),
        CommitEffect::ReInit(_) => panic!("the profile has no ReInit"),
    };
    let mut line = match before.get(&commit.committer) {
        Some(by) if !commit.is_external => format!("{} commits", by.username),
        _ => "a device joins".into(),
    };
    for change in changes(before, epoch) {
        line = format!("{line} {change}");
    }
    if is_removed { format!("{line} (us)") } else { line }
}

fn changes(before: &Leaves, epoch: &NewEpoch) -> Vec<String> {
    epoch
        .applied_proposals()
        .iter()
        .filter_map(|applied| match &applied.proposal {
            Proposal::Add(add) => {
                let leaf = Leaf::read(add.signing_identity()).expect("it was judged");
                Some(format!("+{}", leaf.username))
            }
            Proposal::Remove(remove) => Some(format!("-{}", before[&remove.to_remove()].username)),
            Proposal::GroupContextExtensions(_) => Some("profile".into()),
            Proposal::ExternalInit(_) => None,
            other => panic!("unexpected: {other:?}"),
        })
        .collect()
}
