//! Configuration in layers: defaults, then a TOML file, then the environment, then flags; the later
//! one wins.
//!
//! A setting is declared once, by [`section!`](crate::section): name, type, default and doc
//! comment. From the declaration come the struct that the program uses, the names of the
//! environment variables, `config show`, the reference in `docs/`, and the list of what exists,
//! outside of which nothing is accepted: a misspelt key or variable is refused by name, with the
//! nearest one that exists.
//!
//! figment merges the layers and remembers where each value came from; the types in `leaf` read the
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
pub use leaf::{Choice, Leaf, ListenOn, Size};
pub use problem::{ConfigError, Problem};
pub use section::{About, Declared, Node, Reader, Section, Setting, join};

/// The settings of a program: its outermost section.
pub trait Settings: Node + Default {
    /// The rules that need more than one value, or a bound on one. Each broken one is a [`Broken`]
    /// rule.
    fn validate(&self) -> Vec<Broken>;
}

/// A rule that a value breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The setting to change.
    pub path: &'static str,
    /// What is allowed, as a sentence that ends "... must be".
    pub must_be: String,
}

/// Where settings are read from, besides their defaults.
#[derive(Clone, Default)]
pub struct Sources {
    /// The TOML file, if one was named.
    pub file: Option<PathBuf>,
    /// The process's environment, see [`environment`].
    pub environment: Vec<(OsString, OsString)>,
    pub flags: Vec<Flag>,
    /// Variables with our prefix that other programs read, which are left alone.
    pub foreign: &'static [&'static str],
}

/// A setting given on the command line.
#[derive(Clone)]
pub struct Flag {
    /// As typed, `--listen`.
    pub name: &'static str,
    pub path: &'static str,
    pub value: String,
}

/// The environment of this process, whole. The one place that reads it.
pub fn environment() -> Vec<(OsString, OsString)> {
    std::env::vars_os().collect()
}

/// The settings that are in force, and where they came from.
pub struct Loaded<T> {
    pub settings: T,
    merged: Figment,
    declared: Declared,
}

/// Reads and checks all layers. Every problem is in the error, not only the first.
pub fn load<T: Settings>(sources: Sources) -> Result<Loaded<T>, ConfigError> {
    let declared = Declared::of::<T>();
    let mut problems = Vec::new();
    let merged = layers::merge(&declared, sources, &mut problems);
    let mut settings = T::default();
    let mut reader = Reader::new(&merged, &mut problems);
    settings.read("", &mut reader);
    if problems.is_empty() {
        problems.extend(settings.validate().into_iter().map(|broken| Problem::Broken {
            at: layers::origin(&merged, broken.path).unwrap_or_else(|| "not given".into()),
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
    /// The paths of the settings that have another value in `other`. Of secrets it is not told.
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

    /// What is in force, as a TOML file with each value's origin as a comment. Secrets are
    /// redacted.
    pub fn show(&self) -> String {
        let mut values = Vec::new();
        self.settings.show("", &mut values);
        docs::effective(&self.declared, &values, |path| layers::origin(&self.merged, path))
    }
}

// Not derived: the values in the layers may be secret.

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
