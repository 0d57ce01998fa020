//! Where passwords come from: a file, QPQ_PASSWORD, or the person at the terminal, unseen.

use std::{
    fs,
    io::{self, ErrorKind, IsTerminal as _},
    path::PathBuf,
};

use qpq_client::Password;
use zeroize::Zeroizing;

use crate::{
    fault::{Exit, Fault},
    output::Output,
};

/// Shorter ones are advised against.
const ADVISED_CHARS: usize = 12;

/// Where to take the password from.
#[derive(Clone)]
pub(crate) enum Source {
    File(PathBuf),
    Environment(Zeroizing<String>),
    Terminal,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::File(_) => "File",
            Self::Environment(_) => "Environment",
            Self::Terminal => "Terminal",
        })
    }
}

impl Source {
    /// The password of an account that exists.
    pub(crate) async fn known(&self) -> Result<Password, Fault> {
        let password = match self {
            Self::Terminal => ask("Password: ").await?,
            other => other.given()?,
        };
        Ok(Password::new(password))
    }

    /// The password of an account to be made; asked for twice.
    pub(crate) async fn chosen(&self, output: &Output) -> Result<Password, Fault> {
        let password = match self {
            Self::Terminal => {
                output.note("Choose a password. Nobody can reset it, so write it down somewhere safe.");
                let password = ask("Password: ").await?;
                if *ask("Again:    ").await? != *password {
                    return Err(Fault::new(Exit::Failure, "client.password", "the two passwords differ")
                        .hint("start again"));
                }
                password
            }
            other => other.given()?,
        };
        if password.chars().count() < ADVISED_CHARS {
            output.note(format_args!(
                "Note: a password of fewer than {ADVISED_CHARS} characters may be guessed; several words are better."
            ));
        }
        Ok(Password::new(password))
    }

    fn given(&self) -> Result<Zeroizing<String>, Fault> {
        match self {
            Self::File(path) => {
                let content = fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
                    Fault::io(format_args!("the password file {}", path.display()), &error)
                })?;
                checked(Zeroizing::new(content.lines().next().unwrap_or_default().to_owned()))
            }
            Self::Environment(password) => checked(password.clone()),
            Self::Terminal => unreachable!("asked for by the callers"),
        }
    }
}

fn checked(password: Zeroizing<String>) -> Result<Zeroizing<String>, Fault> {
    if password.is_empty() {
        return Err(Fault::new(Exit::Failure, "client.password", "the password is empty").hint("give one"));
    }
    Ok(password)
}

/// Reads a line from the terminal without showing it, wherever standard input comes from.
async fn ask(prompt: &'static str) -> Result<Zeroizing<String>, Fault> {
    let typed = tokio::task::spawn_blocking(move || rpassword::prompt_password(prompt))
        .await
        .expect("reading a line does not panic");
    match typed {
        Ok(password) => checked(Zeroizing::new(password)),
        Err(error) if error.kind() == ErrorKind::Interrupted => Err(Fault::interrupted()),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Fault::interrupted()),
        Err(_) if !io::stdin().is_terminal() => Err(Fault::new(
            Exit::NotLoggedIn,
            "client.password_needed",
            "a password is needed, and there is no terminal to ask at",
        )
        .hint("give it with --password-file or QPQ_PASSWORD, or run `qpq login` at a terminal first")),
        Err(error) => Err(Fault::io("cannot read the password", &error)),
    }
}
