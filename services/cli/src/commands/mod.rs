//! The commands. Each opens the profile or the connection that it needs, acts, reports and closes.

mod account;
mod block;
mod device;
mod erase;
mod export;
mod file;
mod find;
mod group;
mod keys;
mod local;
pub(crate) mod message;
mod moderate;
pub(crate) mod opened;
mod recovery;
pub(crate) mod requests;
mod server;

use clap::CommandFactory as _;
use qpq_client::Existing;

use self::{
    keys::{Changed, Compared},
    requests::Decision,
};
use crate::{
    args::{AccountCommand, Cli, Command},
    chat,
    compose::Context,
    error::CliError,
    password::Source,
};

/// Runs one command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Register { username, device, invite } => {
            account::register(context, &username, &device, invite).await
        }
        Command::Login { username, device, recovery_code, recovery_code_file } => {
            let code = match recovery_code_file {
                Some(file) => Some(Source::File(file)),
                None => recovery_code.then_some(Source::Terminal),
            };
            account::login(context, username.as_ref(), &device, code).await
        }
        Command::Logout { all } => account::logout(context, all).await,
        Command::Passwd { new_password_file } => account::passwd(context, new_password_file).await,
        Command::Whoami => account::whoami(context).await,
        Command::Account(AccountCommand::Delete { keep_profile }) => {
            erase::delete(context, keep_profile).await
        }
        Command::Account(AccountCommand::Export { out }) => export::export(context, out).await,
        Command::Health => server::health(context).await,
        Command::Dm { to, linger } => chat::dm(context, &to, linger).await,
        Command::Send { to, file: Some(path), .. } => file::send(context, &to, &path).await,
        Command::Send { to, text, file: None } => message::send(context, &to, text).await,
        Command::Save { from, number, to, force } => {
            let existing = if force { Existing::Replace } else { Existing::Keep };
            file::save(context, &from, number, to, existing).await
        }
        Command::Recv { follow, timeout } => message::recv(context, follow, timeout).await,
        Command::Group(command) => group::run(context, command).await,
        Command::Device(command) => device::run(context, command).await,
        Command::Recovery(command) => recovery::run(context, command).await,
        Command::Keys { user, verified, accept } => {
            let changed = if accept { Changed::Accept } else { Changed::Refuse };
            let compared = if verified { Compared::Now } else { Compared::AsNoted };
            keys::show(context, user.as_ref(), changed, compared).await
        }
        Command::Block(whom) => block::block(context, &whom).await,
        Command::Unblock(whom) => block::unblock(context, &whom).await,
        Command::Blocked => block::list(context).await,
        Command::Requests => requests::list(context).await,
        Command::Accept { which } => requests::decide(context, &which, Decision::Accept).await,
        Command::Decline { which } => requests::decide(context, &which, Decision::Decline).await,
        Command::Moderate(command) => moderate::run(context, command).await,
        Command::Profiles => local::profiles(context),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "qpq", &mut script);
            context.output.print(&script)
        }
    }
}
