//! The problems of a configuration. Each message names the place and the allowed values.

use std::{fmt, path::PathBuf};

/// One problem of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The file cannot be read.
    Unreadable { file: PathBuf, why: String },
    /// The file is not TOML.
    Malformed { file: PathBuf, why: String },
    /// An unknown key or variable.
    Unknown { at: String, name: String, nearest: Option<String> },
    /// A value for a name that is a section.
    NotAValue { at: String, section: String },
    /// A value of the wrong kind. `given` is absent for secrets.
    NotAllowed { at: String, path: String, given: Option<String>, allowed: String },
    /// A value that breaks a rule of the program.
    RuleBroken { at: String, path: String, must_be: String },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { file, why } => {
                write!(f, "file {}: cannot be read: {why}", file.display())
            }
            Self::Malformed { file, why } => {
                write!(f, "file {}: is not TOML: {why}", file.display())
            }
            Self::Unknown { at, name, nearest: Some(nearest) } => {
                write!(f, "{at}: there is no {name}; did you mean {nearest}?")
            }
            Self::Unknown { at, name, nearest: None } => {
                write!(f, "{at}: there is no {name}; see docs/configuration.md")
            }
            Self::NotAValue { at, section } => {
                write!(f, "{at}: {section} is a section: write [{section}]")
            }
            Self::NotAllowed { at, path, given: Some(given), allowed } => {
                write!(f, "{at}: {path} is {given:?}, but must be {allowed}")
            }
            Self::NotAllowed { at, path, given: None, allowed } => {
                write!(f, "{at}: {path} must be {allowed}")
            }
            Self::RuleBroken { at, path, must_be } => write!(f, "{at}: {path} must be {must_be}"),
        }
    }
}

/// The problems that make a configuration unusable.
#[derive(Clone, Debug)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the configuration cannot be used")?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for ConfigError {}
