//! The method table: **one row is one RPC**. Server, client, metrics and `docs/rpc.md` are
//! generated from it.
//!
//! Each row generates an uninhabited type that implements [`Method`], so that calls are typed on
//! both sides, and an entry of [`METHODS`]. A row marked `served` is also in the list that
//! [`for_each_served_method!`](crate::for_each_served_method) passes to `qpq-rpc`, where a method
//! without a handler does not compile. A row marked `later` has messages but no handler; the server
//! returns `UnknownMethod`.

use prost::Message;

use crate::{
    auth::{self, Auth, AuthKind},
    deadlines::{self, Deadline, DeadlineClass},
    limits::LimitClass,
    retry::{self, Retry, RetryPolicy},
    v1,
};

/// An RPC as a type without values.
pub trait Method: 'static {
    /// The row of the table.
    const INFO: MethodInfo;
    /// The required authentication.
    type Auth: Auth;
    /// The class of the time limit.
    type Deadline: Deadline<Self::Request>;
    /// The retry policy.
    type Retry: Retry<Self::Request>;
    /// The request message.
    type Request: Message + Default + Clone + 'static;
    /// The response message.
    type Response: Message + Default + Clone + 'static;
}

/// An RPC as a value: its row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// The number in the request frame.
    pub id: u16,
    /// The name in documents, logs and metrics.
    pub name: &'static str,
    /// The description, one sentence.
    pub doc: &'static str,
    /// The name of the request message in package `qpq.v1`.
    pub request: &'static str,
    /// The name of the response message in package `qpq.v1`.
    pub response: &'static str,
    /// The required authentication.
    pub auth: AuthKind,
    /// The rate-limit class.
    pub limit: LimitClass,
    /// The class of the time limit.
    pub deadline: DeadlineClass,
    /// The largest payload of a request.
    pub largest_request: RequestSize,
    /// Whether a client may repeat a call whose outcome is unknown.
    pub retry: RetryPolicy,
    /// Whether this server has a handler.
    pub served: bool,
}

/// The largest request payload of a method, checked from the frame header before memory is
/// allocated.
///
/// The protocol allows this size; a server's configuration may allow less (the payload of a
/// message, a KeyPackage).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestSize {
    /// Keys, names, tokens and ids.
    Small,
    /// A list of up to 1 000 keys, or one encrypted report.
    Medium,
    /// A list of up to 10 000 seqs.
    List,
    /// One chunk of a blob.
    Chunk,
    /// Messages, packages and bundles: the maximum of a frame.
    Frame,
}

impl RequestSize {
    /// Returns the size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Small => 8 << 10,
            Self::Medium => 64 << 10,
            Self::List => 256 << 10,
            Self::Chunk => (1 << 20) + (8 << 10),
            Self::Frame => 4 << 20,
        }
    }

    /// Returns the size in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "8 KiB",
            Self::Medium => "64 KiB",
            Self::List => "256 KiB",
            Self::Chunk => "1032 KiB",
            Self::Frame => "4 MiB",
        }
    }
}

/// Returns the row of `id`, `None` for an unknown id.
pub fn by_id(id: u16) -> Option<&'static MethodInfo> {
    let row = METHODS.binary_search_by_key(&id, |method| method.id).ok()?;
    METHODS.get(row)
}

/// Fails at compile time if the ids are not unique and ascending.
const fn assert_ascending(methods: &[MethodInfo]) {
    let mut row = 1;
    while row < methods.len() {
        assert!(methods[row - 1].id < methods[row].id, "method ids must be unique and ascending");
        row += 1;
    }
}

