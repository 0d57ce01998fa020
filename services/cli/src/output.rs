//! The output: text for people or JSON for programs on standard output, everything else on
//! standard error.

use std::io::{self, IsTerminal as _, Write};

use serde::Serialize;
use serde_json::json;

use crate::{
    error::{CliError, Exit},
    text,
};

/// The output of a command. Its JSON form is the derived one: the keys are an interface and stay.
pub(crate) trait Report: Serialize {
    /// Writes the output for people, in whole lines.
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Human,
    Json,
}

/// Whether the terminal shows colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Ansi,
}

impl Style {
    pub(crate) fn dim(self, text: impl std::fmt::Display) -> String {
        self.wrap("2", text)
    }

    pub(crate) fn bold(self, text: impl std::fmt::Display) -> String {
        self.wrap("1", text)
    }

    fn wrap(self, code: &str, text: impl std::fmt::Display) -> String {
        match self {
            Self::Plain => text.to_string(),
            Self::Ansi => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

/// The form and the destination of a command's output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) format: Format,
    /// The style of standard output.
    pub(crate) style: Style,
}

impl Output {
    pub(crate) fn new(format: Format, no_color: bool) -> Self {
        let style =
            if io::stdout().is_terminal() && !no_color { Style::Ansi } else { Style::Plain };
        Self { format, style }
    }

    /// Writes a report to standard output, and flushes it.
    pub(crate) fn report(&self, report: &impl Report) -> Result<(), CliError> {
        let mut out = Vec::new();
        match self.format {
            Format::Human => {
                report.human(&mut out, self.style).map_err(|error| CliError::output(&error))?
            }
            Format::Json => {
                let object = serde_json::to_string(report).expect("reports have only string keys");
                out.extend_from_slice(text::json(&object).as_bytes());
                out.push(b'\n');
            }
        }
        self.print(&out)
    }

    /// Writes bytes to standard output as they are.
    pub(crate) fn print(&self, bytes: &[u8]) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(bytes)
            .and_then(|()| stdout.flush())
            .map_err(|error| CliError::output(&error))
    }

    /// Writes a note for people to standard error; none with `--json`.
    pub(crate) fn note(&self, text: impl std::fmt::Display) {
        if self.format == Format::Human {
            // There is nowhere to report that standard error is closed.
            writeln!(io::stderr(), "{text}").ok();
        }
    }

    /// Writes the reason for a failure to standard error.
    pub(crate) fn error(&self, error: &CliError) {
        let CliError { exit, code, message, hint } = error;
        if *exit == Exit::PipeClosed {
            return;
        }
        let mut lines = match self.format {
            Format::Json => {
                json!({ "error": { "code": code, "message": message, "hint": hint } }).to_string()
            }
            Format::Human => format!("qpq: {message}"),
        };
        if let (Format::Human, Some(hint)) = (self.format, hint) {
            lines.push_str("\n     ");
            lines.push_str(hint);
        }
        writeln!(io::stderr(), "{lines}").ok();
    }
}
