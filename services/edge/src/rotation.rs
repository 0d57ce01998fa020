//! Rotation of the key rings in the directory that all edges share: by the operator
//! ([`rotate`], for `qpq-admin`), and by a job.
//!
//! The job is right only where all edges read one directory. Where each edge has a copy, a rotation
//! by one edge would separate its copy from the others. Therefore the job runs only if the operator
//! sets `cluster.rotate_ticket_keys`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use async_trait::async_trait;
use qpq_domain::UnixMillis;
use qpq_jobs::{Completion, Failure, Policy, Work};
use qpq_ports::{Job, JobKind, NewJob};
use qpq_rpc::AtRestKeys;
use qpq_runtime::data_dir::{
    DataDir, DataDirError, SecretFile,
    cluster::{AT_REST_KEYS, ClusterDir, ClusterDirError, TICKET_KEYS},
};
use qpq_transport::KeyRing;
use rand::rngs::OsRng;

use crate::at_rest::{self, AtRestError};

/// Maximum time by which a rotation may be early, because the clock of the file system is not
/// exactly the clock of the jobs.
const TOLERANCE: Duration = Duration::from_secs(60);

/// The reason why a ring was not rotated.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(transparent)]
    Directory(#[from] ClusterDirError),
    #[error(
        "{path} is damaged: it does not contain three keys. All edges share the directory that \
         `qpq-admin init` created: copy this file from another edge or a backup"
    )]
    Damaged { path: PathBuf },
    #[error(transparent)]
    AtRest(#[from] AtRestError),
    #[error("{source}")]
    Write { source: DataDirError },
    #[error("{path} cannot be read: {source}")]
    Read { path: PathBuf, source: io::Error },
}

/// Rotates the ring in `file` of the shared directory: the next key becomes the current one, and
/// the current one stays valid as the previous one. Returns the path of the file.
///
/// Edges reload the file at different times. Therefore two rotations must be further apart than the
/// time that the slowest edge needs for a reload.
pub fn rotate(dir: &Path, file: SecretFile) -> Result<PathBuf, RotateError> {
    let dir = ClusterDir::open(dir)?;
    let path = dir.file(file.name);
    let Some(ring) = KeyRing::parse(&dir.secret(file)?) else {
        return Err(RotateError::Damaged { path });
    };
    dir.replace(file, &ring.rotated().to_bytes())
        .map_err(|source| RotateError::Write { source })?;
    Ok(path)
}

/// Appends a key to the keys at rest in the directory: the next key seals from now on, and all keys
/// stay. Returns the path of the file.
///
/// Servers read the file at their start. Two rotations must be separated by a restart of all edges.
pub fn rotate_at_rest_keys(dir: &Path) -> Result<PathBuf, RotateError> {
    if !dir.is_dir() {
        return Err(ClusterDirError::NoDirectory { path: dir.to_owned() }.into());
    }
    let data = DataDir::create(dir).map_err(|source| RotateError::Write { source })?;
    let path = dir.join(AT_REST_KEYS);
    let file = data.read_any(AT_REST_KEYS).map_err(AtRestError::from)?;
    let file = file
        .ok_or_else(|| AtRestError::MissingInCluster { path: path.clone(), dir: dir.to_owned() })?;
    let rotated = AtRestKeys::rotated(&file, &mut OsRng)
        .map_err(|source| AtRestError::Damaged { path: path.clone(), source })?;
    data.replace(AT_REST_KEYS, &rotated).map_err(|source| RotateError::Write { source })?;
    Ok(path)
}

/// The outcome of [`add_at_rest_keys`], with the path of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtRestKeysAdded {
    /// The file was created.
    Created(PathBuf),
    /// The file exists and is unchanged.
    Exists(PathBuf),
}

