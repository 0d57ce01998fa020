//! The printed configuration: the reference in `docs/`, and the effective values for `config show`.

use std::fmt::Write as _;

use super::{Declared, Node, Setting};

/// Returns the reference of all settings of `T` as Markdown, without an introduction.
pub fn markdown<T: Node + Default>() -> String {
    let declared = Declared::of::<T>();
    let mut page = String::new();
    for section in &declared.sections {
        if section.path.is_empty() {
            page.push_str("\n## Top level\n\n");
        } else {
            let _ = write!(page, "\n## `[{}]`\n\n{}\n\n", section.path, section.doc);
        }
        let mut settings = declared
            .settings
            .iter()
            .map(|setting| (declared.place(&setting.path), setting))
            .filter(|((place, _), _)| place.path == section.path)
            .peekable();
        if settings.peek().is_some() {
            page.push_str("| key | kind | default | meaning |\n|---|---|---|---|\n");
        }
        settings.for_each(|((_, key), setting)| row(&mut page, key, setting));
    }
    page
}

fn row(page: &mut String, key: &str, setting: &Setting) {
    let Setting { doc, kind, default, variables, flag, .. } = setting;
    let others: Vec<_> = flag
        .iter()
        .copied()
        .chain(variables.iter().skip(1).map(|v| &**v))
        .map(|v| format!("`{v}`"))
        .collect();
    let also =
        if others.is_empty() { String::new() } else { format!(" Also {}.", others.join(", ")) };
    let _ = writeln!(page, "| `{key}` | {kind} | {default} | {doc}{also} |");
}

/// Returns the effective values as a TOML file, each with its origin as a comment. Settings without
/// a value are commented out.
pub(super) fn effective(
    declared: &Declared,
    values: &[(String, Option<String>)],
    origin: impl Fn(&str) -> Option<String>,
) -> String {
    let mut file = String::new();
    for section in &declared.sections {
        let inside: Vec<_> =
            values.iter().filter(|(path, _)| declared.place(path).0.path == section.path).collect();
        if !section.path.is_empty() && !inside.is_empty() {
            let _ = writeln!(file, "\n[{}]", section.path);
        }
        for (path, value) in inside {
            let (_, key) = declared.place(path);
            let origin = origin(path).unwrap_or_else(|| "default".into());
            let _ = match value {
                Some(value) => writeln!(file, "{key} = {value}  # {origin}"),
                None => {
                    let default =
                        declared.settings.iter().find(|s| s.path == *path).map(|s| &*s.default);
                    writeln!(file, "# {key} =  # {}", default.unwrap_or("none"))
                }
            };
        }
    }
    file
}
