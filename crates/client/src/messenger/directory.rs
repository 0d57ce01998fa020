//! What the server knows about people: names to keys and back, and the key packages that start a
//! conversation.

use futures_util::future::join_all;
use qpq_domain::{IdentityKey, UnixMillis, Username};
use qpq_proto::{Status, methods, v1};

use super::{
    Messenger,
    log::Event,
    now,
    people::{Person, Standing},
    state::State,
};
use crate::error::{CallError, Error};

/// Our key packages on the server are filled up to this many when fewer than [`FEW`] are left.
const ENOUGH: usize = 20;
const FEW: u32 = 10;

/// Names asked about at once: whoever takes us into a group of thousands cannot make us ask for
/// thousands.
const NAMES_AT_ONCE: usize = 32;

impl Messenger {
    /// Looks a user up. What the directory said before about the name must still be true.
    ///
    /// # Errors
    /// [`Error::NoSuchUser`], [`Error::IdentityChanged`].
    pub async fn resolve(&self, username: &Username) -> Result<Person, Error> {
        let identity = self.look_up(username).await?;
        let known = self.keeper().read(|state| state.people.confirmed(username)).await?;
        match known {
            Some(known) if known != identity => {
                Err(Error::IdentityChanged { username: username.clone(), known, now: identity })
            }
            Some(_) => self.keeper().read(|state| state.people.person(&identity)).await,
            None => self.confirm(identity, username.clone()).await,
        }
    }

    /// Returns the person who is known to have this name, without asking the server.
    pub async fn known(&self, username: &Username) -> Result<Option<Person>, Error> {
        self.keeper()
            .read(|state| {
                let identity = state.people.confirmed(username)?;
                Some(state.people.person(&identity))
            })
            .await
    }

    /// Returns when this account was registered, by the server's clock.
    pub async fn registered_at(&self) -> Result<UnixMillis, Error> {
        let request = v1::ResolveIdentityRequest {
            identity_key: self.profile().identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = self.client().call::<methods::ResolveIdentity>(request).await?;
        Ok(UnixMillis(answer.created_at))
    }

    /// Takes the directory's word for a user's new key, after [`Error::IdentityChanged`]: the
    /// person was asked. What the old key says counts as somebody else's from then on.
    pub async fn accept_new_identity(&self, username: &Username) -> Result<Person, Error> {
        let identity = self.look_up(username).await?;
        let name = username.clone();
        self.keeper()
            .change(move |state| {
                if let Some(old) = state.people.confirmed(&name).filter(|old| *old != identity) {
                    state.people.set(old, name, Standing::Refuted);
                }
                Ok(())
            })
            .await?;
        self.confirm(identity, username.clone()).await
    }

    /// Notes that the safety number with a user was compared and is the same on both sides. Returns
    /// when.
    pub async fn mark_compared(&self, username: &Username) -> Result<UnixMillis, Error> {
        let person = self.resolve(username).await?;
        let at = now();
        self.keeper()
            .change(move |state| {
                state.people.set_compared(&person.identity, at);
                Ok(at)
            })
            .await
    }

    /// Returns when the safety number with the owner of this key was compared, if it was.
    pub async fn compared_at(&self, identity: &IdentityKey) -> Result<Option<UnixMillis>, Error> {
        self.keeper().read(|state| state.people.compared_at(identity)).await
    }

    /// Fills up our key packages on the server, so that others can start conversations with us.
    pub async fn publish_key_packages(&self) -> Result<(), Error> {
        let client = self.client();
        let left = client
            .call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default())
            .await?;
        if left.available < FEW {
            let missing = ENOUGH - left.available as usize;
            // Saved before they are uploaded: the private halves are in the state.
            let packages = self
                .keeper()
                .change(move |state| Ok(state.mls.key_packages(missing, now())))
                .await?;
            let mut packages = packages.into_iter().map(Into::into);
            client
                .call::<methods::UploadKeyPackage>(v1::UploadKeyPackageRequest {
                    package: packages.next().expect("at least one is missing"),
                    more_packages: packages.collect(),
                    ..Default::default()
                })
                .await?;
        }
        if !left.has_last_resort {
            let package =
                self.keeper().change(|state| Ok(state.mls.last_resort_key_package(now()))).await?;
            client
                .call::<methods::UploadKeyPackage>(v1::UploadKeyPackageRequest {
                    package: package.into(),
                    last_resort: true,
                    ..Default::default()
                })
                .await?;
        }
        Ok(())
    }