/// Creates the keys at rest in a shared directory of a release without them.
pub fn add_at_rest_keys(dir: &Path) -> Result<AtRestKeysAdded, RotateError> {
    let dir = ClusterDir::open(dir)?;
    let path = dir.file(AT_REST_KEYS);
    if let Some(file) = dir.read_any(AT_REST_KEYS)? {
        at_rest::parse(path.clone(), &file)?;
        return Ok(AtRestKeysAdded::Exists(path));
    }
    dir.add(AT_REST_KEYS, &AtRestKeys::generate(&mut OsRng))
        .map_err(|source| RotateError::Write { source })?;
    Ok(AtRestKeysAdded::Created(path))
}

/// Rotates the keys of TLS session tickets, on one edge at a time.
///
/// A rotation is due by the age of the file. Therefore a rotation by the operator counts, and a
/// repeated run rotates nothing.
#[derive(Clone, Debug)]
pub(crate) struct RotateTicketKeys {
    pub(crate) dir: PathBuf,
    pub(crate) interval: Duration,
}

impl RotateTicketKeys {
    const KIND: JobKind = JobKind::new("rotate_ticket_keys");

    /// Rotates the ring if it is old enough. Returns the time until the next rotation.
    fn rotate_if_due(&self, now: UnixMillis) -> Result<Duration, RotateError> {
        let path = self.dir.join(TICKET_KEYS.name);
        if let Some(left) = self.time_left(&path, now)? {
            return Ok(left);
        }
        rotate(&self.dir, TICKET_KEYS)?;
        tracing::info!(path = %path.display(), "ticket keys rotated");
        Ok(self.interval)
    }

    /// Returns the time until a rotation is due, or `None` if it is due.
    fn time_left(&self, path: &Path, now: UnixMillis) -> Result<Option<Duration>, RotateError> {
        let read = |source| RotateError::Read { path: path.into(), source };
        let modified = fs::metadata(path).and_then(|file| file.modified()).map_err(read)?;
        let since_epoch = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let rotated = UnixMillis::default().plus(since_epoch);
        // A time far in the future was written by a wrong clock and is ignored.
        if rotated > now.plus(self.interval) {
            return Ok(None);
        }
        let left = self.interval.saturating_sub(now.since(rotated));
        Ok((left > TOLERANCE).then_some(left))
    }
}

#[async_trait]
impl Work for RotateTicketKeys {
    fn kind(&self) -> JobKind {
        Self::KIND
    }

    fn policy(&self) -> Policy {
        Policy {
            concurrency: 1,
            // An edge with a writable directory may claim the next attempt.
            max_attempts: None,
            backoff_base: Duration::from_secs(10),
            horizon: 2 * self.interval,
            ..Policy::default()
        }
    }

    fn recurring(&self) -> Option<NewJob> {
        let key = Some(Vec::new());
        Some(NewJob { kind: Self::KIND, key, payload: Vec::new(), delay: self.interval })
    }