macro_rules! methods {
    ($(
        #[doc = $doc:literal]
        $id:literal $name:ident($request:ident) -> $response:ident,
            $auth:ident, $limit:ident, $deadline:ident, $size:ident, $retry:ident, $state:ident;
    )+) => {
        $(
            #[doc = $doc]
            #[derive(Debug)]
            pub enum $name {}

            impl Method for $name {
                const INFO: MethodInfo = MethodInfo {
                    id: $id,
                    name: stringify!($name),
                    doc: $doc.trim_ascii(),
                    request: stringify!($request),
                    response: stringify!($response),
                    auth: <auth::$auth as Auth>::KIND,
                    limit: LimitClass::$limit,
                    deadline: <deadlines::$deadline as Deadline<v1::$request>>::CLASS,
                    largest_request: RequestSize::$size,
                    retry: <retry::$retry as Retry<v1::$request>>::POLICY,
                    served: is_served!($state),
                };
                type Auth = auth::$auth;
                type Deadline = deadlines::$deadline;
                type Retry = retry::$retry;
                type Request = v1::$request;
                type Response = v1::$response;
            }
        )+

        /// All rows, ordered by id.
        pub const METHODS: &[MethodInfo] = &[$(<$name as Method>::INFO),+];
        const _: () = assert_ascending(METHODS);

        served_methods! { [] $($name $state)+ }

        /// Calls `$callback!` with `(auth request)` of every row.
        #[cfg(test)]
        macro_rules! for_each_request {
            ($callback:ident) => { $callback! { $(($auth $request))+ } };
        }
        #[cfg(test)]
        pub(crate) use for_each_request;
    };
}

macro_rules! is_served {
    (served) => {
        true
    };
    (later) => {
        false
    };
}

/// Collects the names of the served rows.
macro_rules! served_methods {
    ([$($kept:ident)*] $name:ident served $($rest:tt)*) => {
        served_methods! { [$($kept)* $name] $($rest)* }
    };
    ([$($kept:ident)*] $name:ident later $($rest:tt)*) => {
        served_methods! { [$($kept)*] $($rest)* }
    };
    ([$($kept:ident)*]) => {
        /// Calls `$callback!` with the paths of all served methods, ordered by id and separated by
        /// spaces.
        #[macro_export]
        macro_rules! for_each_served_method {
            ($callback:ident) => { $callback! { $($crate::methods::$kept)* } };
        }
    };
}

