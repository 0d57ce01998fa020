//! Merges the file, the environment and the flags, and refuses unknown names in them.

use std::{ffi::OsString, fs, path::PathBuf};

use figment::{
    Error, Figment, Metadata, Profile, Provider,
    providers::{Format, Toml},
    util::nest,
    value::{Dict, Map, Value},
};

use super::{Declared, Flag, Sources, problem::Problem};

/// The prefix of all variables.
const PREFIX: &str = "QPQ_";
/// The variable that names the file if no flag names it.
const FILE_VARIABLE: &str = "QPQ_CONFIG";

/// The values of one origin.
struct Layer {
    origin: String,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

impl Layer {
    /// Creates a layer with one value at a dotted path.
    fn single(origin: &str, path: &str, value: String) -> Self {
        let values =
            nest(path, Value::from(value)).into_dict().expect("a path has at least one component");
        Self { origin: origin.into(), values }
    }
}

/// Merges all layers; later ones take precedence. Values that cannot be accepted are left out and
/// become problems.
pub(super) fn merge(declared: &Declared, sources: Sources, problems: &mut Vec<Problem>) -> Figment {
    let variables = text_of(sources.environment, declared, problems);
    let named =
        variables.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, file)| file.into());
    let file = sources.file.or(named).and_then(|file| from_file(file, declared, problems));
    refuse_unknown(&variables, declared, sources.foreign, problems);
    file.into_iter()
        .chain(from_variables(&variables, declared))
        .chain(
            sources
                .flags
                .into_iter()
                .map(|Flag { name, path, value }| Layer::single(name, path, value)),
        )
        .fold(Figment::new(), Figment::merge)
}

/// Returns the origin of the value at `path`, `None` for a default.
pub(super) fn origin(merged: &Figment, path: &str) -> Option<String> {
    merged.find_metadata(path).map(|metadata| metadata.name.to_string())
}

fn from_file(file: PathBuf, declared: &Declared, problems: &mut Vec<Problem>) -> Option<Layer> {
    let origin = format!("file {}", file.display());
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) => {
            problems.push(Problem::Unreadable { file, why: error.to_string() });
            return None;
        }
    };
    match Toml::from_str::<Dict>(&text) {
        Ok(values) => {
            check_keys("", &values, &origin, declared, problems);
            Some(Layer { origin, values })
        }
        Err(error) => {
            problems.push(Problem::Malformed { file, why: error.to_string().trim_end().into() });
            None
        }
    }
}

fn check_keys(
    at: &str,
    values: &Dict,
    origin: &str,
    declared: &Declared,
    problems: &mut Vec<Problem>,
) {
    for (key, value) in values {
        let path = super::join(at, key);
        let origin = origin.to_owned();
        match value {
            _ if declared.has_setting(&path) => {}
            Value::Dict(_, inner) if declared.has_below(&path) => {
                check_keys(&path, inner, &origin, declared, problems);
            }
            _ if declared.has_below(&path) => {
                problems.push(Problem::NotAValue { at: origin, section: path });
            }
            _ => {
                let known = declared.settings.iter().map(|setting| &*setting.path);
                let sections = declared.sections.iter().map(|section| &*section.path);
                let nearest = nearest(&path, known.chain(sections));
                problems.push(Problem::Unknown { at: origin, name: path, nearest });
            }
        }
    }
}

/// Returns the variables that have the prefix or that a setting names, as text.
fn text_of(
    environment: Vec<(OsString, OsString)>,
    declared: &Declared,
    problems: &mut Vec<Problem>,
) -> Vec<(String, String)> {
    let ours = |name: &str| {
        name.starts_with(PREFIX)
            || declared.settings.iter().any(|s| s.variables.iter().any(|v| v == name))
    };
    environment
        .into_iter()
        .filter_map(|(name, value)| {
            Some((name.into_string().ok().filter(|name| ours(name))?, value))
        })
        .filter_map(|(name, value)| match value.into_string() {
            Ok(value) => Some((name, value)),
            Err(_) => {
                let must_be = "valid UTF-8".into();
                problems.push(Problem::RuleBroken {
                    at: "environment".into(),
                    path: name,
                    must_be,
                });
                None
            }
        })
        .collect()
}

fn from_variables(variables: &[(String, String)], declared: &Declared) -> Vec<Layer> {
    let value_of =
        |name: &str| variables.iter().find(|(given, _)| given == name).map(|(_, value)| value);
    let of_setting = |setting: &super::Setting| -> Vec<Layer> {
        let names = setting.variables.iter().rev();
        names
            .filter_map(|name| Some(Layer::single(name, &setting.path, value_of(name)?.clone())))
            .collect()
    };
    declared.settings.iter().flat_map(of_setting).collect()
}

fn refuse_unknown(
    variables: &[(String, String)],
    declared: &Declared,
    foreign: &[&str],
    problems: &mut Vec<Problem>,
) {
    let settable =
        || declared.settings.iter().flat_map(|setting| &setting.variables).map(|name| &**name);
    for (name, _) in variables {
        let known = name == FILE_VARIABLE
            || foreign.contains(&&**name)
            || settable().any(|known| known == name);
        if !known {
            let nearest = nearest(name, settable().chain([FILE_VARIABLE]));
            problems.push(Problem::Unknown {
                at: "environment".into(),
                name: format!("variable {name}"),
                nearest,
            });
        }
    }
}

/// Returns the most similar candidate: one that differs by few letters, else one with the same last
/// part in another section.
fn nearest<'a>(given: &str, candidates: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
    let last = |path: &'a str| path.rsplit('.').next().expect("split gives at least one part");
    let near = candidates
        .clone()
        .map(|candidate| (distance(given, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 2.max(candidate.len() / 4));
    let elsewhere =
        || candidates.clone().find(|candidate| given.rsplit('.').next() == Some(last(candidate)));
    near.map(|(_, candidate)| candidate).or_else(elsewhere).map(Into::into)
}

/// Returns the Levenshtein distance: letters to insert, delete or replace to get from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_single_edits() {
        assert_eq!(distance("listen", "listen"), 0);
        assert_eq!(distance("listn", "listen"), 1);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn nearest_prefers_few_edits_then_the_same_last_part() {
        let known = ["listen", "tls.cert", "delivery.max_payload"];
        let nearest = |given| nearest(given, known.iter().copied());
        assert_eq!(nearest("tls.cret").as_deref(), Some("tls.cert"));
        assert_eq!(nearest("limits.max_payload").as_deref(), Some("delivery.max_payload"));
        assert_eq!(nearest("colour"), None);
    }
}
