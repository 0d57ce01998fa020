//! The manifest of a backup: its origin, its parts and their hashes.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The format that this version writes and reads.
pub(super) const FORMAT: u32 = 1;

pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const MANIFEST_HASH: &str = "manifest.sha256";

/// The kind of the store in a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum StoreKind {
    SingleNode,
    Cluster,
}

/// The contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: u32,
    pub(super) kind: StoreKind,
    /// The version of the program that wrote the backup.
    pub(super) qpq_version: String,
    /// The time in UTC, as in 2026-11-28T13:45:00Z. The backup has the state of a commit at or
    /// after this time.
    pub(super) taken_at: String,
    /// The store id, in hexadecimal digits.
    pub(super) store_id: String,
    /// The number of the last migration of the database.
    pub(super) schema: i64,
    /// The row counts by table.
    pub(super) rows: BTreeMap<String, u64>,
    pub(super) parts: Vec<Part>,
}

/// A file of the backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    /// The path within the backup.
    pub(super) name: String,
    pub(super) bytes: u64,
    /// The SHA-256 of the file in hexadecimal digits.
    pub(super) sha256: String,
}

/// The reason why a directory cannot be used as a backup.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    #[error(
        "{} is not a complete backup: it has no {MANIFEST}. Name a directory that `qpq-admin backup` created",
        .0.display()
    )]
    Missing(PathBuf),
    #[error("{} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is damaged: {why}. Use another backup", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error(
        "{} has format {found}, and this version reads format {FORMAT}: use the version of \
         qpq-admin that wrote it, or a newer one",
        path.display()
    )]
    Format { path: PathBuf, found: u64 },
}

impl Manifest {
    /// Returns the contents of `manifest.json` and of `manifest.sha256`.
    pub(super) fn to_files(&self) -> (Vec<u8>, Vec<u8>) {
        let mut json = serde_json::to_vec_pretty(self).expect("text and numbers");
        json.push(b'\n');
        let hash = format!("{}  {MANIFEST}\n", hex::encode(Sha256::digest(&json)));
        (json, hash.into_bytes())
    }

    /// Reads the manifest of the backup in `dir` and checks its hash.
    pub(super) fn read(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(MANIFEST);
        let read = |path: PathBuf| {
            fs::read(&path).map_err(|source| match source.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                    ManifestError::Missing(dir.to_owned())
                }
                _ => ManifestError::Read { path, source },
            })
        };
        let json = read(path.clone())?;
        let written = read(dir.join(MANIFEST_HASH))?;
        let damaged = |path: &Path, why: &str| ManifestError::Damaged {
            path: path.to_owned(),
            why: why.to_owned(),
        };
        let expected = format!("{}  {MANIFEST}\n", hex::encode(Sha256::digest(&json)));
        if written != expected.as_bytes() {
            return Err(damaged(
                &path,
                &format!("its SHA-256 differs from the one in {MANIFEST_HASH}"),
            ));
        }
        let value: serde_json::Value =
            serde_json::from_slice(&json).map_err(|error| damaged(&path, &error.to_string()))?;
        match value["format"].as_u64() {
            Some(found) if found == u64::from(FORMAT) => {}
            Some(found) => return Err(ManifestError::Format { path, found }),
            None => return Err(damaged(&path, "it has no format")),
        }
        let manifest: Self =
            serde_json::from_value(value).map_err(|error| damaged(&path, &error.to_string()))?;
        if let Some(part) = manifest.parts.iter().find(|part| !part.is_inside()) {
            return Err(damaged(&path, &format!("{:?} is not a valid name of a part", part.name)));
        }
        Ok(manifest)
    }
}

impl Part {
    /// Returns whether the name is a path within the backup.
    fn is_inside(&self) -> bool {
        let path = Path::new(&self.name);
        path.components().all(|part| matches!(part, std::path::Component::Normal(_)))
            && path.components().next().is_some()
    }
}

impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SingleNode => "a single node",
            Self::Cluster => "a cluster",
        })
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A cluster stores messages in several tables: `message_0`, `message_1` and so on.
        let is_of = |name: &str, table: &str| {
            let rest = name.strip_prefix(table);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        let rows = |table: &str| -> u64 {
            self.rows.iter().filter(|(name, _)| is_of(name, table)).map(|(_, rows)| rows).sum()
        };
        let bytes: u64 = self.parts.iter().map(|part| part.bytes).sum();
        writeln!(f, "  taken at   {} by qpq-admin {}", self.taken_at, self.qpq_version)?;
        writeln!(f, "  store id   {}", self.store_id)?;
        // A deleted account has no inbox.
        writeln!(f, "  accounts   {}", rows("inbox"))?;
        writeln!(f, "  messages   {}", rows("message"))?;
        writeln!(f, "  size       {bytes} bytes in {} files", self.parts.len())
    }
}

/// Formats a time as in RFC 3339, in UTC, to the second.
pub(super) fn utc(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Years that begin in March, in eras of 400 years (Hinnant, "chrono-compatible low-level date
    // algorithms").
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, year) =
        if month < 10 { (month + 3, era * 400 + year) } else { (month - 9, era * 400 + year + 1) };
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_835_395_200, "2028-02-29T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn part_names_outside_of_the_backup_are_refused() {
        let part = |name: &str| Part { name: name.into(), bytes: 0, sha256: String::new() };
        assert!(part("qpq.db").is_inside() && part("shared/cluster-id").is_inside());
        for outside in ["", "/etc/passwd", "../x", "shared/../../x", "./x"] {
            assert!(!part(outside).is_inside(), "{outside}");
        }
    }
}
