//! The server's directory: names to keys and back, and the KeyPackages that start a conversation.

use std::time::Duration;

use futures_util::future::join_all;
use qpq_domain::{IdentityKey, UnixMillis, Username};
use qpq_proto::{Status, methods, v1};

use super::{
    Messenger,
    decisions::Decision,
    log::Event,
    now,
    people::{Person, Standing},
    state::{PACKAGES_SINCE, REPLACE_PACKAGES, State},
};
use crate::error::{CallError, Error};

/// The number of our KeyPackages on the server after they were filled up.
const TARGET_PACKAGES: usize = 20;
/// Our KeyPackages on the server are filled up when fewer than this number are left.
const MIN_PACKAGES: u32 = 10;

/// The maximum number of names that are looked up at a time. A group of thousands must not cause
/// thousands of calls.
pub(super) const MAX_LOOKUPS: usize = 32;

/// The age at which our KeyPackages are replaced. They are valid for 84 days, and inviters refuse
/// those that expire within 31 days.
const RENEWED_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
/// The maximum time by which this machine's clock may be set back without a replacement of
/// packages.
const CLOCK_MARGIN: Duration = Duration::from_secs(3600);

/// The effect of an upload of KeyPackages on those that the server already has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upload {
    Adding,
    Replacing,
}

impl Messenger {
    /// Looks a user up. The directory must return the same key for the name as before.
    ///
    /// # Errors
    /// [`Error::NoSuchUser`], [`Error::IdentityChanged`].
    pub async fn resolve(&self, username: &Username) -> Result<Person, Error> {
        let identity = self.look_up(username).await?;
        let name = username.clone();
        let known = self.store().read(move |state| Ok(state.people.confirmed(&name)?)).await?;
        match known {
            Some(known) if known != identity => {
                Err(Error::IdentityChanged { username: username.clone(), known, now: identity })
            }
            Some(_) => self.store().read(move |state| Ok(state.people.person(&identity)?)).await,
            None => self.confirm(identity, username.clone()).await,
        }
    }

    /// Returns the person who is known to have this name, without asking the server.
    pub async fn known(&self, username: &Username) -> Result<Option<Person>, Error> {
        let name = username.clone();
        self.store()
            .read(move |state| {
                let Some(identity) = state.people.confirmed(&name)? else { return Ok(None) };
                Ok(Some(state.people.person(&identity)?))
            })
            .await
    }

    /// Returns the time at which this account was registered, by the server's clock.
    pub async fn registered_at(&self) -> Result<UnixMillis, Error> {
        let request = v1::ResolveIdentityRequest {
            identity_key: self.profile().identity.as_bytes().to_vec().into(),
            ..Default::default()
        };
        let answer = self.client().call::<methods::ResolveIdentity>(request).await?;
        Ok(UnixMillis(answer.created_at))
    }

    /// Accepts the directory's new key for a user, after [`Error::IdentityChanged`].
    ///
    /// Call this only once the person has confirmed the new key. Messages from the old key count as
    /// another person's from then on.
    pub async fn accept_new_identity(&self, username: &Username) -> Result<Person, Error> {
        let identity = self.look_up(username).await?;
        let name = username.clone();
        self.store()
            .change(move |state| {
                if let Some(old) = state.people.confirmed(&name)?.filter(|old| *old != identity) {
                    state.people.set(old, name, Standing::Refuted)?;
                }
                Ok(())
            })
            .await?;
        self.store().change(move |state| Ok(state.note_contact(&identity)?)).await?;
        self.confirm(identity, username.clone()).await
    }

    /// Notes that the safety number with a user was compared and is the same on both sides. Returns
    /// the time of the note.
    pub async fn mark_compared(&self, username: &Username) -> Result<UnixMillis, Error> {
        let person = self.resolve(username).await?;
        let at = now();
        self.store()
            .change(move |state| {
                let Person { identity, username, .. } = person;
                state.people.set_compared(&identity, at)?;
                state.note_acquaintance(&identity)?;
                Ok(state.share(&Decision::Compared { identity, username, at })?)
            })
            .await?;
        self.send_decisions().await;
        Ok(at)
    }

    /// Returns the time at which the safety number with the owner of this key was compared; `None`
    /// if never compared.
    pub async fn compared_at(&self, identity: &IdentityKey) -> Result<Option<UnixMillis>, Error> {
        let identity = *identity;
        self.store().read(move |state| Ok(state.people.compared_at(&identity)?)).await
    }

    /// Fills up our KeyPackages on the server, so that others can start conversations with us.
    ///
    /// All packages are replaced if the old ones would be useless or issued a second time: after
    /// the server's store went back in time, after the packages were created with a wrong clock,
    /// and every 30 days, so that no client receives a package that is about to expire.
    pub async fn publish_key_packages(&self) -> Result<(), Error> {
        self.publish_key_packages_at(now()).await
    }

    /// Fills up our KeyPackages at the time `now`, for tests. See
    /// [`Messenger::publish_key_packages`].
    #[doc(hidden)]
    pub async fn publish_key_packages_at(&self, now: UnixMillis) -> Result<(), Error> {
        self.ensure_device().await?;
        let client = self.client();
        let left = client
            .call::<methods::CountKeyPackages>(v1::CountKeyPackagesRequest::default())
            .await?;
        let replace = self.store().read(move |state| is_replacement_due(state, now)).await?;
        if replace {
            self.upload_packages(TARGET_PACKAGES, Upload::Replacing, now).await?;
        } else if left.available < MIN_PACKAGES {
            self.upload_packages(TARGET_PACKAGES - left.available as usize, Upload::Adding, now)
                .await?;
        }
        if replace || !left.has_last_resort {
            let package = self
                .store()
                .change(move |state| Ok(state.mls.last_resort_key_package(now)?))
                .await?;
            client
                .call::<methods::UploadKeyPackage>(v1::UploadKeyPackageRequest {
                    package: package.into(),
                    last_resort: true,
                    ..Default::default()
                })
                .await?;
        }
        if replace {
            // Noted after the upload: a crash in between leads to another replacement.
            let replaced = move |state: &mut State| {
                state.set_number(REPLACE_PACKAGES, None)?;
                Ok(state.set_number(PACKAGES_SINCE, Some(now.0))?)
            };
            self.store().change(replaced).await?;
        }
        Ok(())
    }

