//! Where lines come from: a line editor on a terminal, plain lines from a pipe.

use anyhow::{Context, Result, bail};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, IsTerminal, Read, StdinLock, stdin};

/// The most bytes of a line, or of several that are joined: a pipe may have no end.
const MOST_BYTES: usize = 16 << 20;

/// A source of lines.
pub enum Input {
    /// With history, which is not kept after the end.
    Terminal(Box<DefaultEditor>),
    /// Anything else.
    Pipe(StdinLock<'static>),
}

/// What was typed.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// One line, or several that were joined.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the pipe's end.
    End,
}

impl Input {
    /// Standard input.
    pub fn open() -> Result<Self> {
        match stdin().is_terminal() {
            true => Ok(Self::Terminal(Box::new(DefaultEditor::new().context("can't use this terminal")?))),
            false => Ok(Self::Pipe(stdin().lock())),
        }
    }

    /// Whether somebody is sitting there.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line; one that ends with a backslash goes on with the next one.
    pub fn next(&mut self) -> Result<Line> {
        let mut text = String::new();
        let mut prompt = "> ";
        loop {
            let line = match self.line(prompt)? {
                Line::Text(line) => line,
                // What was begun before the pipe's end counts.
                Line::End if !text.is_empty() => return Ok(Line::Text(text)),
                other => return Ok(other),
            };
            if text.len() + line.len() > MOST_BYTES {
                bail!("stdin: expected a line of at most {} MiB, found more", MOST_BYTES >> 20);
            }
            match line.strip_suffix('\\') {
                Some(part) => {
                    text += part;
                    text.push('\n');
                    prompt = ". ";
                }
                None => {
                    text += &line;
                    if let Self::Terminal(editor) = self {
                        // It is not kept in a file, so that nothing can fail.
                        let _ = editor.add_history_entry(&text);
                    }
                    return Ok(Line::Text(text));
                }
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line> {
        match self {
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(error).context("can't read from the terminal"),
            },
            Self::Pipe(pipe) => {
                let mut line = String::new();
                match pipe.take(MOST_BYTES as u64 + 1).read_line(&mut line).context("can't read from stdin")? {
                    0 => Ok(Line::End),
                    _ => Ok(Line::Text(line.trim_end_matches(['\n', '\r']).into())),
                }
            }
        }
    }
}
