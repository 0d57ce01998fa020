//! What can go wrong between a client and a server, in the terms in which a client decides what to
//! do next.

use std::{io, net::SocketAddr};

use qpq_wire::FrameError;
use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

use super::trust::Rejected;
use crate::Fingerprint;

/// TLS alert 120, no_application_protocol, as a QUIC error (RFC 9001 §4.8, §8.1).
const NO_APPLICATION_PROTOCOL: u64 = 0x178;
/// The QUIC errors that stand for TLS alerts.
const CRYPTO_ERRORS: std::ops::RangeInclusive<u64> = 0x100..=0x1ff;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No UDP socket could be had.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[source] io::Error),
    /// What was given is no address or no server name.
    #[error("cannot connect to {addr} as {server_name:?}: {reason}")]
    Invalid {
        /// The address.
        addr: SocketAddr,
        /// The name.
        server_name: String,
        /// What is wrong.
        reason: String,
    },
    /// The server is full or draining: try again from a new port.
    #[error("the server refused the connection")]
    Refused,
    /// Nobody answered in time.
    #[error("the server did not answer in time")]
    TimedOut,
    /// The server is not the one that was pinned.
    #[error("the server's certificate has fingerprint {seen}, but {expected} was expected")]
    PinMismatch {
        /// The pinned one.
        expected: Fingerprint,
        /// What the server showed.
        seen: Fingerprint,
    },
    /// The server's certificate is not trusted.
    #[error("the server's certificate is not trusted: {0}")]
    Untrusted(String),
    /// The server does not speak our protocol.
    #[error("the server does not speak this protocol")]
    WrongProtocol,
    /// The handshake ended without a certificate.
    #[error("the server showed no certificate")]
    NoCertificate,
    /// TLS failed otherwise.
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
    /// The connection broke before it was made.
    #[error(transparent)]
    Lost(Lost),
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Not answered by its deadline; it was cancelled, and may have acted or not.
    #[error("the call was not answered in time")]
    TimedOut,
    /// The request does not fit a frame, or the answer announces more than fits one.
    #[error("too large: {0}")]
    TooLarge(FrameError),
    /// The answer is not one response frame, or not to this request.
    #[error("the server's answer is malformed: {0}")]
    Malformed(&'static str),
    /// The server took its answer back.
    #[error("the server broke the answer off (code {0})")]
    Reset(u64),
    /// The connection is gone.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The server closed it and said why.
    #[error("the server closed the connection: {reason} (code {code})")]
    Closed {
        /// The application's code; 0 is a shutdown.
        code: u64,
        /// The application's reason.
        reason: String,
    },
    /// The server has forgotten it: it was restarted, or the packets reach another one.
    #[error("the server does not know the connection any more")]
    Reset,
    /// Nothing was heard for the idle timeout.
    #[error("the server is silent")]
    TimedOut,
    /// Closed from this side.
    #[error("the connection was closed here")]
    ClosedHere,
    /// QUIC failed.
    #[error("the connection failed: {0}")]
    Transport(String),
}

impl From<ConnectionError> for Lost {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::Closed {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::Reset => Self::Reset,
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::LocallyClosed => Self::ClosedHere,
            other => Self::Transport(other.to_string()),
        }
    }
}

impl ConnectError {
    pub(super) fn from_start(
        error: quinn::ConnectError,
        addr: SocketAddr,
        server_name: &str,
    ) -> Self {
        Self::Invalid { addr, server_name: server_name.to_owned(), reason: error.to_string() }
    }

    pub(super) fn from_handshake(error: ConnectionError, rejected: Option<Rejected>) -> Self {
        match rejected {
            Some(Rejected::Pin { expected, seen }) => return Self::PinMismatch { expected, seen },
            Some(Rejected::Check(reason)) => return Self::Untrusted(reason),
            None => {}
        }
        let (code, text) = match &error {
            ConnectionError::TransportError(here) => (here.code, here.to_string()),
            ConnectionError::ConnectionClosed(there) => (there.error_code, there.to_string()),
            ConnectionError::TimedOut => return Self::TimedOut,
            _ => return Self::Lost(error.into()),
        };
        match u64::from(code) {
            _ if code == TransportErrorCode::CONNECTION_REFUSED => Self::Refused,
            NO_APPLICATION_PROTOCOL => Self::WrongProtocol,
            alert if CRYPTO_ERRORS.contains(&alert) => Self::Tls(text),
            _ => Self::Lost(error.into()),
        }
    }
}

impl From<rustls::Error> for ConnectError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string())
    }
}

impl From<ConnectionError> for CallError {
    fn from(error: ConnectionError) -> Self {
        Self::Lost(error.into())
    }
}

impl From<ReadError> for CallError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Reset(code.into_inner()),
            ReadError::ConnectionLost(lost) => lost.into(),
            other => Self::Lost(Lost::Transport(other.to_string())),
        }
    }
}

impl From<WriteError> for CallError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Reset(code.into_inner()),
            WriteError::ConnectionLost(lost) => lost.into(),
            other => Self::Lost(Lost::Transport(other.to_string())),
        }
    }
}
