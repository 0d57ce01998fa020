//! Accounts for tests and measurements. These clients do not stretch passwords, and the server
//! cannot notice it. A login costs the server as much as any other login, and the load generator
//! almost nothing.

use std::{fmt, net::SocketAddr};

use anyhow::Context as _;
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialResponse, RegistrationResponse, Ristretto255,
    TripleDh, ksf::Identity, rand::rngs::OsRng,
};
use qpq_domain::UnixMillis;
use qpq_proto::{
    methods::{
        OpaqueLoginFinish, OpaqueLoginStart, OpaqueRegisterFinish, OpaqueRegisterStart,
        UploadKeyPackage,
    },
    v1,
};
use quinn::Endpoint;

use crate::client::{Client, Refused};

/// The server's cipher suite without key stretching.
#[derive(Debug)]
pub struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, sha2::Sha512>;
    type Ksf = Identity;
}

const PASSWORD: &[u8] = b"load";

/// The number of accounts that are created concurrently.
const CONCURRENCY: usize = 32;

/// An account with a session.
#[derive(Clone)]
pub struct Account {
    pub username: String,
    pub seed: [u8; 32],
    pub identity: Bytes,
    pub token: Bytes,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Registers `count` accounts and logs them in.
pub async fn make(
    endpoint: &Endpoint,
    server: SocketAddr,
    count: usize,
) -> anyhow::Result<Vec<Account>> {
    let client = Client::connect(endpoint, server).await?;
    let run = hex::encode(rand::random::<[u8; 6]>());
    stream::iter(0..count)
        .map(|i| {
            let (client, username) = (client.clone(), format!("load-{run}-{i}"));
            async move {
                let seed: [u8; 32] = rand::random();
                let identity = Bytes::copy_from_slice(
                    SigningKey::from_bytes(&seed).verifying_key().as_bytes(),
                );
                register(&client, &username, &identity).await?;
                // A new connection for each login, because a connection has at most four pending
                // logins.
                let own = Client::connect(endpoint, server).await?;
                let token = login(&own, &username).await?;
                anyhow::Ok(Account { username, seed, identity, token })
            }
        })
        .buffer_unordered(CONCURRENCY)
        .try_collect()
        .await
        .context("cannot create accounts")
}

async fn register(client: &Client, username: &str, identity: &Bytes) -> anyhow::Result<()> {
    let upload = upload(client, username, PASSWORD).await?;
    let request = registration(username, upload, identity);
    client.must::<OpaqueRegisterFinish>(&request, None).await?;
    Ok(())
}

/// Runs the first half of a registration and returns the upload of the second half. The upload is
/// valid for this username only, on any connection, any number of times.
pub async fn upload(client: &Client, username: &str, password: &[u8]) -> anyhow::Result<Bytes> {
    let start = ClientRegistration::<Suite>::start(&mut OsRng, password)?;
    let request = v1::OpaqueRegisterStartRequest {
        username: username.into(),
        request: start.message.serialize().to_vec().into(),
    };
    let response = client.must::<OpaqueRegisterStart>(&request, None).await?;
    let finish = start.state.finish(
        &mut OsRng,
        password,
        RegistrationResponse::deserialize(&response.response)?,
        ClientRegistrationFinishParameters::default(),
    )?;
    Ok(finish.message.serialize().to_vec().into())
}

/// Returns the request of the second half of a registration.
pub fn registration(
    username: &str,
    upload: Bytes,
    identity: &Bytes,
) -> v1::OpaqueRegisterFinishRequest {
    v1::OpaqueRegisterFinishRequest {
        username: username.into(),
        upload,
        identity_key: identity.clone(),
        ..Default::default()
    }
}

/// Logs in and returns the session token.
pub async fn login(client: &Client, username: &str) -> anyhow::Result<Bytes> {
    match login_with(client, username, PASSWORD).await? {
        Ok(token) => Ok(token),
        Err(refused) => anyhow::bail!("the login is refused: {refused:?}"),
    }
}

/// Logs in with `password`. Returns the session token or the refusal.
///
/// A client detects a wrong password itself. This client then sends an invalid finalization, so
/// that the server refuses the login.
pub async fn login_with(
    client: &Client,
    username: &str,
    password: &[u8],
) -> anyhow::Result<Result<Bytes, Refused>> {
    let start = ClientLogin::<Suite>::start(&mut OsRng, password)?;
    let request = v1::OpaqueLoginStartRequest {
        username: username.into(),
        request: start.message.serialize().to_vec().into(),
    };
    let response = match client.call::<OpaqueLoginStart>(&request, None).await? {
        Ok(response) => response,
        Err(refused) => return Ok(Err(refused)),
    };
    let finalization = match start.state.finish(
        &mut OsRng,
        password,
        CredentialResponse::deserialize(&response.response)?,
        ClientLoginFinishParameters::default(),
    ) {
        Ok(finish) => finish.message.serialize().to_vec(),
        Err(_) => vec![0; 64],
    };
    let request = v1::OpaqueLoginFinishRequest {
        username: username.into(),
        finalization: finalization.into(),
        ..Default::default()
    };
    Ok(client
        .call::<OpaqueLoginFinish>(&request, None)
        .await?
        .map(|response| response.session_token))
}

/// Generates an identity key.
pub fn identity() -> Bytes {
    Bytes::copy_from_slice(SigningKey::from_bytes(&rand::random()).verifying_key().as_bytes())
}

/// Uploads `count` new KeyPackages of the account.
pub async fn publish_key_packages(
    client: &Client,
    account: &Account,
    count: usize,
    now: UnixMillis,
) -> anyhow::Result<()> {
    let username = qpq_domain::Username::parse(&account.username)?;
    let mut mls = qpq_mls::Client::in_memory(qpq_mls::Identity::from_seed(&account.seed), username);
    let request = v1::UploadKeyPackageRequest {
        more_packages: mls.key_packages(count, now)?.into_iter().map(Bytes::from).collect(),
        ..Default::default()
    };
    client.must::<UploadKeyPackage>(&request, Some(&account.token)).await?;
    Ok(())
}