    async fn upload_packages(
        &self,
        count: usize,
        upload: Upload,
        now: UnixMillis,
    ) -> Result<(), Error> {
        // The packages are saved before the upload, since the state has their private halves.
        let packages =
            self.store().change(move |state| Ok(state.mls.key_packages(count, now)?)).await?;
        let mut packages = packages.into_iter().map(Into::into);
        self.client()
            .call::<methods::UploadKeyPackage>(v1::UploadKeyPackageRequest {
                package: packages.next().expect("at least one is missing"),
                more_packages: packages.collect(),
                replace: upload == Upload::Replacing,
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    /// Returns the owner of a key, from the profile's own records or from the directory.
    pub(super) async fn person(&self, identity: IdentityKey) -> Result<Person, Error> {
        let person = self.store().read(move |state| Ok(state.people.person(&identity)?)).await?;
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

    /// Asks the directory about names that are only claimed so far, up to [`MAX_LOOKUPS`] at a
    /// time.
    pub(super) async fn check_names(&self) -> Result<(), Error> {
        let mut unchecked = self.store().read(|state| Ok(state.people.unchecked()?)).await?;
        unchecked.truncate(MAX_LOOKUPS);
        let asked = unchecked.into_iter().map(async |(identity, claimed)| {
            self.name_of(&identity).await.map(|name| (identity, claimed, name))
        });
        let (checked, mut failed): (Vec<_>, Vec<_>) =
            join_all(asked).await.into_iter().partition(Result::is_ok);
        let checked: Vec<_> = checked.into_iter().flatten().collect();
        if !checked.is_empty() {
            self.store()
                .change(move |state| {
                    checked.into_iter().try_for_each(|(identity, claimed, name)| {
                        judge(state, identity, claimed, name)
                    })
                })
                .await?;
        }
        failed.pop().map_or(Ok(()), |failed| failed.map(drop))
    }

    async fn confirm(&self, identity: IdentityKey, username: Username) -> Result<Person, Error> {
        self.store()
            .change(move |state| {
                if identity != state.me() {
                    state.people.judge(identity, username)?;
                }
                Ok(state.people.person(&identity)?)
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

    /// Returns the directory's name for a key.
    pub(super) async fn name_of(&self, identity: &IdentityKey) -> Result<Option<Username>, Error> {
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

/// Notes the directory's answer about a claimed name.
fn judge(
    state: &mut State,
    identity: IdentityKey,
    claimed: Username,
    name: Option<Username>,
) -> Result<(), Error> {
    if name.as_ref() == Some(&claimed) {
        if state.people.judge(identity, claimed)? == Standing::NewKey {
            state.log.push(None, now(), Event::NewKey { person: identity })?;
        }
    } else {
        state.people.set(identity, claimed.clone(), Standing::Refuted)?;
        state.log.push(None, now(), Event::NameRefuted { person: identity, claimed })?;
    }
    Ok(())
}

/// Returns whether all of our KeyPackages on the server must be replaced.
fn is_replacement_due(state: &State, now: UnixMillis) -> Result<bool, Error> {
    if state.number(REPLACE_PACKAGES)?.is_some() {
        return Ok(true);
    }
    // A time after now is from a wrong clock. Packages created at such a time are not yet valid.
    let is_due = |since: u64| {
        let since = UnixMillis(since);
        since > now.plus(CLOCK_MARGIN) || since.plus(RENEWED_AFTER) <= now
    };
    Ok(state.number(PACKAGES_SINCE)?.is_none_or(is_due))
}

pub(super) fn is_not_found(error: &CallError) -> bool {
    error.server().is_some_and(|error| error.status == Status::NotFound)
}

#[cfg(test)]
mod tests {
    use qpq_mls::{Identity, database::Database};

    use super::*;

    #[test]
    fn key_packages_are_replaced_after_30_days_and_after_a_wrong_clock() {
        let name = Username::parse("alice").unwrap();
        let state = State::create(&Database::in_memory(), Identity::generate(), name).unwrap();
        let day = Duration::from_secs(24 * 3600);
        let start = UnixMillis(1_800_000_000_000);
        let is_due = |now| is_replacement_due(&state, now).unwrap();
        assert!(is_due(start), "none were published");
        state.set_number(PACKAGES_SINCE, Some(start.0)).unwrap();
        assert!(!is_due(start));
        assert!(!is_due(start.plus(RENEWED_AFTER).minus(Duration::from_secs(1))));
        assert!(is_due(start.plus(day * 30)));
        // The packages were created while the clock was ahead. A small correction replaces none.
        assert!(!is_due(start.minus(CLOCK_MARGIN)));
        assert!(is_due(start.minus(CLOCK_MARGIN + Duration::from_secs(1))));
        assert!(is_due(start.minus(day * 365)));
        state.replace_packages().unwrap();
        assert!(is_due(start), "the server's store went back");
    }
}
