//! The effect of received messages on a group.

use openmls::{
    framing::errors::MessageDecryptionError,
    group::{
        ProcessMessageError, ProposalValidationError, StageCommitError, StagedCommit,
        ValidationError,
    },
    prelude::{
        ContentType, Credential, KeyPackageVerifyError, LeafNodeIndex, ProcessedMessage,
        ProcessedMessageContent, ProtocolMessage, Sender,
    },
    treesync::errors::LeafNodeValidationError,
};

use super::{
    Departed, Group, Removal,
    rules::{self, Accepted, Before, Committer},
};
use crate::{
    content::{Content, MessageContent},
    identity::Member,
    leaf::MemberDevice,
    received::{GroupChange, Ignored, Lost},
};

/// The effect of one message on a group.
#[derive(Debug)]
pub(crate) enum MessageEffect {
    Message {
        sender: Member,
        content: Content,
    },
    Asked {
        sender: Member,
        digests: Vec<[u8; 32]>,
    },
    Leaving {
        sender: Member,
    },
    Committed {
        by: Member,
        changes: Vec<GroupChange>,
    },
    Lost(Lost),
    /// A message of a removed member that arrived after the removal.
    TooLate {
        sender: Member,
    },
    Ignored(Ignored),
}

impl Group {
    /// Processes a message of this group that is not of a future epoch.
    pub(crate) fn process(&mut self, message: ProtocolMessage) -> MessageEffect {
        if !self.is_active() {
            return MessageEffect::Ignored(Ignored::NoLongerMember);
        }
        let (epoch, content_type) = (message.epoch().as_u64(), message.content_type());
        if epoch < self.joined_at {
            return MessageEffect::Ignored(Ignored::BeforeJoining);
        }
        if content_type != ContentType::Application && epoch < self.epoch() {
            // Each epoch has one commit, and another was applied.
            return MessageEffect::Ignored(Ignored::OldCommit);
        }
        let processed = match self.mls.process_message(&self.store, message) {
            Ok(processed) => processed,
            Err(error) => return unreadable(&error),
        };
        self.apply(processed).unwrap_or_else(MessageEffect::Ignored)
    }

    fn apply(&mut self, processed: ProcessedMessage) -> Result<MessageEffect, Ignored> {
        let epoch = processed.epoch().as_u64();
        let sender = processed.sender().clone();
        let credential = processed.credential().clone();
        match (processed.into_content(), sender) {
            (ProcessedMessageContent::ApplicationMessage(message), Sender::Member(leaf)) => {
                self.application_message(leaf, epoch, &credential, &message.into_bytes())
            }
            (ProcessedMessageContent::StagedCommitMessage(commit), Sender::Member(leaf)) => {
                self.merge(Committer::Member(leaf), *commit)
            }
            (ProcessedMessageContent::StagedCommitMessage(commit), Sender::NewMemberCommit) => {
                self.merge(Committer::Joiner, *commit)
            }
            (ProcessedMessageContent::OwnPrivateMessage, _) => Err(Ignored::OwnMessage),
            (_, Sender::Member(_)) => Err(Ignored::NotAllowed),
            _ => Err(Ignored::Invalid),
        }
    }

    fn application_message(
        &self,
        leaf: LeafNodeIndex,
        epoch: u64,
        credential: &Credential,
        bytes: &[u8],
    ) -> Result<MessageEffect, Ignored> {
        let departed = self.departed_as(leaf, epoch);
        let has_departed = departed.is_some();
        let is_late = departed.is_some_and(|departed| departed.removal == Removal::Closed);
        let sender = self
            .sender(leaf, epoch)
            .filter(|member| {
                let claimed = MemberDevice::read(member.identity.as_bytes(), credential);
                claimed.is_some_and(|claimed| claimed.member == *member)
            })
            .ok_or(Ignored::Invalid)?;
        match MessageContent::decode(bytes).ok_or(Ignored::UnknownContent)? {
            MessageContent::Leaving if has_departed => Err(Ignored::AlreadyLeft),
            _ if is_late => Ok(MessageEffect::TooLate { sender }),
            MessageContent::Text(content) => Ok(MessageEffect::Message { sender, content }),
            MessageContent::CouldNotRead(digests) => Ok(MessageEffect::Asked { sender, digests }),
            MessageContent::Leaving => Ok(MessageEffect::Leaving { sender }),
        }
    }

    fn merge(
        &mut self,
        committer: Committer,
        commit: StagedCommit,
    ) -> Result<MessageEffect, Ignored> {
        let leaves = self.leaves();
        let before = Before { id: &self.id, profile: &self.profile, leaves: &leaves };
        let accepted = rules::judge(&before, committer, &commit)?;
        let removal = match committer {
            Committer::Member(_) => Removal::Closed,
            Committer::Joiner => Removal::Replaced,
        };
        // A commit of ours for the same epoch is dropped.
        self.discard_commit().map_err(|_| Ignored::Invalid)?;
        let last_epoch = self.epoch();
        self.mls.merge_staged_commit(&self.store, commit).map_err(|_| Ignored::Invalid)?;
        Ok(self.applied(accepted, last_epoch, removal))
    }

    /// Notes an accepted commit that openmls has applied.
    pub(super) fn applied(
        &mut self,
        accepted: Accepted,
        last_epoch: u64,
        removal: Removal,
    ) -> MessageEffect {
        let Accepted { by, changes, removed, profile } = accepted;
        for earlier in &mut self.departed {
            let identity = earlier.member.identity;
            if earlier.removal == Removal::Replaced
                && removed.iter().any(|(_, device)| device.member.identity == identity)
            {
                earlier.removal = removal;
            }
        }
        self.departed.extend(removed.into_iter().map(|(leaf, device)| Departed {
            leaf: leaf.u32(),
            last_epoch,
            member: device.member,
            removal,
        }));
        self.forget_departed();
        if let Some(profile) = profile {
            self.profile = profile;
        }
        MessageEffect::Committed { by, changes }
    }
}

pub(super) fn unreadable<E>(error: &ProcessMessageError<E>) -> MessageEffect {
    use LeafNodeValidationError::Lifetime;
    use MessageDecryptionError::{AeadError, SecretTreeError};
    use ProposalValidationError::LeafNodeValidation;
    let validation = match error {
        ProcessMessageError::ValidationError(validation) => validation,
        ProcessMessageError::InvalidCommit(StageCommitError::ProposalValidationError(
            LeafNodeValidation(Lifetime(_)),
        )) => return MessageEffect::Ignored(Ignored::LifetimeOver),
        _ => return MessageEffect::Ignored(Ignored::Invalid),
    };
    match validation {
        ValidationError::KeyPackageVerifyError(KeyPackageVerifyError::LifetimeError(_)) => {
            MessageEffect::Ignored(Ignored::LifetimeOver)
        }
        // The keys were used or deleted, or are too far ahead. These cases need no distinction: a
        // message that was processed before is recognized by its digest.
        ValidationError::UnableToDecrypt(SecretTreeError(_)) => MessageEffect::Lost(Lost::NoKeys),
        ValidationError::UnableToDecrypt(AeadError) => MessageEffect::Lost(Lost::Undecryptable),
        ValidationError::NoPastEpochData => MessageEffect::Lost(Lost::NoKeys),
        _ => MessageEffect::Ignored(Ignored::Invalid),
    }
}
