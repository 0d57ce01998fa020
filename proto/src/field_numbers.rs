//! Tests that pin the encoding of the areas that the original server documents (auth, delivery,
//! moderation). Messages with known values are compared with bytes that are written by hand,
//! without prost. A change of a field's number or type fails here.

use std::fmt::Debug;

use bytes::Bytes;
use prost::Message;

use crate::v1::*;

/// Returns an encoded field of wire type 2 with less than 128 bytes.
fn data(number: u8, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    let len = u8::try_from(value.len()).expect("short");
    assert!(number < 16 && len < 128, "one byte each");
    [&[number << 3 | 2, len], value].concat()
}

/// Returns an encoded field of wire type 0 with a value below 128.
fn number(number: u8, value: u8) -> Vec<u8> {
    assert!(number < 16 && value < 128, "one byte each");
    vec![number << 3, value]
}

fn b(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

/// Checks that the message encodes to these fields in this order, and decodes from them.
#[track_caller]
fn assert_encoding<M: Message + Default + PartialEq + Debug>(message: M, fields: &[Vec<u8>]) {
    let bytes = fields.concat();
    assert_eq!(message.encode_to_vec(), bytes);
    assert_eq!(M::decode(bytes.as_slice()), Ok(message));
}

#[test]
fn field_numbers_of_auth_messages_are_stable() {
    assert_encoding(
        OpaqueRegisterStartRequest { username: "u".into(), request: b("r") },
        &[data(1, "u"), data(2, "r")],
    );
    assert_encoding(OpaqueRegisterStartResponse { response: b("r") }, &[data(1, "r")]);
    assert_encoding(
        OpaqueRegisterFinishRequest {
            username: "u".into(),
            upload: b("up"),
            identity_key: b("ik"),
            identity_proof: b("ip"),
            invite: "inv".into(),
        },
        &[data(1, "u"), data(2, "up"), data(3, "ik"), data(4, "ip"), data(5, "inv")],
    );
    assert_encoding(OpaqueRegisterFinishResponse { success: true }, &[number(1, 1)]);
    assert_encoding(
        OpaqueLoginStartRequest { username: "u".into(), request: b("r") },
        &[data(1, "u"), data(2, "r")],
    );
    assert_encoding(OpaqueLoginStartResponse { response: b("r") }, &[data(1, "r")]);
    assert_encoding(
        OpaqueLoginFinishRequest {
            username: "u".into(),
            finalization: b("f"),
            identity_key: b("ik"),
            device_id: b("d"),
        },
        &[data(1, "u"), data(2, "f"), data(3, "ik"), data(4, "d")],
    );
    assert_encoding(
        OpaqueLoginFinishResponse { session_token: b("t"), expires_at: 9 },
        &[data(1, "t"), number(2, 9)],
    );
    assert_encoding(
        LogoutRequest { all_sessions: true, session_token: b("t") },
        &[number(1, 1), data(15, "t")],
    );
    assert_encoding(LogoutResponse { revoked: 2 }, &[number(1, 2)]);
    assert_encoding(
        ChangePasswordRequest { upload: b("up"), session_token: b("t") },
        &[data(1, "up"), data(15, "t")],
    );
    assert_encoding(ChangePasswordResponse { revoked: 2 }, &[number(1, 2)]);
}

#[test]
fn field_numbers_of_send_messages_are_stable() {
    let request = EnqueueRequest {
        recipient_key: b("rk"),
        payload: b("p"),
        channel_id: b("c"),
        ttl_secs: 4,
        message_id: b("m"),
        session_token: b("t"),
    };
    let fields =
        [data(1, "rk"), data(2, "p"), data(3, "c"), number(4, 4), data(5, "m"), data(15, "t")];
    assert_encoding(request.clone(), &fields);
    assert_encoding(
        EnqueueResponse { seq: 1, delivery_proof: b("dp"), duplicate: true },
        &[number(1, 1), data(2, "dp"), number(3, 1)],
    );
    assert_encoding(
        BatchEnqueueRequest {
            recipient_keys: vec![b("r1"), b("r2")],
            payload: b("p"),
            channel_id: b("c"),
            ttl_secs: 4,
            message_id: b("m"),
            messages: vec![request],
            expected_epoch: 7,
            commit: true,
            group_info: b("gi"),
            to_members: true,
            session_token: b("t"),
        },
        &[
            data(1, "r1"),
            data(1, "r2"),
            data(2, "p"),
            data(3, "c"),
            number(4, 4),
            data(5, "m"),
            data(6, fields.concat()),
            number(7, 7),
            number(8, 1),
            data(9, "gi"),
            number(10, 1),
            data(15, "t"),
        ],
    );
    let result = BatchResult {
        seq: 1,
        status: 3,
        code: "x".into(),
        delivery_proof: b("dp"),
        duplicate: true,
    };
    let result_fields = [number(1, 1), number(2, 3), data(3, "x"), data(4, "dp"), number(5, 1)];
    assert_encoding(
        BatchEnqueueResponse { seqs: vec![1, 2], results: vec![result], epoch: 8 },
        &[data(1, [1, 2]), data(2, result_fields.concat()), number(3, 8)],
    );
    assert_encoding(
        SubscribeRequest { all_channels: true, session_token: b("t") },
        &[number(1, 1), data(15, "t")],
    );
    assert_encoding(SubscribeResponse { success: true }, &[number(1, 1)]);
}

#[test]
fn field_numbers_of_read_requests_are_stable() {
    assert_encoding(
        FetchRequest {
            recipient_key: b("rk"),
            channel_id: b("c"),
            limit: 3,
            device_id: b("d"),
            all_channels: true,
            session_token: b("t"),
        },
        &[data(1, "rk"), data(2, "c"), number(3, 3), data(4, "d"), number(5, 1), data(15, "t")],
    );
    assert_encoding(
        FetchWaitRequest {
            recipient_key: b("rk"),
            channel_id: b("c"),
            timeout_ms: 3,
            limit: 4,
            device_id: b("d"),
            all_channels: true,
            session_token: b("t"),
        },
        &[
            data(1, "rk"),
            data(2, "c"),
            number(3, 3),
            number(4, 4),
            data(5, "d"),
            number(6, 1),
            data(15, "t"),
        ],
    );
    assert_encoding(
        PeekRequest {
            recipient_key: b("rk"),
            channel_id: b("c"),
            limit: 3,
            device_id: b("d"),
            all_channels: true,
            after_seq: 6,
            session_token: b("t"),
        },
        &[
            data(1, "rk"),
            data(2, "c"),
            number(3, 3),
            data(4, "d"),
            number(5, 1),
            number(6, 6),
            data(15, "t"),
        ],
    );
    assert_encoding(
        AckRequest {
            recipient_key: b("rk"),
            channel_id: b("c"),
            seq_up_to: 3,
            device_id: b("d"),
            seqs: vec![5, 6],
            all_channels: true,
            session_token: b("t"),
        },
        &[
            data(1, "rk"),
            data(2, "c"),
            number(3, 3),
            data(4, "d"),
            data(5, [5, 6]),
            number(6, 1),
            data(15, "t"),
        ],
    );
    assert_encoding(AckResponse { removed: 1 }, &[number(1, 1)]);
}

#[test]
fn field_numbers_of_read_responses_are_stable() {
    let envelope =
        Envelope { seq: 1, data: b("d"), channel_id: b("c"), enqueued_at: 4, origin: "o".into() };
    let fields = [
        data(1, [number(1, 1), data(2, "d"), data(3, "c"), number(4, 4), data(5, "o")].concat()),
        number(2, 1),
        data(3, "s"),
    ];
    let payloads = vec![envelope];
    assert_encoding(
        FetchResponse { payloads: payloads.clone(), more: true, store_id: b("s") },
        &fields,
    );
    assert_encoding(
        FetchWaitResponse { payloads: payloads.clone(), more: true, store_id: b("s") },
        &fields,
    );
    assert_encoding(PeekResponse { payloads, more: true, store_id: b("s") }, &fields);
}

#[test]
fn field_numbers_of_moderation_messages_are_stable() {
    assert_encoding(
        ReportMessageRequest {
            encrypted_report: b("er"),
            conversation_id: b("ci"),
            session_token: b("t"),
        },
        &[data(1, "er"), data(2, "ci"), data(15, "t")],
    );
    assert_encoding(
        BanUserRequest {
            identity_key: b("ik"),
            reason: "r".into(),
            duration_secs: 3,
            channel_id: b("c"),
            session_token: b("t"),
        },
        &[data(1, "ik"), data(2, "r"), number(3, 3), data(4, "c"), data(15, "t")],
    );
    assert_encoding(
        UnbanUserRequest { identity_key: b("ik"), channel_id: b("c"), session_token: b("t") },
        &[data(1, "ik"), data(2, "c"), data(15, "t")],
    );
    let report = ReportEntry {
        id: 1,
        encrypted_report: b("er"),
        conversation_id: b("ci"),
        reporter_identity: b("ri"),
        timestamp: 5,
    };
    let report_fields = [number(1, 1), data(2, "er"), data(3, "ci"), data(4, "ri"), number(5, 5)];
    assert_encoding(
        ListReportsResponse { reports: vec![report] },
        &[data(1, report_fields.concat())],
    );
    let banned =
        BannedUserEntry { identity_key: b("ik"), reason: "r".into(), banned_at: 3, expires_at: 4 };
    let banned_fields = [data(1, "ik"), data(2, "r"), number(3, 3), number(4, 4)];
    assert_encoding(ListBannedResponse { users: vec![banned] }, &[data(1, banned_fields.concat())]);
}

#[test]
fn field_numbers_of_block_messages_are_stable() {
    assert_encoding(
        BlockUserRequest { identity_key: b("ik"), unblock: true, session_token: b("t") },
        &[data(1, "ik"), number(2, 1), data(15, "t")],
    );
    assert_encoding(BlockUserResponse { success: true }, &[number(1, 1)]);
    assert_encoding(
        ListBlockedResponse { identity_keys: vec![b("k1"), b("k2")] },
        &[data(1, "k1"), data(1, "k2")],
    );
}

#[test]
fn field_numbers_of_error_details_and_health_are_stable() {
    assert_encoding(
        ErrorDetail {
            code: "c".into(),
            message: "m".into(),
            retry_after_ms: 3,
            field: "f".into(),
            epoch: 5,
        },
        &[data(1, "c"), data(2, "m"), number(3, 3), data(4, "f"), number(5, 5)],
    );
    assert_encoding(
        HealthResponse {
            status: "ok".into(),
            uptime_secs: 2,
            version: "v".into(),
            server_key: b("k"),
            domain: "d".into(),
            store_id: b("s"),
        },
        &[data(1, "ok"), number(2, 2), data(3, "v"), data(4, "k"), data(5, "d"), data(6, "s")],
    );
}

#[test]
fn debug_output_redacts_secrets() {
    let login = OpaqueLoginFinishResponse { session_token: b("hunter2"), expires_at: 9 };
    assert_eq!(
        format!("{login:?}"),
        "OpaqueLoginFinishResponse { session_token: redacted, expires_at: 9 }"
    );
    let request = ListDevicesRequest { session_token: Bytes::new() };
    assert_eq!(format!("{request:?}"), "ListDevicesRequest { session_token: unset }");
    let push = RegisterPushTokenRequest { token: "hunter2".into(), ..Default::default() };
    assert!(!format!("{push:?}").contains("hunter2"));
}
