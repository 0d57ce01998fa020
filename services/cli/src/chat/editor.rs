//! The line being typed, on a thread of its own, and the printer that puts other lines above it.

use rustyline::{Config, DefaultEditor, ExternalPrinter, error::ReadlineError};
use tokio::sync::mpsc;

/// The prompt before the line being typed. A sent line keeps the prompt.
const PROMPT: &str = "you: ";

/// A running line editor.
pub(super) struct Editor {
    lines: mpsc::UnboundedReceiver<String>,
    printer: Box<dyn ExternalPrinter + Send>,
}

impl Editor {
    /// Starts to read lines. The arrow keys bring back `history`. Fails without a terminal that can
    /// do this.
    pub(super) fn start(history: impl IntoIterator<Item = String>) -> Result<Self, ReadlineError> {
        let config = Config::builder().bracketed_paste(true).build();
        let mut editor = DefaultEditor::with_config(config)?;
        let printer = Box::new(editor.create_external_printer()?);
        for line in history {
            editor.add_history_entry(line)?;
        }
        let (typed, lines) = mpsc::unbounded_channel();
        tokio::task::spawn_blocking(move || read(&mut editor, &typed));
        Ok(Self { lines, printer })
    }

    /// Returns the next line; `None` at the end of the input: after Ctrl-C or Ctrl-D, or when the
    /// terminal is closed. Cancel-safe.
    pub(super) async fn line(&mut self) -> Option<String> {
        self.lines.recv().await
    }

    /// Prints a line above the one being typed.
    pub(super) fn print(&mut self, line: &str) {
        if let Err(error) = self.printer.print(format!("{line}\n")) {
            tracing::debug!(%error, "a line was not shown");
        }
    }
}

fn read(editor: &mut DefaultEditor, typed: &mpsc::UnboundedSender<String>) {
    // Any error ends the input: no further line can be typed.
    while let Ok(line) = editor.readline(PROMPT) {
        if !line.trim().is_empty() {
            editor.add_history_entry(line.as_str()).ok();
        }
        let is_last = Typed::parse(&line) == Typed::Quit;
        if typed.send(line).is_err() || is_last {
            return;
        }
    }
}

/// The meaning of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Typed {
    Nothing,
    Text(String),
    Help,
    Quit,
    Safety,
    Requests,
    Accept(String),
    Decline(String),
    Unknown(String),
}

impl Typed {
    pub(super) fn parse(line: &str) -> Self {
        let text = line.trim_end();
        if text.trim().is_empty() {
            return Self::Nothing;
        }
        let Some(command) = text.strip_prefix('/') else { return Self::Text(text.to_owned()) };
        match command.trim() {
            "help" | "h" | "?" => Self::Help,
            "quit" | "q" | "exit" => Self::Quit,
            "safety" => Self::Safety,
            "requests" => Self::Requests,
            _ if command.starts_with('/') => Self::Text(command.to_owned()),
            other => match other.split_once(char::is_whitespace) {
                Some(("accept", which)) => Self::Accept(which.trim().to_owned()),
                Some(("decline", which)) => Self::Decline(which.trim().to_owned()),
                _ => Self::Unknown(other.to_owned()),
            },
        }
    }
}

/// The text of `/help`.
pub(super) const HELP: &str = "\
/help           this list
/safety         the number by which you and the other know that nobody stands
                between you
/requests       what strangers ask for
/accept WHICH   accept a request: a user, a group, or an id
/decline WHICH  decline it
/quit           leave (also Ctrl-D)
//text          send a text that begins with a slash";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_are_commands_unless_doubled() {
        let text = |text: &str| Typed::Text(text.to_owned());
        assert_eq!(Typed::parse("hi /quit"), text("hi /quit"));
        assert_eq!(Typed::parse(" hi \n"), text(" hi"));
        assert_eq!(Typed::parse("/quit "), Typed::Quit);
        assert_eq!(Typed::parse("//quit"), text("/quit"));
        assert_eq!(Typed::parse("/etc/passwd"), Typed::Unknown("etc/passwd".into()));
        assert_eq!(Typed::parse("/accept  dave "), Typed::Accept("dave".into()));
        assert_eq!(Typed::parse("/decline"), Typed::Unknown("decline".into()));
        assert_eq!(Typed::parse("  "), Typed::Nothing);
    }
}
