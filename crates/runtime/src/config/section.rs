//! The declaration of settings: a tree of sections, whose leaves are values.

use figment::Figment;

use super::{Leaf, layers, problem::Problem};

/// A section or a value, which is declared, read and shown at a dotted path.
pub trait Node {
    /// Adds this node to `declared`. `self` is the default.
    fn describe(&self, about: About, declared: &mut Declared);

    /// Replaces the values that a layer sets.
    fn read(&mut self, path: &str, reader: &mut SettingReader<'_>);

    /// Appends the path and the value as TOML, `None` where nothing is set.
    fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>);
}

/// The description of a node, in addition to its type and default.
#[derive(Clone, Debug, Default)]
pub struct About {
    pub path: String,
    /// The doc comment, one paragraph.
    pub doc: String,
    unset: Option<&'static str>,
    variable: Option<&'static str>,
    flag: Option<&'static str>,
}

impl About {
    pub fn new(path: String, doc: &str) -> Self {
        let doc = doc.split_whitespace().collect::<Vec<_>>().join(" ");
        Self { path, doc, ..Self::default() }
    }

    /// Describes the default in words, where it depends on something else.
    #[must_use]
    pub fn unset(mut self, words: &'static str) -> Self {
        self.unset = Some(words);
        self
    }

    /// Adds a second environment variable.
    #[must_use]
    pub fn variable(mut self, name: &'static str) -> Self {
        self.variable = Some(name);
        self
    }

    /// Sets the command line flag.
    #[must_use]
    pub fn flag(mut self, name: &'static str) -> Self {
        self.flag = Some(name);
        self
    }
}

/// All sections and settings.
#[derive(Clone, Debug, Default)]
pub struct Declared {
    pub sections: Vec<Section>,
    pub settings: Vec<Setting>,
}

/// A group of settings.
#[derive(Clone, Debug)]
pub struct Section {
    pub path: String,
    pub doc: String,
}

/// One setting.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The path in the file, such as `tls.cert`.
    pub path: String,
    pub doc: String,
    /// The kind of value, in Markdown.
    pub kind: String,
    /// The default, in Markdown: as TOML in a code span, or in words.
    pub default: String,
    /// The environment variables that set it. The first one takes precedence.
    pub variables: Vec<String>,
    pub flag: Option<&'static str>,
}

impl Declared {
    pub fn of<T: Node + Default>() -> Self {
        let mut declared = Self::default();
        T::default().describe(About::default(), &mut declared);
        declared
    }

    /// Returns whether `path` is a setting.
    pub fn has_setting(&self, path: &str) -> bool {
        self.settings.iter().any(|setting| setting.path == path)
    }

    /// Returns whether `path` is a section or a part of one.
    pub fn has_below(&self, path: &str) -> bool {
        self.settings
            .iter()
            .any(|setting| below(&setting.path, path).is_some_and(|key| !key.is_empty()))
    }

    /// Returns the innermost section of `path`, and the key in it. The key is dotted where a group
    /// of keys has no section.
    pub fn place<'a>(&'a self, path: &'a str) -> (&'a Section, &'a str) {
        let inside = |section: &'a Section| Some((section, below(path, &section.path)?));
        let places = self.sections.iter().filter_map(inside);
        places.min_by_key(|(_, key)| key.len()).expect("the outermost section is in the list")
    }
}

/// Returns the part of `path` after `ancestor`.
fn below<'a>(path: &'a str, ancestor: &str) -> Option<&'a str> {
    if ancestor.is_empty() { Some(path) } else { path.strip_prefix(ancestor)?.strip_prefix('.') }
}

/// Reads values from the merged layers and collects problems.
#[derive(Debug)]
pub struct SettingReader<'a> {
    merged: &'a Figment,
    problems: &'a mut Vec<Problem>,
}

impl<'a> SettingReader<'a> {
    pub(super) fn new(merged: &'a Figment, problems: &'a mut Vec<Problem>) -> Self {
        Self { merged, problems }
    }

    /// Returns the value at `path`, if a layer has an allowed one.
    pub fn leaf<T: Leaf>(&mut self, path: &str) -> Option<T> {
        let value = self.merged.find_value(path).ok()?;
        let read = T::read(&value);
        if read.is_none() {
            self.problems.push(Problem::NotAllowed {
                at: layers::origin(self.merged, path).unwrap_or_default(),
                path: path.into(),
                given: if T::SECRET { None } else { super::leaf::text(&value) },
                allowed: T::allowed(),
            });
        }
        read
    }
}

impl<T: Leaf> Node for T {
    fn describe(&self, about: About, declared: &mut Declared) {
        let long =
            format!("QPQ_{}", about.path.to_uppercase().replace('.', "__").replace('-', "_"));
        declared.settings.push(Setting {
            doc: about.doc,
            kind: T::kind(),
            default: match (about.unset, self.show()) {
                (Some(words), _) => words.into(),
                (None, Some(value)) => format!("`{value}`"),
                (None, None) => "none".into(),
            },
            variables: std::iter::once(long).chain(about.variable.map(Into::into)).collect(),
            flag: about.flag,
            path: about.path,
        });
    }

    fn read(&mut self, path: &str, reader: &mut SettingReader<'_>) {
        if let Some(value) = reader.leaf(path) {
            *self = value;
        }
    }

    fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>) {
        values.push((path.into(), Leaf::show(self)));
    }
}

/// Joins a parent path, empty at the top, and a key.
pub fn join(parent: &str, child: &str) -> String {
    if parent.is_empty() { child.into() } else { format!("{parent}.{child}") }
}

/// Declares a section: a struct that implements [`Default`] and [`Node`].
///
/// The default may be followed by `unset: "the default in words"`, `variable: "ANOTHER_NAME"` and
/// `flag: "--name"`.
///
/// ```
/// qpq_runtime::section! {
///     /// The storage.
///     pub struct Keeping {
///         /// The maximum size.
///         max_bytes: qpq_runtime::config::Size = qpq_runtime::config::Size(1 << 20);
///         /// The directory.
///         place: std::path::PathBuf = "data".into(), variable: "QPQ_PLACE", flag: "--place";
///     }
/// }
/// ```
#[macro_export]
macro_rules! section {
    ($(#[doc = $about:literal])* $vis:vis struct $name:ident {
        $(
            $(#[doc = $doc:literal])*
            $field:ident : $type:ty = $default:expr $(, $word:ident : $value:literal)* ;
        )*
    }) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug)]
        $vis struct $name {
            $($(#[doc = $doc])* pub $field: $type,)*
        }

        impl ::std::default::Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $crate::config::Node for $name {
            fn describe(
                &self,
                about: $crate::config::About,
                declared: &mut $crate::config::Declared,
            ) {
                let section = $crate::config::Section { path: about.path.clone(), doc: about.doc };
                declared.sections.push(section);
                $($crate::config::Node::describe(
                    &self.$field,
                    $crate::config::About::new(
                        $crate::config::join(&about.path, stringify!($field)),
                        concat!($($doc, "\n"),*),
                    )$(.$word($value))*,
                    declared,
                );)*
            }

            fn read(&mut self, path: &str, reader: &mut $crate::config::SettingReader<'_>) {
                $($crate::config::Node::read(
                    &mut self.$field, &$crate::config::join(path, stringify!($field)), reader,
                );)*
            }

            fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>) {
                $($crate::config::Node::show(
                    &self.$field, &$crate::config::join(path, stringify!($field)), values,
                );)*
            }
        }
    };
}
