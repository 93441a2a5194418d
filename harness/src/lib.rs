//! The harness: the command line, data, evaluation and reports. The engine is `hydra-runtime`.

// `println!` and `eprintln!` panic if their reader is gone; `output::print` and `output::say` don't.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod analyze;
mod chat;
mod cluster;
mod cmd;
mod compare;
pub mod data;
mod device;
mod eval;
mod experiment;
mod export;
#[doc(hidden)] // for harness/fuzz
pub mod fuzz;
mod heterogeneity;
mod hub;
mod interrupt;
mod memory;
mod options;
mod output;
mod progress;
mod ranks;
mod report;
mod run;
mod sampling;
mod serve;
mod sha256;
mod statistics;

use clap::error::ErrorKind;
use std::ffi::OsString;
use std::process::ExitCode;

/// Runs one command. Exit codes: 0 done; 1 failed, with one line on stderr; 2 the command line can't be read; 130 stopped by Ctrl-C or SIGTERM, with
/// everything saved that a run can continue from.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    interrupt::survive_large_files();
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(argument) = arguments.iter().find(|argument| argument.to_str().is_none()) {
        output::say(format_args!("error: argument {argument:?}: expected UTF-8"));
        return ExitCode::from(2);
    }
    let command = match cmd::parse(arguments) {
        Ok(command) => command,
        Err(error) => return not_a_command(&error),
    };
    let done = command.run();
    interrupt::wait_for_discard();
    match done {
        Ok(()) if interrupt::requested() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = exit_code(&error);
            if !(error.is::<interrupt::Stopped>() || error.is::<ranks::Said>()) {
                output::say(format_args!("error: {}", line_of(&error)));
            }
            ExitCode::from(code)
        }
    }
}

/// The exit code of a command that failed.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref() {
        Some(ranks::Said(code)) => *code,
        None if error.is::<interrupt::Stopped>() => 130,
        None if error.is::<options::Usage>() => 2,
        None => 1,
    }
}

/// An error and its causes on one line.
fn line_of(error: &anyhow::Error) -> String {
    one_line(&chain(error))
}

/// Shows the help that was asked for, or what is wrong with the command line.
fn not_a_command(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match output::print(error) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                output::say(format_args!("error: {}", line_of(&error)));
                ExitCode::FAILURE
            }
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::say(error.to_string().trim_end());
            ExitCode::from(2)
        }
        _ => {
            output::say(usage(&error.to_string()));
            ExitCode::from(2)
        }
    }
}

/// clap's message on one line, without the usage that follows it.
fn usage(text: &str) -> String {
    let wrong = text.split("\n\nUsage:").next().unwrap_or(text);
    let wrong = wrong.split("\n\nFor more information").next().unwrap_or(wrong);
    let parts: Vec<String> = wrong.split("\n\n").map(one_line).collect();
    parts.join("; ")
}

/// An error and its causes, without those that the text before them already contains.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.to_string(),
        text => format!("{text}: {cause}"),
    })
}

fn one_line(text: &str) -> String {
    output::escaped(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}
