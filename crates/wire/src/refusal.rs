//! The reasons why a server refuses a request, before the call runs or instead of its reply.

/// The reason why a request is refused without a reply of its method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The announced payload is above [`MAX_PAYLOAD`](crate::MAX_PAYLOAD). None of it was read.
    TooLarge,
    /// The stream ended inside the frame, or continued after it.
    Malformed,
    /// The request was not complete in time.
    Timeout,
    /// The client's unfinished requests already use all the memory that one client may use.
    ClientMemory,
    /// The requests of all clients use all the memory for requests.
    ServerMemory,
    /// The call panicked, or its reply does not fit a frame.
    Internal,
}

impl Refusal {
    /// All reasons.
    pub const ALL: [Self; 6] = [
        Self::TooLarge,
        Self::Malformed,
        Self::Timeout,
        Self::ClientMemory,
        Self::ServerMemory,
        Self::Internal,
    ];

    /// Returns the name of the reason in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Timeout => "timeout",
            Self::ClientMemory => "client_memory",
            Self::ServerMemory => "server_memory",
            Self::Internal => "internal",
        }
    }
}
