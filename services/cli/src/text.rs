//! The display of other people's text on a terminal. A message must not be able to move the cursor,
//! change colours, set the title, reorder other text or look like a line of another person.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use qpq_client::UnixMillis;
use unicode_normalization::char::is_combining_mark;

/// The prefix of each further line of a message, so that no line of it passes for another message.
const CONTINUATION: &str = "\n  | ";

/// A text for display on one line or, if it is a message, on several, with each further line
/// marked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Safe<'a> {
    text: &'a str,
    lines: Lines,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lines {
    One,
    Many,
}

/// Returns a name, or another text of one line, for display.
pub(crate) fn line(text: &str) -> Safe<'_> {
    Safe { text, lines: Lines::One }
}

/// Returns a message for display.
pub(crate) fn message(text: &str) -> Safe<'_> {
    Safe { text, lines: Lines::Many }
}

/// Returns a number with its noun, such as `1 member` and `2 members`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

/// Returns names as a list: `bob, carol and dave`.
pub(crate) fn list(names: &[String]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => names.join(""),
    }
}

/// Returns JSON in which each character that [`message`] would escape is a `\u` sequence, which
/// means the same there.
pub(crate) fn json(object: &str) -> Cow<'_, str> {
    // Only strings of JSON contain these characters, and any character of a string may be written
    // so.
    if !object.contains(is_dangerous) {
        return Cow::Borrowed(object);
    }
    let mut safe = String::with_capacity(object.len() + 16);
    for c in object.chars() {
        if is_dangerous(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(safe, "\\u{unit:04x}").expect("a String grows as needed");
            }
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// Returns a point in time as text: `2026-11-28 14:05 UTC`.
pub(crate) fn utc(at: UnixMillis) -> String {
    let minutes = at.0 / 60_000;
    let (days, minute) = (minutes / (24 * 60), minutes % (24 * 60));
    // Days are counted from 0000-03-01, so that the leap day is the last of its year (Howard
    // Hinnant, "chrono-Compatible Low-Level Date Algorithms").
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.text.chars().peekable();
        // A leading combining mark would be drawn over the character before the text.
        if self.lines == Lines::One
            && let Some(mark) = chars.next_if(|c| is_combining_mark(*c))
        {
            write!(f, "{}", mark.escape_unicode())?;
        }
        while let Some(c) = chars.next() {
            match c {
                '\r' if self.lines == Lines::Many && chars.peek() == Some(&'\n') => {}
                '\n' if self.lines == Lines::Many => f.write_str(CONTINUATION)?,
                '\t' if self.lines == Lines::Many => f.write_char(c)?,
                c if is_dangerous(c) => write!(f, "{}", c.escape_unicode())?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Returns whether a character could mislead the reader: a control character (C0, DEL, C1), a line
/// or paragraph separator, or an invisible character that changes the order or the identity of the
/// text (Unicode Technical Report 36). The joiners are allowed: emoji and several scripts need
/// them.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{061c}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_listed_with_commas_and_one_and() {
        let names = ["bob", "carol", "dave"].map(str::to_owned);
        assert_eq!(list(&[]), "");
        assert_eq!(list(&names[..1]), "bob");
        assert_eq!(list(&names[..2]), "bob and carol");
        assert_eq!(list(&names), "bob, carol and dave");
    }

    #[test]
    fn ordinary_text_of_any_script_stays_as_it_is() {
        for text in ["hi", "grüß dich", "שלום", "日本語", "👩‍👩‍👧", "a\\nb", "می‌خواهم"]
        {
            assert_eq!(line(text).to_string(), text);
            assert_eq!(message(text).to_string(), text);
        }
    }

    #[test]
    fn a_combining_mark_does_not_join_what_stands_before_a_name() {
        assert_eq!(line("\u{301}bc").to_string(), "\\u{301}bc");
        assert_eq!(line("b\u{301}c").to_string(), "b\u{301}c");
    }

    #[test]
    fn instants_are_formatted_as_dates_and_times_in_utc() {
        for (millis, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00 UTC"),
            (951_868_799_999, "2000-02-29 23:59 UTC"),
            (951_868_800_000, "2000-03-01 00:00 UTC"),
            (1_795_874_700_000, "2026-11-28 14:05 UTC"),
            (4_107_542_399_000, "2100-02-28 23:59 UTC"),
            (4_107_542_400_000, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(utc(UnixMillis(millis)), expected);
        }
        // No value causes a panic.
        utc(UnixMillis(u64::MAX));
    }

    #[test]
    fn texts_cannot_control_the_terminal() {
        assert_eq!(message("\x1b[2J\x07").to_string(), "\\u{1b}[2J\\u{7}");
        assert_eq!(message("\x1b]0;title\x1b\\").to_string(), "\\u{1b}]0;title\\u{1b}\\");
        assert_eq!(message("a\rb").to_string(), "a\\u{d}b");
        assert_eq!(message("\u{9b}31m\u{7f}").to_string(), "\\u{9b}31m\\u{7f}");
        assert_eq!(message("\u{202e}evil\u{2066}").to_string(), "\\u{202e}evil\\u{2066}");
        for c in ('\0'..='\u{9f}').filter(|c| c.is_control()) {
            let shown = line(&c.to_string()).to_string();
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
        }
    }

    #[test]
    fn json_has_the_same_content_and_cannot_control_the_terminal() {
        let text = "a\u{9b}\u{7f}\u{202e}\u{e0041}\x1b\nü";
        let object = serde_json::to_string(text).unwrap();
        let safe = json(&object);
        assert!(!safe.contains(is_dangerous), "{safe}");
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
        assert!(matches!(json("{\"a\":\"ü\"}"), Cow::Borrowed(_)));
    }

    #[test]
    fn later_lines_of_a_message_are_marked_and_line_breaks_in_names_escaped() {
        assert_eq!(message("hi\nbob: yes\r\nend").to_string(), "hi\n  | bob: yes\n  | end");
        assert_eq!(line("friends\nbob").to_string(), "friends\\u{a}bob");
    }
}
