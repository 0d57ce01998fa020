//! Accounts for a measurement. The server cannot tell how a client stretches a password, so these clients do not: an
//! account costs its server what any account costs, and the generator next to nothing.

use std::{fmt, net::SocketAddr};

use anyhow::Context as _;
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialResponse, RegistrationResponse, Ristretto255, TripleDh,
    ksf::Identity, rand::rngs::OsRng,
};
use qpq_domain::UnixMillis;
use qpq_proto::{
    methods::{
        OpaqueLoginFinish, OpaqueLoginStart, OpaqueRegisterFinish, OpaqueRegisterStart, UploadKeyPackage,
    },
    v1,
};
use quinn::Endpoint;

use crate::client::Client;

/// The server's suite with no key stretching.
#[derive(Debug)]
pub struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, sha2::Sha512>;
    type Ksf = Identity;
}

const PASSWORD: &[u8] = b"load";

/// How many accounts are made at a time.
const AT_A_TIME: usize = 32;

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
pub async fn make(endpoint: &Endpoint, server: SocketAddr, count: usize) -> anyhow::Result<Vec<Account>> {
    let client = Client::connect(endpoint, server).await?;
    let run = hex::encode(rand::random::<[u8; 6]>());
    stream::iter(0..count)
        .map(|i| {
            let (client, username) = (client.clone(), format!("load-{run}-{i}"));
            async move {
                let seed: [u8; 32] = rand::random();
                let identity =
                    Bytes::copy_from_slice(SigningKey::from_bytes(&seed).verifying_key().as_bytes());
                register(&client, &username, &identity).await?;
                // A connection has at most four logins pending: each has one of its own.
                let own = Client::connect(endpoint, server).await?;
                let token = login(&own, &username).await?;
                anyhow::Ok(Account { username, seed, identity, token })
            }
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect()
        .await
        .context("making accounts")
}

async fn register(client: &Client, username: &str, identity: &Bytes) -> anyhow::Result<()> {
    let start = ClientRegistration::<Suite>::start(&mut OsRng, PASSWORD)?;
    let request = v1::OpaqueRegisterStartRequest {
        username: username.into(),
        request: start.message.serialize().to_vec().into(),
    };
    let response = client.must::<OpaqueRegisterStart>(&request, None).await?;
    let finish = start.state.finish(
        &mut OsRng,
        PASSWORD,
        RegistrationResponse::deserialize(&response.response)?,
        ClientRegistrationFinishParameters::default(),
    )?;
    let request = v1::OpaqueRegisterFinishRequest {
        username: username.into(),
        upload: finish.message.serialize().to_vec().into(),
        identity_key: identity.clone(),
        ..Default::default()
    };
    client.must::<OpaqueRegisterFinish>(&request, None).await?;
    Ok(())
}

/// One whole login; its session token.
pub async fn login(client: &Client, username: &str) -> anyhow::Result<Bytes> {
    let start = ClientLogin::<Suite>::start(&mut OsRng, PASSWORD)?;
    let request = v1::OpaqueLoginStartRequest {
        username: username.into(),
        request: start.message.serialize().to_vec().into(),
    };
    let response = client.must::<OpaqueLoginStart>(&request, None).await?;
    let finish = start.state.finish(
        &mut OsRng,
        PASSWORD,
        CredentialResponse::deserialize(&response.response)?,
        ClientLoginFinishParameters::default(),
    )?;
    let request = v1::OpaqueLoginFinishRequest {
        username: username.into(),
        finalization: finish.message.serialize().to_vec().into(),
        ..Default::default()
    };
    Ok(client.must::<OpaqueLoginFinish>(&request, None).await?.session_token)
}

/// Uploads `count` fresh KeyPackages of the account.
pub async fn publish_key_packages(
    client: &Client,
    account: &Account,
    count: usize,
    now: UnixMillis,
) -> anyhow::Result<()> {
    let username = qpq_domain::Username::parse(&account.username)?;
    let mut mls = qpq_mls::Client::new(qpq_mls::Identity::from_seed(&account.seed), username);
    let request = v1::UploadKeyPackageRequest {
        more_packages: mls.key_packages(count, now).into_iter().map(Bytes::from).collect(),
        ..Default::default()
    };
    client.must::<UploadKeyPackage>(&request, Some(&account.token)).await?;
    Ok(())
}
