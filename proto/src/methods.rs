//! The method table: **one row is one RPC**. Server, client, metrics and `docs/rpc.md` know a method by its row alone.
//!
//! Each row makes an uninhabited type that implements [`Method`], so a call is typed on both sides, and an entry of
//! [`METHODS`]. A row marked `served` is also in the list that [`for_each_served_method!`](crate::for_each_served_method)
//! hands to `qpq-rpc`, where a method without a handler does not compile; one marked `later` has its messages already,
//! and the server answers it `UnknownMethod`.

use prost::Message;

use crate::{
    auth::{self, Auth, AuthKind},
    deadlines::DeadlineClass,
    limits::LimitClass,
    v1,
};

/// One RPC, as a type. No value of it exists.
pub trait Method: 'static {
    /// The row of the table.
    const INFO: MethodInfo;
    /// Who may call it.
    type Auth: Auth;
    type Request: Message + Default + Clone + 'static;
    type Response: Message + Default + Clone + 'static;
}

/// One RPC, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// The number in the request frame.
    pub id: u16,
    /// The name in documents, logs and metrics.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub doc: &'static str,
    /// The request's message in package `qpq.v1`.
    pub request: &'static str,
    /// The response's message in package `qpq.v1`.
    pub response: &'static str,
    /// Who may call it.
    pub auth: AuthKind,
    /// The rate-limit budget that a call is taken from.
    pub limit: LimitClass,
    /// How long a call may take.
    pub deadline: DeadlineClass,
    /// The largest payload of a request.
    pub largest_request: RequestSize,
    /// Whether this server has a handler for it.
    pub served: bool,
}

/// The largest payload of a method's request, checked from the frame header before memory is taken.
///
/// The size is what the protocol allows; a server's configuration may allow less (the payload of a
/// message, a KeyPackage).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestSize {
    /// Keys, names, tokens and ids.
    Small,
    /// A list of up to 1 000 keys, or one encrypted report.
    Medium,
    /// A list of up to 10 000 seqs.
    List,
    /// Messages, packages, chunks and bundles: what fits a frame.
    Frame,
}

impl RequestSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Small => 8 << 10,
            Self::Medium => 64 << 10,
            Self::List => 256 << 10,
            Self::Frame => 4 << 20,
        }
    }

    /// The size in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "8 KiB",
            Self::Medium => "64 KiB",
            Self::List => "256 KiB",
            Self::Frame => "4 MiB",
        }
    }
}

/// The row of `id`, or `None` for an id that the protocol does not have.
pub fn by_id(id: u16) -> Option<&'static MethodInfo> {
    let row = METHODS.binary_search_by_key(&id, |method| method.id).ok()?;
    METHODS.get(row)
}

/// Refuses, at compile time, a table whose ids are not unique and in order.
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
        $id:literal $name:ident($request:ident) -> $response:ident, $auth:ident, $limit:ident, $deadline:ident, $size:ident, $state:ident;
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
                    deadline: DeadlineClass::$deadline,
                    largest_request: RequestSize::$size,
                    served: is_served!($state),
                };
                type Auth = auth::$auth;
                type Request = v1::$request;
                type Response = v1::$response;
            }
        )+

        /// Every row, by id.
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

/// Takes the rows one by one and keeps the served ones.
macro_rules! served_methods {
    ([$($kept:ident)*] $name:ident served $($rest:tt)*) => { served_methods! { [$($kept)* $name] $($rest)* } };
    ([$($kept:ident)*] $name:ident later $($rest:tt)*) => { served_methods! { [$($kept)*] $($rest)* } };
    ([$($kept:ident)*]) => {
        /// Calls `$callback!` with the path of every method that has a handler, by id, separated by spaces.
        #[macro_export]
        macro_rules! for_each_served_method {
            ($callback:ident) => { $callback! { $($crate::methods::$kept)* } };
        }
    };
}