    async fn run(&self, _: &Job, now: UnixMillis) -> Result<Completion, Failure> {
        let work = self.clone();
        let rotated = tokio::task::spawn_blocking(move || work.rotate_if_due(now)).await;
        match rotated.map_err(|error| Failure::temporary(&error))? {
            Ok(next) => Ok(Completion::RepeatAfter(next)),
            Err(RotateError::Write { source }) => Err(Failure::Temporary(
                format!(
                    "{source}. Make cluster.secrets_dir writable for the edges, or unset \
                     cluster.rotate_ticket_keys and run `qpq-admin rotate-ticket-keys` every 6 hours"
                )
                .into(),
            )),
            Err(error) => Err(Failure::temporary(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::Permissions,
        os::unix::fs::{PermissionsExt as _, chown},
        thread,
        time::SystemTime,
    };

    use nix::unistd::{Uid, setfsuid};
    use qpq_ports::{Claim, Clock as _, JobId, SystemClock};

    use super::*;
    use crate::secrets::tests::shared_dir;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn ring(dir: &Path) -> Vec<u8> {
        fs::read(dir.join(TICKET_KEYS.name)).unwrap()
    }

    fn set_age(dir: &Path, now: UnixMillis, age: Duration) {
        let file = fs::File::options().append(true).open(dir.join(TICKET_KEYS.name)).unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(now.minus(age).0);
        file.set_modified(at).unwrap();
    }

    async fn run(dir: &Path, now: UnixMillis) -> Result<Completion, Failure> {
        let job =
            Job { claim: Claim { job: JobId(1), token: [0; 16] }, payload: Vec::new(), attempt: 1 };
        RotateTicketKeys { dir: dir.into(), interval: 6 * HOUR }.run(&job, now).await
    }

    #[tokio::test]
    async fn old_keys_are_rotated_and_not_rotated_again_by_a_repeated_run() {
        let dir = shared_dir();
        let now = SystemClock.now();
        let before = ring(dir.path());
        set_age(dir.path(), now, HOUR);
        assert_eq!(run(dir.path(), now).await, Ok(Completion::RepeatAfter(5 * HOUR)));
        assert_eq!(ring(dir.path()), before);
        set_age(dir.path(), now, 6 * HOUR);
        assert_eq!(run(dir.path(), now).await, Ok(Completion::RepeatAfter(6 * HOUR)));
        let after = ring(dir.path());
        assert_eq!(after[..64], before[32..]);
        let Ok(Completion::RepeatAfter(left)) = run(dir.path(), now).await else {
            panic!("it succeeds");
        };
        assert!(left > 5 * HOUR);
        assert_eq!(ring(dir.path()), after);
    }

    #[tokio::test]
    async fn a_file_from_the_far_future_does_not_stop_rotations() {
        let dir = shared_dir();
        let now = SystemClock.now();
        let before = ring(dir.path());
        set_age(dir.path(), now.plus(100 * 24 * HOUR), Duration::ZERO);
        assert_eq!(run(dir.path(), now).await, Ok(Completion::RepeatAfter(6 * HOUR)));
        assert_ne!(ring(dir.path()), before);
    }

    #[tokio::test]
    async fn the_error_names_a_damaged_ring_which_stays_unchanged() {
        let dir = shared_dir();
        fs::write(dir.path().join(TICKET_KEYS.name), [0; 96]).unwrap();
        set_age(dir.path(), SystemClock.now(), 6 * HOUR);
        let Err(Failure::Temporary(error)) = run(dir.path(), SystemClock.now()).await else {
            panic!("it fails");
        };
        assert!(error.contains("ticket-keys is damaged"), "{error}");
        assert_eq!(ring(dir.path()), [0; 96]);
    }

    /// Makes `dir` read-only and, if there is a `reader`, changes its owner to that user.
    fn make_read_only(dir: &Path, reader: Option<Uid>) {
        for entry in fs::read_dir(dir).unwrap() {
            chown(entry.unwrap().path(), reader.map(Uid::as_raw), None).unwrap();
        }
        chown(dir, reader.map(Uid::as_raw), None).unwrap();
        fs::set_permissions(dir, Permissions::from_mode(0o555)).unwrap();
    }

    #[test]
    fn the_error_names_a_read_only_directory_and_the_setting_to_correct() {
        let dir = shared_dir();
        let now = SystemClock.now();
        let before = ring(dir.path());
        set_age(dir.path(), now, 6 * HOUR);
        // Root may write to read-only directories, so as root the test runs the job as another
        // user.
        let reader = Uid::effective().is_root().then_some(Uid::from_raw(65_534));
        make_read_only(dir.path(), reader);
        // Only this thread and the threads of the runtime that it starts run as that user.
        let rotated = thread::scope(|scope| {
            let rotated = scope.spawn(|| {
                if let Some(reader) = reader {
                    setfsuid(reader);
                }
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(run(dir.path(), now))
            });
            rotated.join().unwrap()
        });
        let Err(Failure::Temporary(error)) = rotated else {
            panic!("it fails, and another edge may succeed");
        };
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
        assert!(error.contains("Permission denied"), "{error}");
        assert!(error.contains("Make cluster.secrets_dir writable for the edges, or"), "{error}");
        assert_eq!(ring(dir.path()), before);
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    }
}
