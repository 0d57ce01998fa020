//! The kinds of values of settings. Each is read from its natural TOML type or from text, because
//! environment variables and flags are text.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use figment::value::Value;
use qpq_domain::Choice;
use secrecy::SecretString;

/// A kind of value.
pub trait Leaf: Sized {
    /// `true` if values of this kind must not appear in errors.
    const SECRET: bool = false;

    /// Returns the name of the kind, for the reference.
    fn kind() -> String;

    /// Returns the allowed values, completing the sentence "must be ...".
    fn allowed() -> String;

    /// Reads a value. Returns `None` if it is not allowed.
    fn read(value: &Value) -> Option<Self>;

    /// Returns the value as TOML, `None` if nothing is set.
    fn show(&self) -> Option<String>;
}

/// A value that is one of a few names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named<T>(pub T);

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// An address to listen on, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenOn {
    Off,
    At(SocketAddr),
}

const UNITS_OF_TIME: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const UNITS_OF_SIZE: [(&str, u64); 4] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// Returns a scalar as text.
pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.clone()),
        Value::Char(_, one) => Some(one.to_string()),
        Value::Bool(_, truth) => Some(truth.to_string()),
        Value::Num(_, number) => number
            .to_i128()
            .map(|n| n.to_string())
            .or_else(|| number.to_u128().map(|n| n.to_string()))
            .or_else(|| number.to_f64().map(|n| n.to_string())),
        Value::Empty(..) | Value::Dict(..) | Value::Array(..) => None,
    }
}

fn quoted(text: impl Into<String>) -> Option<String> {
    Some(toml::Value::String(text.into()).to_string())
}

/// Parses a number followed by one of `units`. A number without a unit has the unit `bare`.
fn in_units(text: &str, units: &[(&str, u64)], bare: u64) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let each = match unit.trim() {
        "" => bare,
        unit => units.iter().find(|(name, _)| *name == unit)?.1,
    };
    number.parse::<u64>().ok()?.checked_mul(each)
}

/// Formats `amount` in the largest unit that divides it.
fn with_unit(amount: u64, units: &[(&str, u64)]) -> String {
    let (name, each) = units
        .iter()
        .rev()
        .find(|(_, each)| amount != 0 && amount.is_multiple_of(*each))
        .unwrap_or(&units[usize::from(units[0].0 == "ms")]);
    format!("{}{name}", amount / each)
}

impl Leaf for bool {
    fn kind() -> String {
        "truth".into()
    }

    fn allowed() -> String {
        "true or false".into()
    }

    fn read(value: &Value) -> Option<Self> {
        text(value)?.parse().ok()
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {$(
        impl Leaf for $type {
            fn kind() -> String {
                "number".into()
            }

            fn allowed() -> String {
                "a whole number".into()
            }

            fn read(value: &Value) -> Option<Self> {
                text(value)?.parse().ok()
            }

            fn show(&self) -> Option<String> {
                Some(self.to_string())
            }
        }
    )*};
}
whole_numbers!(u32, u64, usize);

impl Leaf for String {
    fn kind() -> String {
        "text".into()
    }

    fn allowed() -> String {
        "text".into()
    }

    fn read(value: &Value) -> Option<Self> {
        text(value)
    }

    fn show(&self) -> Option<String> {
        quoted(self)
    }
}

impl Leaf for PathBuf {
    fn kind() -> String {
        "path".into()
    }

    fn allowed() -> String {
        "a path".into()
    }

    fn read(value: &Value) -> Option<Self> {
        text(value).filter(|path| !path.is_empty()).map(Into::into)
    }

    fn show(&self) -> Option<String> {
        quoted(self.to_string_lossy())
    }
}

impl Leaf for SocketAddr {
    fn kind() -> String {
        "address".into()
    }

    fn allowed() -> String {
        "an address and port, as in 0.0.0.0:5001 or [::]:5001".into()
    }

    fn read(value: &Value) -> Option<Self> {
        text(value)?.parse().ok()
    }

    fn show(&self) -> Option<String> {
        quoted(self.to_string())
    }
}

impl Leaf for ListenOn {
    fn kind() -> String {
        "address or `off`".into()
    }

    fn allowed() -> String {
        "an address and port, as in 127.0.0.1:9464, or off".into()
    }

    fn read(value: &Value) -> Option<Self> {
        match text(value)?.as_str() {
            "off" => Some(Self::Off),
            address => address.parse().ok().map(Self::At),
        }
    }

    fn show(&self) -> Option<String> {
        match self {
            Self::Off => quoted("off"),
            Self::At(address) => quoted(address.to_string()),
        }
    }
}

impl Leaf for Duration {
    fn kind() -> String {
        "duration".into()
    }

    fn allowed() -> String {
        "a duration, as in 250ms, 30s, 15m, 12h or 30d, or a number of seconds".into()
    }

    fn read(value: &Value) -> Option<Self> {
        in_units(&text(value)?, &UNITS_OF_TIME, 1_000).map(Self::from_millis)
    }

    fn show(&self) -> Option<String> {
        quoted(with_unit(u64::try_from(self.as_millis()).unwrap_or(u64::MAX), &UNITS_OF_TIME))
    }
}

impl Leaf for Size {
    fn kind() -> String {
        "size".into()
    }

    fn allowed() -> String {
        "a size, as in 512B, 64KiB, 4MiB or 1GiB, or a number of bytes".into()
    }

    fn read(value: &Value) -> Option<Self> {
        in_units(&text(value)?, &UNITS_OF_SIZE, 1).map(Self)
    }

    fn show(&self) -> Option<String> {
        quoted(self.to_string())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&with_unit(self.0, &UNITS_OF_SIZE))
    }
}

impl<T: Leaf> Leaf for Option<T> {
    const SECRET: bool = T::SECRET;

    fn kind() -> String {
        T::kind()
    }

    fn allowed() -> String {
        T::allowed()
    }

    fn read(value: &Value) -> Option<Self> {
        T::read(value).map(Some)
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(Leaf::show)
    }
}

impl Leaf for Vec<String> {
    fn kind() -> String {
        "list".into()
    }

    fn allowed() -> String {
        "a list, as in [\"one\", \"two\"], or one,two in a variable".into()
    }

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Array(_, items) => items.iter().map(text).collect(),
            _ => text(value).map(|list| {
                list.split(',')
                    .map(str::trim)
                    .filter(|item| !item.is_empty())
                    .map(Into::into)
                    .collect()
            }),
        }
    }

    fn show(&self) -> Option<String> {
        let items: Vec<_> = self.iter().filter_map(quoted).collect();
        Some(format!("[{}]", items.join(", ")))
    }
}

impl Leaf for SecretString {
    const SECRET: bool = true;

    fn kind() -> String {
        "secret".into()
    }

    fn allowed() -> String {
        "text, which is kept secret".into()
    }

    fn read(value: &Value) -> Option<Self> {
        text(value).map(Self::from)
    }

    fn show(&self) -> Option<String> {
        quoted("[redacted]")
    }
}

impl<T: Choice> Leaf for Named<T> {
    fn kind() -> String {
        T::ALL.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(" or ")
    }

    fn allowed() -> String {
        T::ALL.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ")
    }

    fn read(value: &Value) -> Option<Self> {
        let given = text(value)?;
        T::ALL.iter().find(|(name, _)| *name == given).map(|(_, choice)| Self(*choice))
    }

    fn show(&self) -> Option<String> {
        T::ALL.iter().find(|(_, choice)| *choice == self.0).and_then(|(name, _)| quoted(*name))
    }
}