    /// A key package of somebody, as the server gives it out.
    pub(super) async fn fetch_key_package(&self, person: &Person) -> Result<bytes::Bytes, Error> {
        let request = v1::FetchKeyPackageRequest {
            identity_key: person.identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = self.client().call::<methods::FetchKeyPackage>(request).await;
        match answer {
            Ok(answer) if answer.package.is_empty() => Err(Error::NoKeys(person.username.clone())),
            Ok(answer) => Ok(answer.package),
            Err(error) if is_not_found(&error) => Err(Error::NoKeys(person.username.clone())),
            Err(error) => Err(error.into()),
        }
    }

    /// Who owns a key, by what we know or what the directory says.
    pub(super) async fn person(&self, identity: IdentityKey) -> Result<Person, Error> {
        let person = self.keeper().read(|state| state.people.person(&identity)).await?;
        if matches!(person.standing, Standing::Confirmed | Standing::Own) {
            return Ok(person);
        }
        let Some(name) = self.name_of(&identity).await? else {
            return Err(Error::NoSuchUser(person.username));
        };
        let person = self.confirm(identity, name).await?;
        match self.known(&person.username).await? {
            Some(known) if person.standing == Standing::NewKey => Err(Error::IdentityChanged {
                username: person.username,
                known: known.identity,
                now: identity,
            }),
            _ => Ok(person),
        }
    }

    /// Asks the directory about names that are only claimed so far, some at a time.
    pub(super) async fn check_names(&self) -> Result<(), Error> {
        let mut unchecked = self.keeper().read(|state| state.people.unchecked()).await?;
        unchecked.truncate(NAMES_AT_ONCE);
        let asked = unchecked.into_iter().map(async |(identity, claimed)| {
            self.name_of(&identity).await.map(|name| (identity, claimed, name))
        });
        let (checked, mut failed): (Vec<_>, Vec<_>) =
            join_all(asked).await.into_iter().partition(Result::is_ok);
        let checked: Vec<_> = checked.into_iter().flatten().collect();
        if !checked.is_empty() {
            self.keeper()
                .change(move |state| {
                    for (identity, claimed, name) in checked {
                        judge(state, identity, claimed, name);
                    }
                    Ok(())
                })
                .await?;
        }
        failed.pop().map_or(Ok(()), |failed| failed.map(drop))
    }

    async fn confirm(&self, identity: IdentityKey, username: Username) -> Result<Person, Error> {
        self.keeper()
            .change(move |state| {
                if identity != state.me() {
                    state.people.judge(identity, username);
                }
                Ok(state.people.person(&identity))
            })
            .await
    }

    async fn look_up(&self, username: &Username) -> Result<IdentityKey, Error> {
        let request =
            v1::ResolveUserRequest { username: username.to_string(), ..Default::default() };
        match self.client().call::<methods::ResolveUser>(request).await {
            Ok(answer) => IdentityKey::try_from(&answer.identity_key[..])
                .map_err(|_| CallError::Malformed { method: "ResolveUser" }.into()),
            Err(error) if is_not_found(&error) => Err(Error::NoSuchUser(username.clone())),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory's name for a key.
    async fn name_of(&self, identity: &IdentityKey) -> Result<Option<Username>, Error> {
        let request = v1::ResolveIdentityRequest {
            identity_key: identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        match self.client().call::<methods::ResolveIdentity>(request).await {
            Ok(answer) => Ok(Username::parse(&answer.username).ok()),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Notes what the directory says about a claim.
fn judge(state: &mut State, identity: IdentityKey, claimed: Username, name: Option<Username>) {
    if name.as_ref() == Some(&claimed) {
        if state.people.judge(identity, claimed) == Standing::NewKey {
            state.log.push(None, now(), Event::NewKey { person: identity });
        }
    } else {
        state.people.set(identity, claimed.clone(), Standing::Refuted);
        state.log.push(None, now(), Event::NameRefuted { person: identity, claimed });
    }
}

fn is_not_found(error: &CallError) -> bool {
    error.server().is_some_and(|error| error.status == Status::NotFound)
}
