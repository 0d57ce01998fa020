//! The `[limits]` section: one budget for each class and subject of the table in `qpq_proto`, which
//! also contains the defaults. The `section!` macro cannot declare this section, because its keys
//! come from that table.

use std::{collections::HashMap, time::Duration};

use qpq_ports::Bucket;
use qpq_proto::{LimitClass, LimitDefault, LimitSubject};
use qpq_rpc::RateLimits;
use qpq_runtime::config::{About, Declared, Leaf, Node, Section, SettingReader, Value, join};

const UNITS: [(&str, u64); 3] = [("s", 1), ("m", 60), ("h", 3_600)];

/// The rate limits of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallLimits {
    pub enabled: bool,
    budgets: Vec<(LimitClass, LimitSubject, Budget)>,
}

/// A token bucket of `burst` calls, refilled with `refill` calls in every `per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Budget {
    burst: u32,
    refill: u32,
    per: Duration,
}

impl From<&LimitDefault> for Budget {
    fn from(default: &LimitDefault) -> Self {
        Self { burst: default.burst, refill: default.refill, per: default.every }
    }
}

impl Default for CallLimits {
    fn default() -> Self {
        let of_class = |class: LimitClass| {
            class
                .defaults()
                .iter()
                .map(move |default| (class, default.subject, Budget::from(default)))
        };
        Self { enabled: true, budgets: LimitClass::ALL.into_iter().flat_map(of_class).collect() }
    }
}

impl CallLimits {
    /// Returns the limits in the form of the dispatcher.
    pub fn to_rpc(&self) -> RateLimits {
        let bucket = |budget: Budget| Bucket {
            burst: budget.burst,
            per_second: f64::from(budget.refill) / budget.per.as_secs_f64(),
        };
        let overrides: HashMap<_, _> = self
            .budgets
            .iter()
            .map(|&(class, subject, budget)| ((class, subject), bucket(budget)))
            .collect();
        RateLimits { enabled: self.enabled, overrides }
    }
}

fn key(class: LimitClass, subject: LimitSubject) -> String {
    format!("{}.{}", class.name(), subject.name())
}

impl Node for CallLimits {
    fn describe(&self, about: About, declared: &mut Declared) {
        declared.sections.push(Section { path: about.path.clone(), doc: about.doc });
        let enabled = About::new(join(&about.path, "enabled"), "Turns the rate limits on.");
        self.enabled.describe(enabled, declared);
        for (class, subject, budget) in &self.budgets {
            let doc = format!("{} Counted per {}.", class.doc(), subject.name().replace('_', " "));
            budget.describe(About::new(join(&about.path, &key(*class, *subject)), &doc), declared);
        }
    }

    fn read(&mut self, path: &str, reader: &mut SettingReader<'_>) {
        self.enabled.read(&join(path, "enabled"), reader);
        for (class, subject, budget) in &mut self.budgets {
            budget.read(&join(path, &key(*class, *subject)), reader);
        }
    }

    fn show(&self, path: &str, values: &mut Vec<(String, Option<String>)>) {
        Node::show(&self.enabled, &join(path, "enabled"), values);
        for (class, subject, budget) in &self.budgets {
            Node::show(budget, &join(path, &key(*class, *subject)), values);
        }
    }
}

impl Leaf for Budget {
    fn kind() -> String {
        "budget".into()
    }

    fn allowed() -> String {
        "a burst and a rate of calls, as in \"20 + 60/m\" (s, m or h)".into()
    }

    fn read(value: &Value) -> Option<Self> {
        let (burst, rate) = value.as_str()?.split_once('+')?;
        let (refill, unit) = rate.split_once('/')?;
        let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit.trim())?;
        let (burst, refill) = (burst.trim().parse().ok()?, refill.trim().parse().ok()?);
        (burst > 0 && refill > 0).then_some(Self {
            burst,
            refill,
            per: Duration::from_secs(*seconds),
        })
    }

    fn show(&self) -> Option<String> {
        let seconds = self.per.as_secs();
        let unit = UNITS.iter().find(|(_, each)| *each == seconds).map_or("s", |(name, _)| name);
        Some(format!("\"{} + {}/{unit}\"", self.burst, self.refill))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_table() {
        let rates = CallLimits::default().to_rpc();
        for class in LimitClass::ALL {
            for default in class.defaults() {
                let bucket = rates.overrides[&(class, default.subject)];
                assert_eq!(
                    (bucket.burst, bucket.per_second),
                    (default.burst, default.per_second())
                );
            }
        }
    }

    #[test]
    fn a_shown_budget_is_read_back_and_malformed_ones_are_refused() {
        let read = |text: &str| <Budget as Leaf>::read(&Value::from(text));
        for (_, _, budget) in CallLimits::default().budgets {
            let shown = Leaf::show(&budget).unwrap();
            assert_eq!(read(shown.trim_matches('"')), Some(budget), "{shown}");
        }
        assert_eq!(
            read("7+3/h"),
            Some(Budget { burst: 7, refill: 3, per: Duration::from_secs(3_600) })
        );
        for wrong in ["", "7", "7 + 3", "7 + 3/d", "0 + 3/m", "7 + 0/m", "-7 + 3/m", "7 + 3.5/m"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