// id name(request) -> response, authentication, limit class, deadline class, largest request, retry
// policy, served or later
methods! {
    /// Starts a registration: evaluates the blinded password with the server's key.
    100 OpaqueRegisterStart(OpaqueRegisterStartRequest) -> OpaqueRegisterStartResponse, Anonymous, Register, Standard, Small, Idempotent, served;
    /// Creates the account with username, OPAQUE record and identity key; never replaces one.
    101 OpaqueRegisterFinish(OpaqueRegisterFinishRequest) -> OpaqueRegisterFinishResponse, Anonymous, Register, Standard, Small, Idempotent, served;
    /// Starts a login; the response does not reveal whether the username exists.
    102 OpaqueLoginStart(OpaqueLoginStartRequest) -> OpaqueLoginStartResponse, Anonymous, Login, Standard, Small, Idempotent, served;
    /// Finishes a login and creates a session if the password is right.
    103 OpaqueLoginFinish(OpaqueLoginFinishRequest) -> OpaqueLoginFinishResponse, Anonymous, Login, Standard, Small, Once, served;
    /// Ends the session, or all sessions of the account.
    104 Logout(LogoutRequest) -> LogoutResponse, Session, Logout, Standard, Small, Idempotent, served;
    /// Replaces the caller's OPAQUE record and ends the account's other sessions.
    105 ChangePassword(ChangePasswordRequest) -> ChangePasswordResponse, Fresh, Account, Standard, Small, Once, served;

    /// Adds a message to a recipient's inbox; it is durable when the call returns.
    200 Enqueue(EnqueueRequest) -> EnqueueResponse, Session, Send, Standard, Frame, ById, served;
    /// Reads messages and removes them once the client has received the whole response.
    201 Fetch(FetchRequest) -> FetchResponse, Session, Receive, Standard, Small, Idempotent, served;
    /// Reads like Fetch, and waits for a message if there is none.
    202 FetchWait(FetchWaitRequest) -> FetchWaitResponse, Session, Receive, Wait, Small, Idempotent, served;
    /// Reads messages without removing them.
    203 Peek(PeekRequest) -> PeekResponse, Session, Receive, Standard, Small, Idempotent, served;
    /// Removes messages that were read.
    204 Ack(AckRequest) -> AckResponse, Session, Receive, Standard, List, Idempotent, served;
    /// Adds one message to many inboxes, or each of many messages to its inbox; may be a commit.
    205 BatchEnqueue(BatchEnqueueRequest) -> BatchEnqueueResponse, Session, Send, Standard, Frame, ById, served;
    /// Opens a stream of events on this connection.
    206 Subscribe(SubscribeRequest) -> SubscribeResponse, Session, Receive, Standard, Small, Idempotent, served;

    /// Stores KeyPackages for others to start conversations with.
    300 UploadKeyPackage(UploadKeyPackageRequest) -> UploadKeyPackageResponse, Session, KeyUpload, Standard, Frame, Idempotent, served;
    /// Returns and removes one KeyPackage of an account.
    301 FetchKeyPackage(FetchKeyPackageRequest) -> FetchKeyPackageResponse, Session, KeyFetch, Standard, Small, Idempotent, served;
    /// Stores the caller's X25519 and ML-KEM-768 public key.
    302 UploadHybridKey(UploadHybridKeyRequest) -> UploadHybridKeyResponse, Session, KeyUpload, Standard, Small, Idempotent, served;
    /// Reads the hybrid key of an account.
    303 FetchHybridKey(FetchHybridKeyRequest) -> FetchHybridKeyResponse, Session, Lookup, Standard, Small, Idempotent, served;
    /// Reads the hybrid keys of many accounts.
    304 FetchHybridKeys(FetchHybridKeysRequest) -> FetchHybridKeysResponse, Session, Lookup, Standard, Medium, Idempotent, served;
    /// Counts the caller's unused KeyPackages.
    305 CountKeyPackages(CountKeyPackagesRequest) -> CountKeyPackagesResponse, Session, Lookup, Standard, Small, Idempotent, served;

    /// Creates a channel of two, with the same id for both, or of many members.
    400 CreateChannel(CreateChannelRequest) -> CreateChannelResponse, Session, Channel, Standard, Medium, Idempotent, served;
    /// Removes a member, or the caller, from a channel.
    410 RemoveMember(RemoveMemberRequest) -> RemoveMemberResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Changes a channel's name, description or settings.
    411 UpdateGroupMetadata(UpdateGroupMetadataRequest) -> UpdateGroupMetadataResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Lists the members and metadata of a channel, in pages.
    412 ListGroupMembers(ListGroupMembersRequest) -> ListGroupMembersResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Asks every member's client to rotate its keys.
    413 RotateKeys(RotateKeysRequest) -> RotateKeysResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Adds members to a channel.
    414 AddMembers(AddMembersRequest) -> AddMembersResponse, Session, Channel, Standard, Medium, Idempotent, served;
    /// Returns the group info of a channel's last commit.
    415 FetchGroupInfo(FetchGroupInfoRequest) -> FetchGroupInfoResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Reports a message to the administrators.
    420 ReportMessage(ReportMessageRequest) -> ReportMessageResponse, Session, Report, Standard, Medium, Idempotent, served;
    /// Bans a user from the server or from a channel.
    421 BanUser(BanUserRequest) -> BanUserResponse, Moderator, Admin, Standard, Small, Idempotent, served;
    /// Ends a ban.
    422 UnbanUser(UnbanUserRequest) -> UnbanUserResponse, Moderator, Admin, Standard, Small, Idempotent, served;
    /// Lists the reports.
    423 ListReports(ListReportsRequest) -> ListReportsResponse, Admin, Admin, Standard, Small, Idempotent, served;
    /// Lists the bans in force.
    424 ListBanned(ListBannedRequest) -> ListBannedResponse, Moderator, Admin, Standard, Small, Idempotent, served;
    /// Blocks an account, from which the caller then receives nothing, or ends the block.
    425 BlockUser(BlockUserRequest) -> BlockUserResponse, Session, Channel, Standard, Small, Idempotent, served;
    /// Lists the accounts that the caller blocks.
    426 ListBlocked(ListBlockedRequest) -> ListBlockedResponse, Session, Lookup, Standard, Small, Idempotent, served;

    /// Returns the identity key of a username, of this or another server.
    500 ResolveUser(ResolveUserRequest) -> ResolveUserResponse, Session, Lookup, Standard, Small, Idempotent, served;
    /// Returns the account of an identity key.
    501 ResolveIdentity(ResolveIdentityRequest) -> ResolveIdentityResponse, Session, Lookup, Standard, Small, Idempotent, served;
    /// Revokes the caller's identity key permanently, in the public log.
    510 RevokeKey(RevokeKeyRequest) -> RevokeKeyResponse, Fresh, Log, Standard, Small, Idempotent, later;
    /// Returns a proof that a key is or is not revoked.
    511 CheckRevocation(CheckRevocationRequest) -> CheckRevocationResponse, Anonymous, Log, Standard, Small, Idempotent, later;
    /// Reads the public log of keys, with proofs.
    520 AuditKeyTransparency(AuditKeyTransparencyRequest) -> AuditKeyTransparencyResponse, Anonymous, Log, Standard, Small, Idempotent, later;

    /// Stores one chunk of a blob.
    600 UploadBlob(UploadBlobRequest) -> UploadBlobResponse, Session, Blob, Blob, Chunk, Idempotent, served;
    /// Reads one chunk of a blob.
    601 DownloadBlob(DownloadBlobRequest) -> DownloadBlobResponse, Session, Blob, Blob, Small, Idempotent, served;

    /// Registers a device, which reads the inbox at its own position from then on.
    700 RegisterDevice(RegisterDeviceRequest) -> RegisterDeviceResponse, Session, Device, Standard, Small, Idempotent, served;
    /// Lists the caller's devices.
    701 ListDevices(ListDevicesRequest) -> ListDevicesResponse, Session, Device, Standard, Small, Idempotent, served;
    /// Removes a device, its sessions and its reader of the inbox.
    702 RevokeDevice(RevokeDeviceRequest) -> RevokeDeviceResponse, Session, Device, Standard, Small, Idempotent, served;
    /// Stores or removes the push token of a device.
    710 RegisterPushToken(RegisterPushTokenRequest) -> RegisterPushTokenResponse, Session, Device, Standard, Small, Idempotent, later;
    /// Stores the bundle that restores the account after a loss.
    750 StoreRecoveryBundle(StoreRecoveryBundleRequest) -> StoreRecoveryBundleResponse, Session, Recovery, Standard, Frame, Idempotent, served;
    /// Reads the recovery bundle.
    751 FetchRecoveryBundle(FetchRecoveryBundleRequest) -> FetchRecoveryBundleResponse, Fresh, Recovery, Standard, Small, Idempotent, served;
    /// Removes the recovery bundle.
    752 DeleteRecoveryBundle(DeleteRecoveryBundleRequest) -> DeleteRecoveryBundleResponse, Fresh, Recovery, Standard, Small, Idempotent, served;

    /// Publishes the caller's direct endpoint for a limited time, or removes it.
    800 PublishEndpoint(PublishEndpointRequest) -> PublishEndpointResponse, Session, Endpoint, Standard, Medium, Idempotent, served;
    /// Returns the direct endpoint of an account.
    801 ResolveEndpoint(ResolveEndpointRequest) -> ResolveEndpointResponse, Session, Endpoint, Standard, Small, Idempotent, served;
    /// Returns the state of the server and the key that verifies its delivery proofs.
    802 Health(HealthRequest) -> HealthResponse, Anonymous, Health, Health, Small, Idempotent, served;

    /// Relays a message to a recipient on another server.
    900 RelayEnqueue(RelayEnqueueRequest) -> RelayEnqueueResponse, Peer, Federation, Standard, Frame, ById, later;
    /// Relays one message to many recipients on another server.
    901 RelayBatchEnqueue(RelayBatchEnqueueRequest) -> RelayBatchEnqueueResponse, Peer, Federation, Standard, Frame, ById, later;
    /// Returns and removes one KeyPackage of an account on another server.
    902 ProxyFetchKeyPackage(ProxyFetchKeyPackageRequest) -> ProxyFetchKeyPackageResponse, Peer, Federation, Standard, Small, Idempotent, later;
    /// Reads the hybrid key of an account on another server.
    903 ProxyFetchHybridKey(ProxyFetchHybridKeyRequest) -> ProxyFetchHybridKeyResponse, Peer, Federation, Standard, Small, Idempotent, later;
    /// Returns the identity key of a username on another server.
    904 ProxyResolveUser(ProxyResolveUserRequest) -> ProxyResolveUserResponse, Peer, Federation, Standard, Small, Idempotent, later;
    /// Returns the state of another server and the number of pending messages to it.
    905 FederationHealth(FederationHealthRequest) -> FederationHealthResponse, Peer, Federation, Standard, Small, Idempotent, later;

    /// Deletes the account and all its data permanently.
    950 DeleteAccount(DeleteAccountRequest) -> DeleteAccountResponse, Fresh, Account, Standard, Small, Idempotent, served;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids of the original server.
    const ORIGINAL: [u16; 49] = [
        100, 101, 102, 103, 200, 201, 202, 203, 204, 205, 300, 301, 302, 303, 304, 400, 410, 411,
        412, 413, 420, 421, 422, 423, 424, 500, 501, 510, 511, 520, 600, 601, 700, 701, 702, 710,
        750, 751, 752, 800, 801, 802, 900, 901, 902, 903, 904, 905, 950,
    ];
    /// The ids of the extensions of this server.
    const EXTENSIONS: [u16; 8] = [104, 105, 206, 305, 414, 415, 425, 426];

    fn ids(rows: impl Iterator<Item = &'static MethodInfo>) -> Vec<u16> {
        rows.map(|method| method.id).collect()
    }

    #[test]
    fn the_table_has_exactly_the_methods_of_the_protocol() {
        let mut expected = [ORIGINAL.as_slice(), &EXTENSIONS].concat();
        expected.sort_unstable();
        assert_eq!(ids(METHODS.iter()), expected);
    }

    #[test]
    fn no_request_is_larger_than_a_frame() {
        for method in METHODS {
            assert!(method.largest_request.bytes() <= RequestSize::Frame.bytes(), "{method:?}");
        }
    }

    #[test]
    fn the_callback_receives_exactly_the_served_rows() {
        macro_rules! served_ids {
            ($($method:path)*) => { [$(<$method as Method>::INFO.id),*] };
        }
        let passed = for_each_served_method!(served_ids);
        assert_eq!(ids(METHODS.iter().filter(|method| method.served)), passed);
    }

    #[test]
    fn only_ids_in_the_table_have_a_row() {
        let found: Vec<_> = (0..=u16::MAX).filter_map(by_id).collect();
        assert_eq!(found, METHODS.iter().collect::<Vec<_>>());
        assert_eq!(by_id(202).map(|method| method.name), Some("FetchWait"));
    }

    #[test]
    fn anonymous_methods_have_a_budget_per_address() {
        use crate::limits::LimitSubject;
        for method in METHODS.iter().filter(|method| method.auth == AuthKind::Anonymous) {
            let by_ip =
                method.limit.defaults().iter().any(|budget| budget.subject == LimitSubject::Ip);
            assert!(by_ip, "{} is not limited for anyone", method.name);
        }
    }

    #[test]
    fn the_description_of_a_row_is_one_sentence() {
        for method in METHODS {
            let doc = method.doc;
            assert!(
                doc.ends_with('.') && doc == doc.trim() && !doc.contains(". "),
                "{}: {doc:?}",
                method.name
            );
        }
    }

    #[test]
    #[should_panic(expected = "unique and ascending")]
    fn duplicate_ids_are_refused() {
        assert_ascending(&[Fetch::INFO, Fetch::INFO]);
    }

    #[test]
    #[should_panic(expected = "unique and ascending")]
    fn ids_out_of_order_are_refused() {
        assert_ascending(&[Peek::INFO, Fetch::INFO]);
    }
}
