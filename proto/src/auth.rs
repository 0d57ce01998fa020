//! Who may call a method, as types: a row of the method table names one of these, and `qpq-rpc`
//! gives the method's handler the caller that belongs to it. A handler that takes a stronger caller
//! than its row gives does not compile.

/// Who may call, as a value (for tables and documents).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AuthKind {
    /// Anyone.
    Anonymous,
    /// Whoever has a session.
    Session,
    /// A session whose OPAQUE login is at most five minutes old.
    Fresh,
    /// A session of an administrator of the server.
    Admin,
    /// A session of an administrator of the server, or of the channel that the request names.
    Moderator,
    /// Another server (mutual TLS), or a session.
    Peer,
}

impl AuthKind {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 6] =
        [Self::Anonymous, Self::Session, Self::Fresh, Self::Admin, Self::Moderator, Self::Peer];

    /// The name in tables.
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

    /// What the name means, in one sentence.
    pub const fn doc(self) -> &'static str {
        match self {
            Self::Anonymous => "Anyone.",
            Self::Session => "Whoever has a session.",
            Self::Fresh => "A session whose OPAQUE login is at most 5 minutes old.",
            Self::Admin => "A session of an administrator of the server.",
            Self::Moderator => {
                "A session of an administrator of the server, or of the channel that the request names."
            }
            Self::Peer => "Another server (mutual TLS), or a session.",
        }
    }
}

/// A marker for who may call; implemented by the types below and by nothing else.
pub trait Auth: sealed::Sealed + 'static {
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
