//! Finds the group of a name or an id on the command line.

use qpq_client::{Conversation, ConversationId, ConversationKind};

use crate::{
    error::{CliError, Exit},
    text,
};

/// The minimum number of digits by which a group's id can be given.
pub(crate) const MIN_ID_DIGITS: usize = 6;

/// Returns the group of this name or id, and its name. Any account can create a group of any name
/// and add us, so a name that several groups have is refused.
pub(crate) fn find(
    conversations: &[Conversation],
    name_or_id: &str,
) -> Result<(ConversationId, String), CliError> {
    let found = matching(conversations, name_or_id);
    match &found[..] {
        [(id, name)] => Ok((*id, (*name).to_owned())),
        [] => Err(CliError::new(
            Exit::Failure,
            "client.no_such_group",
            format_args!("you are in no group {}", text::line(name_or_id)),
        )
        .hint("see `qpq group list`")),
        several => {
            let ids: Vec<_> =
                several.iter().map(|(id, _)| format!("{:.12}", id.to_string())).collect();
            let message =
                format!("several groups are called {}: {}", text::line(name_or_id), ids.join(", "));
            Err(CliError::new(Exit::Failure, "client.ambiguous_group", message)
                .hint("give the id instead of the name"))
        }
    }
}

/// Returns every group of this name, or whose id begins with the text.
pub(crate) fn matching<'a>(
    conversations: &'a [Conversation],
    name_or_id: &str,
) -> Vec<(ConversationId, &'a str)> {
    let is_id =
        name_or_id.len() >= MIN_ID_DIGITS && name_or_id.bytes().all(|b| b.is_ascii_hexdigit());
    let id_start = name_or_id.to_ascii_lowercase();
    conversations
        .iter()
        .filter_map(|conversation| match &conversation.kind {
            ConversationKind::Group { name, .. } => Some((conversation.id, name.as_str())),
            ConversationKind::Direct { .. } => None,
        })
        .filter(|(id, name)| *name == name_or_id || is_id && id.to_string().starts_with(&id_start))
        .collect()
}

#[cfg(test)]
mod tests {
    use qpq_client::{GroupId, IdentityKey, Membership, Person, Standing, Username};

    use super::*;

    fn group(byte: u8, name: &str) -> Conversation {
        let identity = IdentityKey::new([9; 32]);
        let creator = Person {
            identity,
            username: Username::parse("eve").unwrap(),
            standing: Standing::Confirmed,
        };
        Conversation {
            id: ConversationId::Group(GroupId::try_from(&[byte; 32][..]).unwrap()),
            kind: ConversationKind::Group {
                name: name.into(),
                admins: vec![creator.clone()],
                creator,
                members: 2,
                membership: Membership::Member,
            },
            unseen: 0,
            last: None,
        }
    }

    #[test]
    fn a_group_is_found_by_name_or_id_and_never_guessed() {
        let groups = [
            group(0xaa, "friends"),
            group(0xbb, "work"),
            group(0xcc, "work"),
            group(0xdd, "aaaaaa"),
        ];
        assert_eq!(find(&groups, "friends").unwrap().0, groups[0].id);
        assert_eq!(find(&groups, "CCCCCCC").unwrap(), (groups[2].id, "work".into()));
        assert_eq!(find(&groups, "work").unwrap_err().code, "client.ambiguous_group");
        assert_eq!(
            find(&groups, "aaaaaa").unwrap_err().code,
            "client.ambiguous_group",
            "an id and a name"
        );
        assert_eq!(find(&groups, "aa").unwrap_err().code, "client.no_such_group");
        assert_eq!(find(&groups, "Friends").unwrap_err().code, "client.no_such_group");
    }
}
