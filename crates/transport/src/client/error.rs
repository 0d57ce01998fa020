//! The errors of connections and calls, divided by the next step of the client.

use std::{io, net::SocketAddr};

use qpq_wire::FrameError;
use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

use super::trust::Rejection;
use crate::fingerprint::Fingerprint;

/// TLS alert 120, no_application_protocol, as a QUIC error (RFC 9001 §4.8, §8.1).
const NO_APPLICATION_PROTOCOL: u64 = 0x178;
/// The QUIC error codes of TLS alerts.
const CRYPTO_ERRORS: std::ops::RangeInclusive<u64> = 0x100..=0x1ff;

/// The reason why a connection could not be created.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The operating system refused a UDP socket.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[source] io::Error),
    /// The address or the server name is not valid.
    #[error("cannot connect to {addr} as {server_name:?}: {reason}")]
    Invalid {
        /// The address.
        addr: SocketAddr,
        /// The name.
        server_name: String,
        /// The problem.
        reason: String,
    },
    /// The server is full or draining. Retry from a new port.
    #[error("the server refused the connection")]
    Refused,
    /// No answer came in time.
    #[error("the server did not answer in time")]
    TimedOut,
    /// The server has another key than the pinned one.
    #[error("the server's certificate has fingerprint {seen}, but {expected} was expected")]
    PinMismatch {
        /// The pinned fingerprint.
        expected: Fingerprint,
        /// The fingerprint of the server.
        seen: Fingerprint,
    },
    /// The server's certificate is not trusted.
    #[error("the server's certificate is not trusted: {0}")]
    Untrusted(String),
    /// The server does not support the protocol.
    #[error("the server does not speak this protocol")]
    WrongProtocol,
    /// The handshake ended without a certificate.
    #[error("the server sent no certificate")]
    NoCertificate,
    /// TLS failed for another reason.
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
    /// The connection ended during the handshake.
    #[error(transparent)]
    Lost(Lost),
}

/// The reason why a call has no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// No response came by the deadline. The call was cancelled, and may or may not have taken
    /// effect.
    #[error("the call was not answered in time")]
    TimedOut,
    /// The request, or the announced response, does not fit a frame.
    #[error("too large: {0}")]
    TooLarge(FrameError),
    /// The response is not one response frame, or belongs to another request.
    #[error("the server's response is malformed: {0}")]
    Malformed(&'static str),
    /// The server reset the response.
    #[error("the server cancelled its response (code {0})")]
    Reset(u64),
    /// The connection has ended.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// The reason why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The server closed the connection and gave a reason.
    #[error("the server closed the connection: {reason} (code {code})")]
    Closed {
        /// The code of the application. 0 is a shutdown.
        code: u64,
        /// The reason of the application.
        reason: String,
    },
    /// The server no longer knows the connection: it was restarted, or the packets reach another
    /// server.
    #[error("the server no longer knows the connection")]
    Reset,
    /// Nothing was received for the idle timeout.
    #[error("the server does not answer")]
    TimedOut,
    /// This side closed the connection.
    #[error("the client closed the connection")]
    ClosedLocally,
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
            ConnectionError::LocallyClosed => Self::ClosedLocally,
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

    pub(super) fn from_handshake(error: ConnectionError, rejection: Option<Rejection>) -> Self {
        match rejection {
            Some(Rejection::Pin { expected, seen }) => return Self::PinMismatch { expected, seen },
            Some(Rejection::Untrusted(reason)) => return Self::Untrusted(reason),
            None => {}
        }
        let (code, text) = match &error {
            ConnectionError::TransportError(local) => (local.code, local.to_string()),
            ConnectionError::ConnectionClosed(remote) => (remote.error_code, remote.to_string()),
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
