//! Certificates of clients, as the federation uses them: both servers of a link have one.
//!
//! A listener with [`ClientAuth::Required`] accepts only clients with a certificate from its
//! authorities. The authorities vouch for the key, not for the domain that a client claims: the
//! service compares the domain with [`ClientCertificate::dns_names`].

use std::{fmt, path::PathBuf};

use rustls::{
    client::verify_server_name,
    pki_types::{CertificateDer, ServerName},
    server::ParsedCertificate,
};

use crate::{fingerprint::Fingerprint, x509};

/// Whether a listener asks clients for a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ClientAuth {
    /// Clients are not asked for a certificate.
    #[default]
    None,
    /// Clients without a valid certificate are refused during the handshake. Sessions cannot be
    /// resumed, because a resumed handshake does not verify the certificate again.
    Required {
        /// The file with the trusted certificate authorities, in PEM or DER.
        authorities: PathBuf,
    },
}

/// The certificate of a client that has proved to have its private key.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    der: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

impl ClientCertificate {
    /// Returns the verified certificate of a connection's client.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Self> {
        let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        let der = chain.into_iter().next()?;
        Some(Self { fingerprint: Fingerprint::of_key(&der)?, der })
    }

    /// Returns the certificate in DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Returns the fingerprint of the certificate's key.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns the DNS names of the certificate in lower case, wildcards included.
    #[must_use]
    pub fn dns_names(&self) -> Vec<String> {
        x509::dns_names(&self.der)
    }

    /// Returns whether the certificate is valid for `name`, by the rules for servers.
    #[must_use]
    pub fn is_valid_for(&self, name: &str) -> bool {
        let (Ok(parsed), Ok(name)) =
            (ParsedCertificate::try_from(&self.der), ServerName::try_from(name))
        else {
            return false;
        };
        verify_server_name(&parsed, &name).is_ok()
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate")
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}
