//! The columns of each table that are transferred. The first ones are the key, which orders the
//! rows.

use super::{Column, ColumnType};

pub(super) const ACCOUNT: &[Column] = &[
    number("id"),
    text("username"),
    bytes("identity"),
    bytes("opaque_record"),
    number("created_at"),
];

pub(super) const SESSION: &[Column] = &[
    bytes("token"),
    number("account"),
    bytes("device"),
    number("authenticated_at"),
    number("last_used_at"),
    number("expires_at"),
];

pub(super) const INBOX: &[Column] =
    &[number("id"), number("last_seq"), number("messages"), number("bytes"), number("next_expiry")];

pub(super) const MESSAGE: &[Column] = &[
    number("id"),
    number("inbox"),
    number("seq"),
    number("expires_at"),
    number("enqueued_at"),
    bytes("channel"),
    bytes("sender"),
    bytes("message_id"),
    bytes("payload_sha256"),
    bytes("payload"),
];

pub(super) const RECENT_ID: &[Column] = &[
    number("inbox"),
    bytes("sender"),
    bytes("message_id"),
    number("seq"),
    bytes("channel"),
    bytes("payload_sha256"),
    number("enqueued_at"),
    number("forget_at"),
];

pub(super) const KEY_PACKAGE: &[Column] = &[
    number("id"),
    number("owner"),
    bytes("fingerprint"),
    number("last_resort"),
    number("not_after"),
    bytes("bytes"),
    number("not_before"),
    bytes("device"),
];

pub(super) const KEY_PACKAGE_TAKEN: &[Column] =
    &[number("owner"), bytes("fingerprint"), number("not_after")];

pub(super) const HYBRID_KEY: &[Column] = &[number("owner"), bytes("key"), bytes("signature")];

pub(super) const DEVICE: &[Column] = &[
    number("id"),
    number("account"),
    bytes("device"),
    text("name"),
    bytes("key"),
    bytes("proof"),
    number("registered_at"),
    number("last_seen_at"),
    number("upto"),
    number("position_lost"),
];

pub(super) const DEVICE_COMPLETED: &[Column] = &[number("inbox"), number("seq"), bytes("device")];

pub(super) const DEVICE_KEY: &[Column] = &[bytes("key"), number("account"), bytes("device")];

pub(super) const GROUP: &[Column] = &[
    bytes("id"),
    bytes("pair"),
    text("name"),
    text("description"),
    bytes("settings"),
    number("version"),
    number("epoch"),
    bytes("group_info"),
    number("created_at"),
];

pub(super) const GROUP_MEMBER: &[Column] =
    &[number("id"), bytes("group_id"), number("account"), number("role"), number("joined_at")];

pub(super) const GROUP_COMMIT: &[Column] = &[
    bytes("group_id"),
    number("account"),
    bytes("message_id"),
    number("epoch"),
    number("committed_at"),
    bytes("outcome"),
];

pub(super) const BAN: &[Column] =
    &[number("account"), text("reason"), number("banned_at"), number("expires_at")];

pub(super) const GROUP_BAN: &[Column] = &[
    bytes("group_id"),
    number("account"),
    text("reason"),
    number("banned_at"),
    number("expires_at"),
];

pub(super) const REPORT: &[Column] = &[
    number("id"),
    number("reporter"),
    bytes("digest"),
    bytes("conversation_id"),
    bytes("encrypted_report"),
    number("reported_at"),
];

pub(super) const BLOCK: &[Column] = &[number("account"), bytes("blocked"), number("blocked_at")];

pub(super) const AUDIT: &[Column] = &[
    number("id"),
    number("at"),
    bytes("actor"),
    text("action"),
    bytes("subject"),
    bytes("group_id"),
    text("reason"),
];

pub(super) const JOB: &[Column] = &[
    number("id"),
    text("kind"),
    bytes("key"),
    bytes("payload"),
    number("run_at"),
    number("attempts"),
    number("died_at"),
    text("last_error"),
];

pub(super) const INVITE: &[Column] = &[
    bytes("code"),
    number("uses"),
    number("uses_left"),
    text("username"),
    text("note"),
    number("created_at"),
    number("expires_at"),
];
pub(super) const ERASURE: &[Column] =
    &[bytes("id"), number("account"), bytes("identity"), number("deleted_at")];

pub(super) const TOMBSTONE: &[Column] = &[bytes("hash"), number("until")];
pub(super) const RECOVERY_BUNDLE: &[Column] = &[
    number("account"),
    number("version"),
    bytes("bundle"),
    bytes("key_id"),
    number("stored_at"),
    number("counted_from"),
    number("fetches"),
];

const fn number(name: &'static str) -> Column {
    Column { name, kind: ColumnType::Number }
}

const fn text(name: &'static str) -> Column {
    Column { name, kind: ColumnType::Text }
}

const fn bytes(name: &'static str) -> Column {
    Column { name, kind: ColumnType::Bytes }
}
