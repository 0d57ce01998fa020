//! Configuration in layers: defaults, then a TOML file, then the environment, then flags; the later
//! one overrides.
//!
//! A setting is declared once, by [`section!`](crate::section): name, type, default and doc
//! comment. The declaration generates the struct that the program uses, the names of the
//! environment variables, `config show`, the reference in `docs/` and the list of allowed names. A
//! misspelt key or variable is refused, with the nearest name that exists.
//!
//! figment merges the layers and records the origin of each value; the types in `leaf` read the
//! values.

mod docs;
mod layers;
mod leaf;
mod problem;
mod section;
#[cfg(test)]
mod tests;

use std::{ffi::OsString, fmt, path::PathBuf};

use figment::Figment;
pub use figment::value::Value;

pub use docs::markdown;
pub use leaf::{Leaf, ListenOn, Named, Size};
pub use problem::{ConfigError, Problem};
pub use section::{About, Declared, Node, Section, Setting, SettingReader, join};

/// The outermost section of a program's settings.
pub trait Settings: Node + Default {
    /// Checks bounds, and rules about several values. Returns each rule that is broken.
    fn validate(&self) -> Vec<Broken>;
}

/// A rule that a value breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The path of the setting to change.
    pub path: &'static str,
    /// The allowed values, completing the sentence "... must be".
    pub must_be: String,
}

/// The sources of settings, in addition to the defaults.
#[derive(Clone, Default)]
pub struct Sources {
    /// The TOML file, if there is one.
    pub file: Option<PathBuf>,
    /// The environment of the process, see [`environment`].
    pub environment: Vec<(OsString, OsString)>,
    pub flags: Vec<Flag>,
    /// Variables with the prefix `QPQ_` that other programs read. They are ignored.
    pub foreign: &'static [&'static str],
}

/// A setting given on the command line.
#[derive(Clone)]
pub struct Flag {
    /// The name as typed, such as `--listen`.
    pub name: &'static str,
    pub path: &'static str,
    pub value: String,
}

/// Returns the whole environment of this process. No other code reads it.
pub fn environment() -> Vec<(OsString, OsString)> {
    std::env::vars_os().collect()
}

/// The effective settings with their origins.
pub struct Loaded<T> {
    pub settings: T,
    merged: Figment,
    declared: Declared,
}

/// Reads and checks all layers. The error lists every problem, not only the first.
pub fn load<T: Settings>(sources: Sources) -> Result<Loaded<T>, ConfigError> {
    let declared = Declared::of::<T>();
    let mut problems = Vec::new();
    let merged = layers::merge(&declared, sources, &mut problems);
    let mut settings = T::default();
    let mut reader = SettingReader::new(&merged, &mut problems);
    settings.read("", &mut reader);
    if problems.is_empty() {
        problems.extend(settings.validate().into_iter().map(|broken| Problem::RuleBroken {
            at: layers::origin(&merged, broken.path).unwrap_or_else(|| "default".into()),
            path: broken.path.into(),
            must_be: broken.must_be,
        }));
    }
    if problems.is_empty() {
        Ok(Loaded { settings, merged, declared })
    } else {
        Err(ConfigError { problems })
    }
}

impl<T: Settings> Loaded<T> {
    /// Returns the paths of the settings that have another value in `other`, except secrets.
    pub fn changes(&self, other: &Self) -> Vec<String> {
        let values = |loaded: &Self| {
            let mut values = Vec::new();
            loaded.settings.show("", &mut values);
            values
        };
        let (before, after) = (values(self), values(other));
        let differing = before.into_iter().zip(after).filter(|(before, after)| before != after);
        differing.map(|((path, _), _)| path).collect()
    }

    /// Returns the effective settings as a TOML file, with the origin of each value as a comment.
    /// Secrets are redacted.
    pub fn show(&self) -> String {
        let mut values = Vec::new();
        self.settings.show("", &mut values);
        docs::effective(&self.declared, &values, |path| layers::origin(&self.merged, path))
    }
}

// Not derived, because the values in the layers may be secret.

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flag").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<T: fmt::Debug> fmt::Debug for Loaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("settings", &self.settings).finish_non_exhaustive()
    }
}