// id name(request) -> response, who may call, limit class, deadline class, largest request,
// whether there is a handler
methods! {
    /// Begins a registration: blinds the password with the server's key.
    100 OpaqueRegisterStart(OpaqueRegisterStartRequest) -> OpaqueRegisterStartResponse, Anonymous, Register, Standard, Small, served;
    /// Makes the account: name, OPAQUE record and identity key, for the first and only time.
    101 OpaqueRegisterFinish(OpaqueRegisterFinishRequest) -> OpaqueRegisterFinishResponse, Anonymous, Register, Standard, Small, served;
    /// Begins a login; answers alike whether or not the user exists.
    102 OpaqueLoginStart(OpaqueLoginStartRequest) -> OpaqueLoginStartResponse, Anonymous, Login, Standard, Small, served;
    /// Ends a login, with a session if the password was right.
    103 OpaqueLoginFinish(OpaqueLoginFinishRequest) -> OpaqueLoginFinishResponse, Anonymous, Login, Standard, Small, served;
    /// Ends the session, or all of the account's.
    104 Logout(LogoutRequest) -> LogoutResponse, Session, Logout, Standard, Small, served;

    /// Puts a message into a recipient's inbox; once answered it is durable.
    200 Enqueue(EnqueueRequest) -> EnqueueResponse, Session, Send, Standard, Frame, served;
    /// Reads messages and removes them once the client has the whole answer.
    201 Fetch(FetchRequest) -> FetchResponse, Session, Receive, Standard, Small, served;
    /// Reads as Fetch does, and waits when there is nothing.
    202 FetchWait(FetchWaitRequest) -> FetchWaitResponse, Session, Receive, Wait, Small, served;
    /// Reads messages and leaves them.
    203 Peek(PeekRequest) -> PeekResponse, Session, Receive, Standard, Small, served;
    /// Removes messages that were read.
    204 Ack(AckRequest) -> AckResponse, Session, Receive, Standard, List, served;
    /// Puts one message into many inboxes, or many messages each into its own; can carry an MLS commit.
    205 BatchEnqueue(BatchEnqueueRequest) -> BatchEnqueueResponse, Session, Send, Standard, Frame, served;
    /// Opens a stream of events on this connection.
    206 Subscribe(SubscribeRequest) -> SubscribeResponse, Session, Receive, Standard, Small, served;

    /// Stores KeyPackages for others to start conversations with.
    300 UploadKeyPackage(UploadKeyPackageRequest) -> UploadKeyPackageResponse, Session, KeyUpload, Standard, Frame, served;
    /// Takes one of somebody's KeyPackages, which nobody else gets.
    301 FetchKeyPackage(FetchKeyPackageRequest) -> FetchKeyPackageResponse, Session, KeyFetch, Standard, Small, served;
    /// Stores the caller's X25519 and ML-KEM-768 public key.
    302 UploadHybridKey(UploadHybridKeyRequest) -> UploadHybridKeyResponse, Session, KeyUpload, Standard, Small, served;
    /// Reads somebody's hybrid key.
    303 FetchHybridKey(FetchHybridKeyRequest) -> FetchHybridKeyResponse, Session, Lookup, Standard, Small, served;
    /// Reads many hybrid keys.
    304 FetchHybridKeys(FetchHybridKeysRequest) -> FetchHybridKeysResponse, Session, Lookup, Standard, Medium, served;
    /// Counts the caller's KeyPackages that are left.
    305 CountKeyPackages(CountKeyPackagesRequest) -> CountKeyPackagesResponse, Session, Lookup, Standard, Small, served;

    /// Makes a channel: of two, the same whoever asks first, or of many.
    400 CreateChannel(CreateChannelRequest) -> CreateChannelResponse, Session, Channel, Standard, Medium, later;
    /// Removes a member from a channel, or the caller itself.
    410 RemoveMember(RemoveMemberRequest) -> RemoveMemberResponse, Session, Channel, Standard, Small, later;
    /// Changes a channel's name, description or settings.
    411 UpdateGroupMetadata(UpdateGroupMetadataRequest) -> UpdateGroupMetadataResponse, Session, Channel, Standard, Small, later;
    /// Lists a channel's members, by pages, with its metadata.
    412 ListGroupMembers(ListGroupMembersRequest) -> ListGroupMembersResponse, Session, Channel, Standard, Small, later;
    /// Asks every member's client to rotate its keys.
    413 RotateKeys(RotateKeysRequest) -> RotateKeysResponse, Session, Channel, Standard, Small, later;
    /// Adds members to a channel.
    414 AddMembers(AddMembersRequest) -> AddMembersResponse, Session, Channel, Standard, Medium, later;
    /// Reports a message to the administrators.
    420 ReportMessage(ReportMessageRequest) -> ReportMessageResponse, Session, Report, Standard, Medium, later;
    /// Bans a user from the server or from a channel.
    421 BanUser(BanUserRequest) -> BanUserResponse, Moderator, Admin, Standard, Small, later;
    /// Ends a ban.
    422 UnbanUser(UnbanUserRequest) -> UnbanUserResponse, Moderator, Admin, Standard, Small, later;
    /// Lists the reports.
    423 ListReports(ListReportsRequest) -> ListReportsResponse, Admin, Admin, Standard, Small, later;
    /// Lists the bans in force.
    424 ListBanned(ListBannedRequest) -> ListBannedResponse, Admin, Admin, Standard, Small, later;

    /// Finds the identity key of a user name, here or on another server.
    500 ResolveUser(ResolveUserRequest) -> ResolveUserResponse, Session, Lookup, Standard, Small, served;
    /// Finds the account of an identity key.
    501 ResolveIdentity(ResolveIdentityRequest) -> ResolveIdentityResponse, Session, Lookup, Standard, Small, served;
    /// Revokes the caller's identity key for ever, in the public log.
    510 RevokeKey(RevokeKeyRequest) -> RevokeKeyResponse, Fresh, Log, Standard, Small, later;
    /// Proves that a key is revoked, or that it is not.
    511 CheckRevocation(CheckRevocationRequest) -> CheckRevocationResponse, Anonymous, Log, Standard, Small, later;
    /// Reads and proves the public log of keys.
    520 AuditKeyTransparency(AuditKeyTransparencyRequest) -> AuditKeyTransparencyResponse, Anonymous, Log, Standard, Small, later;

    /// Stores one chunk of a blob.
    600 UploadBlob(UploadBlobRequest) -> UploadBlobResponse, Session, Blob, Blob, Frame, later;
    /// Reads a part of a blob.
    601 DownloadBlob(DownloadBlobRequest) -> DownloadBlobResponse, Session, Blob, Blob, Small, later;

    /// Registers a device, which from then on reads the whole inbox by itself.
    700 RegisterDevice(RegisterDeviceRequest) -> RegisterDeviceResponse, Session, Device, Standard, Small, later;
    /// Lists the caller's devices.
    701 ListDevices(ListDevicesRequest) -> ListDevicesResponse, Session, Device, Standard, Small, later;
    /// Removes a device, with its sessions and its copy of the inbox.
    702 RevokeDevice(RevokeDeviceRequest) -> RevokeDeviceResponse, Session, Device, Standard, Small, later;
    /// Says how a device is woken, or that it no longer is.
    710 RegisterPushToken(RegisterPushTokenRequest) -> RegisterPushTokenResponse, Session, Device, Standard, Small, later;
    /// Stores the bundle that brings the account back after a loss.
    750 StoreRecoveryBundle(StoreRecoveryBundleRequest) -> StoreRecoveryBundleResponse, Session, Recovery, Standard, Frame, later;
    /// Reads the recovery bundle.
    751 FetchRecoveryBundle(FetchRecoveryBundleRequest) -> FetchRecoveryBundleResponse, Fresh, Recovery, Standard, Small, later;
    /// Removes the recovery bundle.
    752 DeleteRecoveryBundle(DeleteRecoveryBundleRequest) -> DeleteRecoveryBundleResponse, Fresh, Recovery, Standard, Small, later;

    /// Says where the caller can be reached directly, for a while.
    800 PublishEndpoint(PublishEndpointRequest) -> PublishEndpointResponse, Session, Endpoint, Standard, Medium, later;
    /// Finds where somebody can be reached directly.
    801 ResolveEndpoint(ResolveEndpointRequest) -> ResolveEndpointResponse, Session, Endpoint, Standard, Small, later;
    /// Says how the server is, and the key that it signs delivery proofs with.
    802 Health(HealthRequest) -> HealthResponse, Anonymous, Health, Health, Small, served;

    /// Relays a message to a recipient on another server.
    900 RelayEnqueue(RelayEnqueueRequest) -> RelayEnqueueResponse, Peer, Federation, Standard, Frame, later;
    /// Relays one message to many recipients on another server.
    901 RelayBatchEnqueue(RelayBatchEnqueueRequest) -> RelayBatchEnqueueResponse, Peer, Federation, Standard, Frame, later;
    /// Takes a KeyPackage of somebody on another server.
    902 ProxyFetchKeyPackage(ProxyFetchKeyPackageRequest) -> ProxyFetchKeyPackageResponse, Peer, Federation, Standard, Small, later;
    /// Reads the hybrid key of somebody on another server.
    903 ProxyFetchHybridKey(ProxyFetchHybridKeyRequest) -> ProxyFetchHybridKeyResponse, Peer, Federation, Standard, Small, later;
    /// Finds the identity key of a user name on another server.
    904 ProxyResolveUser(ProxyResolveUserRequest) -> ProxyResolveUserResponse, Peer, Federation, Standard, Small, later;
    /// Says how another server is, and how many relays to it are on their way.
    905 FederationHealth(FederationHealthRequest) -> FederationHealthResponse, Peer, Federation, Standard, Small, later;

    /// Removes the account and everything of it, for good.
    950 DeleteAccount(DeleteAccountRequest) -> DeleteAccountResponse, Fresh, Account, Standard, Small, later;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The methods of the original server.
    const DOCUMENTED: [u16; 49] = [
        100, 101, 102, 103, 200, 201, 202, 203, 204, 205, 300, 301, 302, 303, 304, 400, 410, 411,
        412, 413, 420, 421, 422, 423, 424, 500, 501, 510, 511, 520, 600, 601, 700, 701, 702, 710,
        750, 751, 752, 800, 801, 802, 900, 901, 902, 903, 904, 905, 950,
    ];
    /// Ours beside them.
    const EXTENSIONS: [u16; 4] = [104, 206, 305, 414];

    fn ids(rows: impl Iterator<Item = &'static MethodInfo>) -> Vec<u16> {
        rows.map(|method| method.id).collect()
    }

    #[test]
    fn the_table_has_every_method_of_the_protocol_and_no_other() {
        let mut expected = [DOCUMENTED.as_slice(), &EXTENSIONS].concat();
        expected.sort_unstable();
        assert_eq!(ids(METHODS.iter()), expected);
    }

    #[test]
    fn no_request_is_larger_than_a_frame() {
        for method in METHODS {
            assert!(method.largest_request.bytes() <= RequestSize::Frame.bytes(), "{method:?}");
        }
    }

    /// Shrinks as handlers are written; a row may not come back.
    #[test]
    fn these_rows_still_wait_for_their_handlers() {
        let later = [
            400, 410, 411, 412, 413, 414, 420, 421, 422, 423, 424, 510, 511, 520, 600, 601, 700,
            701, 702, 710, 750, 751, 752, 800, 801, 900, 901, 902, 903, 904, 905, 950,
        ];
        assert_eq!(ids(METHODS.iter().filter(|method| !method.served)), later);
    }

    #[test]
    fn the_callback_gets_exactly_the_served_rows() {
        macro_rules! served_ids {
            ($($method:path)*) => { [$(<$method as Method>::INFO.id),*] };
        }
        let handed = for_each_served_method!(served_ids);
        assert_eq!(ids(METHODS.iter().filter(|method| method.served)), handed);
    }

    #[test]
    fn every_id_finds_its_row_and_no_other_does() {
        let found: Vec<_> = (0..=u16::MAX).filter_map(by_id).collect();
        assert_eq!(found, METHODS.iter().collect::<Vec<_>>());
        assert_eq!(by_id(202).map(|method| method.name), Some("FetchWait"));
    }

    #[test]
    fn anonymous_calls_are_limited_by_what_an_anonymous_caller_has() {
        use crate::limits::LimitSubject;
        for method in METHODS.iter().filter(|method| method.auth == AuthKind::Anonymous) {
            let by_ip =
                method.limit.defaults().iter().any(|budget| budget.subject == LimitSubject::Ip);
            assert!(by_ip, "{} is not limited for anyone", method.name);
        }
    }

    #[test]
    fn a_row_is_described_by_one_sentence() {
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
    fn a_doubled_id_is_refused() {
        assert_ascending(&[Fetch::INFO, Fetch::INFO]);
    }

    #[test]
    #[should_panic(expected = "unique and ascending")]
    fn ids_out_of_order_are_refused() {
        assert_ascending(&[Peek::INFO, Fetch::INFO]);
    }
}
