//! The harness: the command line, data, MMLU, and reports. What it runs is in `hydra-runtime`.

// `println!` and `eprintln!` panic where nobody reads; `output::print` and `output::say` don't.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod cluster;
mod cmd;
pub mod data;
mod device;
mod heldout;
mod interrupt;
mod lock;
mod memory;
mod mmlu;
mod output;
mod progress;
mod report;
mod router;
mod session;
mod statistics;

use clap::Parser;
use clap::error::ErrorKind;
use std::ffi::OsString;
use std::process::ExitCode;

/// Runs one command. Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM, with all saved that a run can go on from.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(strange) = arguments.iter().find(|argument| argument.to_str().is_none()) {
        output::say(format_args!("error: argument {strange:?}: wanted UTF-8"));
        return ExitCode::from(2);
    }
    let cli = match cmd::Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return match output::print(error) {
                Ok(_) => ExitCode::SUCCESS,
                Err(error) => failure(&error),
            };
        }
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::say(error.to_string().trim_end());
            return ExitCode::from(2);
        }
        Err(error) => {
            output::say(wrong_usage(&error));
            return ExitCode::from(2);
        }
    };
    let done = cli.command.run();
    interrupt::wait_for_discard();
    match done {
        Ok(()) if interrupt::requested() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<interrupt::Stopped>() => ExitCode::from(130),
        Err(error) => failure(&error),
    }
}

/// What is wrong, on one line, without the usage that follows it.
fn wrong_usage(error: &clap::Error) -> String {
    let text = error.to_string();
    let wrong = text.split("\n\nUsage:").next().unwrap_or(&text);
    one_line(wrong.split("\n\nFor more information").next().unwrap_or(wrong))
}

fn failure(error: &anyhow::Error) -> ExitCode {
    output::say(format_args!("error: {}", one_line(&chain(error))));
    ExitCode::FAILURE
}

/// An error and its causes, without those that the text before them has in it already.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.to_string(),
        text => format!("{text}: {cause}"),
    })
}

fn one_line(text: &str) -> String {
    output::printable(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}
