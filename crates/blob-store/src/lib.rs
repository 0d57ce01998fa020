//! The bucket of a cluster: one object for each blob, in a store that speaks the S3 protocol.
//!
//! The keys of objects come from the caller, who never uses one twice. So a write never replaces an
//! object, a removal is safe to repeat, and no listing is needed.

#![warn(missing_docs)]

use std::{fmt, fs, io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, ObjectStoreExt as _, PutPayload,
    RetryConfig, aws::AmazonS3Builder, path::Path,
};
use secrecy::{ExposeSecret as _, SecretString};

/// The time limit of a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// The settings of a bucket.
#[derive(Clone)]
pub struct BucketConfig {
    /// The URL of the service, as in `https://s3.example.org`. With `http`, the bytes and the names
    /// of objects are not encrypted on the way.
    pub endpoint: String,
    /// The name of the bucket, which exists.
    pub bucket: String,
    /// The region, which is part of the signature of requests.
    pub region: String,
    /// The id of the access key.
    pub access_key: SecretString,
    /// The secret of the access key.
    pub secret_key: SecretString,
    /// A PEM file with the authorities to trust in addition to those of the system.
    pub ca: Option<PathBuf>,
    /// Maximum time of a request with its retries.
    pub timeout: Duration,
}

impl fmt::Debug for BucketConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketConfig")
            .field("endpoint", &self.endpoint)
            .field("bucket", &self.bucket)
            .field("region", &self.region)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// The reason why a bucket cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file with the authorities cannot be read.
    #[error("{path} cannot be used: {source}", path = path.display())]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A setting is invalid.
    #[error("{0}")]
    Invalid(#[source] object_store::Error),
}

/// The failure of an operation. The text names neither keys nor credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BucketError {
    /// The bucket has no such object.
    #[error("the bucket has no such object")]
    NotFound,
    /// The service refuses the credentials.
    #[error("the object store refuses the credentials")]
    Refused,
    /// The service cannot be reached, or cannot do this now. Contains the cause.
    #[error("the object store is unavailable: {0}")]
    Unavailable(String),
}

impl BucketError {
    fn new(error: &object_store::Error, key: &str) -> Self {
        use object_store::Error;
        match error {
            Error::NotFound { .. } => Self::NotFound,
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Self::Refused,
            other => Self::Unavailable(innermost(other).replace(key, "…")),
        }
    }
}

/// Returns the text of the innermost cause. Those around it contain the URL, and so the key.
fn innermost(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A bucket. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    timeout: Duration,
}

impl Bucket {
    /// Creates a client, which connects on first use.
    ///
    /// # Errors
    /// A file that cannot be read, or a setting that is invalid.
    pub fn new(config: &BucketConfig) -> Result<Self, ConfigError> {
        // The HTTP client takes its TLS from the default of the process. Another call may have
        // installed that already.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut options = ClientOptions::new()
            .with_connect_timeout(CONNECT)
            .with_timeout(config.timeout)
            .with_allow_http(config.endpoint.starts_with("http://"));
        if let Some(path) = &config.ca {
            let file = |source| ConfigError::File { path: path.clone(), source };
            let pem = fs::read(path).map_err(file)?;
            let authorities = Certificate::from_pem_bundle(&pem).map_err(ConfigError::Invalid)?;
            if authorities.is_empty() {
                return Err(file(io::Error::other("there is no certificate in it")));
            }
            for authority in authorities {
                options = options.with_root_certificate(authority);
            }
        }
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(2),
                base: 2.,
            },
            max_retries: 3,
            retry_timeout: config.timeout,
        };
        let store = AmazonS3Builder::new()
            .with_endpoint(&config.endpoint)
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_access_key_id(config.access_key.expose_secret())
            .with_secret_access_key(config.secret_key.expose_secret())
            .with_virtual_hosted_style_request(false)
            .with_client_options(options)
            .with_retry(retry)
            .build()
            .map_err(ConfigError::Invalid)?;
        Ok(Self { store: Arc::new(store), timeout: config.timeout })
    }

    /// Returns the maximum time of an operation.
    pub const fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Writes an object. It is durable when this returns.
    ///
    /// # Errors
    /// See [`BucketError`]. The object may exist nevertheless.
    pub async fn put(&self, key: &str, parts: Vec<Bytes>) -> Result<(), BucketError> {
        let payload: PutPayload = parts.into_iter().collect();
        match self.store.put(&Path::from(key), payload).await {
            Ok(_) => Ok(()),
            Err(error) => Err(BucketError::new(&error, key)),
        }
    }

    /// Reads `length` bytes from `offset` on, which the object must have.
    ///
    /// # Errors
    /// See [`BucketError`].
    pub async fn read(&self, key: &str, offset: u64, length: u64) -> Result<Bytes, BucketError> {
        let range = offset..offset + length;
        let read = self.store.get_range(&Path::from(key), range).await;
        read.map_err(|error| BucketError::new(&error, key))
    }

    /// Removes an object. An object that does not exist is not an error.
    ///
    /// # Errors
    /// See [`BucketError`].
    pub async fn remove(&self, key: &str) -> Result<(), BucketError> {
        match self.store.delete(&Path::from(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(BucketError::new(&error, key)),
        }
    }
}
