//! The authentication that a method requires, as types. A row of the method table names one of
//! them, and `qpq-rpc` passes the matching principal to the handler. A handler that requires
//! more of the principal than its row authenticates does not compile.

/// The required authentication as a value, for tables and documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AuthKind {
    /// Anyone.
    Anonymous,
    /// Any session.
    Session,
    /// A session whose OPAQUE login is at most five minutes old.
    Fresh,
    /// A session of an administrator of the server.
    Admin,
    /// A session of an administrator of the server, or of the channel in the request.
    Moderator,
    /// Another server (mutual TLS), or a session.
    Peer,
}

impl AuthKind {
    /// All kinds, in the order of the documentation.
    pub const ALL: [Self; 6] =
        [Self::Anonymous, Self::Session, Self::Fresh, Self::Admin, Self::Moderator, Self::Peer];

    /// Returns the name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Session => "session",
            Self::Fresh => "fresh",
            Self::Admin => "admin",
            Self::Moderator => "moderator",
            Self::Peer => "peer",
        }
    }

    /// Returns the meaning in one sentence.
    pub const fn doc(self) -> &'static str {
        match self {
            Self::Anonymous => "Anyone.",
            Self::Session => "Any session.",
            Self::Fresh => "A session whose OPAQUE login is at most 5 minutes old.",
            Self::Admin => "A session of an administrator of the server.",
            Self::Moderator => {
                "A session of an administrator of the server, or of the channel in the request."
            }
            Self::Peer => "Another server (mutual TLS), or a session.",
        }
    }
}

/// A marker for the required authentication. Sealed: only the types below implement it.
pub trait Auth: sealed::Sealed + 'static {
    /// The kind that this type marks.
    const KIND: AuthKind;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! markers {
    ($($name:ident)+) => {$(
        #[doc = concat!("Marks methods of [`AuthKind::", stringify!($name), "`].")]
        #[derive(Debug)]
        pub enum $name {}
        impl sealed::Sealed for $name {}
        impl Auth for $name {
            const KIND: AuthKind = AuthKind::$name;
        }
    )+};
}

markers! { Anonymous Session Fresh Admin Moderator Peer }
