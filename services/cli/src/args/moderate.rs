//! The arguments of `qpq moderate`, and the duration of a ban.

use std::str::FromStr;

use clap::Subcommand;

use super::PersonArg;

#[derive(Debug, Subcommand)]
pub(crate) enum ModerateCommand {
    /// Ban a user from the server
    ///
    /// All sessions of the user end, and the user cannot log in. Messages for the user
    /// are still accepted. Another ban replaces the reason and the end.
    ///
    /// Examples:
    ///   qpq moderate ban mallory --reason spam
    ///   qpq moderate ban mallory --for 7d
    #[command(verbatim_doc_comment)]
    Ban {
        #[command(flatten)]
        person: PersonArg,
        /// The reason, which administrators can read
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        /// The duration, such as 90s, 12h or 7d [default: no end]
        #[arg(long = "for", value_name = "DURATION")]
        duration: Option<BanDuration>,
    },
    /// End the ban of a user
    Unban {
        #[command(flatten)]
        person: PersonArg,
    },
    /// List the banned users, newest first
    Bans,
    /// List the reports of users, newest first
    ///
    /// The content of a report is encrypted; --json shows it in hexadecimal digits. The
    /// server records each read of reports.
    #[command(verbatim_doc_comment)]
    Reports {
        /// The maximum number of reports
        #[arg(long, default_value_t = 100, hide_default_value = true)]
        #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
        /// The number of newer reports to skip
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        skip: u32,
    },
}

/// The duration of a ban, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BanDuration(pub(crate) u64);

impl FromStr for BanDuration {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "a duration is a number with s, m, h or d, as in 30m";
        let unit = text.chars().next_back().ok_or(wrong)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 60 * 60,
            'd' => 24 * 60 * 60,
            _ => return Err(wrong),
        };
        let number = text.strip_suffix(unit).ok_or(wrong)?;
        let number: u64 = number.parse().map_err(|_| wrong)?;
        match number.checked_mul(seconds) {
            Some(0) | None => Err("a ban lasts at least a second and at most 2^64 seconds"),
            Some(seconds) => Ok(Self(seconds)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_number_with_a_unit() {
        for (text, seconds) in [("90s", 90), ("30m", 1_800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(text.parse(), Ok(BanDuration(seconds)));
        }
        for wrong in ["", "7", "d", "-1d", "1.5h", "7 d", "0d", "7w", "99999999999999999999d", "7ü"]
        {
            assert!(wrong.parse::<BanDuration>().is_err(), "{wrong}");
        }
    }
}
