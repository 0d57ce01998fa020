//! The sources of passwords: a file, QPQ_PASSWORD, or the person at the terminal, unseen.

use std::{
    fs,
    io::{self, ErrorKind, IsTerminal as _},
    path::PathBuf,
};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use qpq_client::{InvalidRecoveryCode, Password, RecoveryCode};
use zeroize::Zeroizing;

use crate::{
    error::{CliError, Exit},
    output::Output,
};

/// The length, in characters, below which a password is advised against.
const ADVISED_CHARS: usize = 12;

/// The source of the password.
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
    /// Returns the password of an existing account.
    pub(crate) async fn known(&self) -> Result<Password, CliError> {
        let password = match self {
            Self::Terminal => {
                let [password] = ask(["Password: "]).await?;
                password
            }
            other => other.given()?,
        };
        Ok(Password::new(password))
    }

    /// Returns a recovery code.
    pub(crate) async fn recovery_code(&self) -> Result<RecoveryCode, CliError> {
        let typed = match self {
            Self::Terminal => {
                let [typed] = ask(["Recovery code: "]).await?;
                typed
            }
            other => other.given()?,
        };
        typed.parse().map_err(|error: InvalidRecoveryCode| {
            CliError::new(Exit::Failure, "client.recovery_code", error)
                .hint("type the twelve words that `qpq recovery show` printed")
        })
    }

    /// Returns the password of a new account, which a person types twice.
    pub(crate) async fn chosen(&self, output: &Output) -> Result<Password, CliError> {
        self.typed_twice(output, ["Password: ", "Again:    "]).await
    }

    /// Returns the new password of an existing account, which a person types twice.
    pub(crate) async fn replacement(&self, output: &Output) -> Result<Password, CliError> {
        self.typed_twice(output, ["New password: ", "Again:        "]).await
    }

    async fn typed_twice(
        &self,
        output: &Output,
        prompts: [&'static str; 2],
    ) -> Result<Password, CliError> {
        let password = match self {
            Self::Terminal => {
                output.note(
                    "Choose a password. Nobody can reset it, so write it down somewhere safe.",
                );
                let [password, again] = ask(prompts).await?;
                if *again != *password {
                    return Err(CliError::new(
                        Exit::Failure,
                        "client.password",
                        "the two passwords differ",
                    )
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

    fn given(&self) -> Result<Zeroizing<String>, CliError> {
        match self {
            Self::File(path) => {
                let content = fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
                    CliError::io(format_args!("the password file {}", path.display()), &error)
                })?;
                let password =
                    Zeroizing::new(content.lines().next().unwrap_or_default().to_owned());
                checked(&password)?;
                Ok(password)
            }
            Self::Environment(password) => {
                checked(password)?;
                Ok(password.clone())
            }
            Self::Terminal => unreachable!("asked for by the callers"),
        }
    }
}

/// Returns the code of an invite, which a person types unseen.
pub(crate) async fn ask_for_invite() -> Result<String, CliError> {
    let [code] = ask(["Invite code: "]).await?;
    Ok(code.trim().to_owned())
}

fn checked(password: &str) -> Result<(), CliError> {
    if password.is_empty() {
        return Err(CliError::new(Exit::Failure, "client.password", "the password is empty")
            .hint("give one"));
    }
    Ok(())
}

/// Hides what is typed at the terminal until the value is dropped.
struct Unseen {
    terminal: fs::File,
    before: Termios,
}

impl Unseen {
    fn begin() -> io::Result<Self> {
        let terminal = fs::OpenOptions::new().read(true).write(true).open("/dev/tty")?;
        let before = tcgetattr(&terminal)?;
        let mut unseen = before.clone();
        unseen.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&terminal, SetArg::TCSANOW, &unseen)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Unseen {
    fn drop(&mut self) {
        // A terminal that was closed needs no restoring.
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// Reads a line for each prompt from the terminal without showing it, even if standard input is not
/// the terminal.
async fn ask<const N: usize>(
    prompts: [&'static str; N],
) -> Result<[Zeroizing<String>; N], CliError> {
    let typed = tokio::task::spawn_blocking(move || {
        // Also hides the input before the first prompt and between prompts, which may be typed or
        // pasted early.
        let _unseen = Unseen::begin()?;
        let mut typed = prompts.map(|_| Zeroizing::default());
        for (line, prompt) in typed.iter_mut().zip(prompts) {
            *line = Zeroizing::new(rpassword::prompt_password(prompt)?);
            if line.is_empty() {
                break;
            }
        }
        Ok::<_, io::Error>(typed)
    })
    .await
    .expect("reading a line does not panic");
    match typed {
        Ok(typed) => {
            checked(&typed[0])?;
            Ok(typed)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Err(CliError::interrupted()),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(CliError::interrupted()),
        Err(_) if !io::stdin().is_terminal() => Err(CliError::new(
            Exit::NotLoggedIn,
            "client.password_needed",
            "a password is needed, and there is no terminal to ask at",
        )
        .hint(
            "give it with --password-file or QPQ_PASSWORD, or run `qpq login` at a terminal first",
        )),
        Err(error) => Err(CliError::io("cannot read the password", &error)),
    }
}
