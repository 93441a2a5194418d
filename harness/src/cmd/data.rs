//! `hydra data`: what is in files of records, and one of them as tokens with its loss mask.

use crate::data::encode::sequence;
use crate::data::format::Format;
use crate::data::options::EncodingArgs;
use crate::data::records::{Reading, Record};
use crate::data::template::Template;
use crate::device::{MODEL_HELP, open_model};
use crate::hub::locate_data;
use crate::options::Count;
use crate::output::{self, text_table, writable};
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use hydra_runtime::chat::MaskedTokens;
use hydra_runtime::tokenizer::Tokenizer;
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Options of `data`.
#[derive(Args)]
pub struct Arguments {
    /// Files of records, as for finetune
    #[arg(value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    #[arg(long, value_name = "PATH", help = MODEL_HELP, value_parser = NonEmptyStringValueParser::new(),
        help_heading = "Model")]
    #[allow(missing_docs)]
    model: String,
    #[command(flatten, next_help_heading = "Data")]
    encoding: EncodingArgs,
    /// Number of the record to show, from 1 over all files
    #[arg(long, value_name = "N", default_value_t = Count::new(1), help_heading = "Output")]
    show: Count,
    /// Write the result to a JSON file as well
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    json: Option<PathBuf>,
}

/// What was found: the result of `--json`.
#[derive(Serialize)]
struct Report {
    files: Vec<FileReport>,
    /// Of a record, before anything is cut off.
    tokens: Lengths,
    /// Tokens that are learnt, of all files, before anything is cut off.
    learnt: usize,
    /// Tokens of all files.
    total: usize,
    seq_len: usize,
    /// Records whose end is cut off at `seq_len`.
    cut: usize,
    /// Records of which nothing is left to learn.
    dropped: usize,
    shown: Shown,
}

#[derive(Serialize)]
struct FileReport {
    path: PathBuf,
    format: Format,
    records: usize,
}

#[derive(Serialize)]
struct Lengths {
    median: usize,
    p95: usize,
    longest: usize,
    /// File and line of the longest record.
    longest_at: String,
}

/// A record as it is learnt, cut off at the sequence length.
#[derive(Serialize)]
struct Shown {
    at: String,
    tokens: Vec<u32>,
    texts: Vec<String>,
    mask: Vec<bool>,
}

/// Reads, counts and shows.
pub fn run(arguments: Arguments) -> Result<()> {
    let inputs = arguments.data.iter().map(PathBuf::as_path).chain([Path::new(&arguments.model)]);
    writable(&[("--json", arguments.json.as_ref())], &inputs.map(Some).collect::<Vec<_>>())?;
    let reading = Reading::new(arguments.encoding.data_format);
    let (mut files, mut records) = (Vec::new(), Vec::new());
    for path in &locate_data(&arguments.data)? {
        let own = reading.read(path)?;
        let format = own.first().map(|record| record.format).unwrap_or_default();
        files.push(FileReport { path: path.clone(), format, records: own.len() });
        records.extend(own);
    }
    let show = arguments.show.get();
    if show > records.len() {
        bail!("--show {show}: expected at most {}, the number of records", records.len());
    }
    let checkpoint = open_model(&arguments.model)?;
    let seq_len = arguments.encoding.seq_len(checkpoint.config().context)?;
    let tokenizer = checkpoint.tokenizer()?;
    let template = Template::new(&arguments.encoding, &tokenizer)?;
    template.applies(&records)?;
    let report = report(files, &records, &template, seq_len, show - 1)?;
    let report = Report { shown: report.shown.with_texts(&tokenizer)?, ..report };
    // One is written even if the other fails.
    let json = arguments.json.map_or(Ok(()), |path| output::write_json(&path, &report));
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    output::print(report.text() + &report.shown.text(colour))?;
    json
}

/// Tokenizes all records; `show` is the index of the one to show.
fn report(
    files: Vec<FileReport>,
    records: &[Record],
    template: &Template,
    seq_len: usize,
    show: usize,
) -> Result<Report> {
    let (mut lengths, mut learnt, mut cut, mut dropped) = (Vec::with_capacity(records.len()), 0, 0, 0);
    let mut shown = Shown { at: records[show].place.clone(), tokens: Vec::new(), texts: Vec::new(), mask: Vec::new() };
    for (number, record) in records.iter().enumerate() {
        let MaskedTokens { mut tokens, mut mask } = template.tokens(record).with_context(|| record.place.clone())?;
        lengths.push(tokens.len());
        learnt += mask.iter().filter(|&&mask| mask).count();
        let whole = tokens.len() <= seq_len;
        if number == show {
            tokens.truncate(seq_len);
            mask.truncate(seq_len);
            (shown.tokens, shown.mask) = (tokens.clone(), mask.clone());
        }
        match sequence(tokens, mask, seq_len, None) {
            Some(_) => cut += usize::from(!whole),
            None => dropped += 1,
        }
    }
    let total = lengths.iter().sum();
    let longest = (0..lengths.len()).max_by_key(|&i| (lengths[i], usize::MAX - i)).unwrap_or(0);
    let longest_at = records[longest].place.clone();
    lengths.sort_unstable();
    let rank = |share: f64| lengths[((share * lengths.len() as f64).ceil() as usize).max(1) - 1];
    let tokens = Lengths { median: rank(0.5), p95: rank(0.95), longest: rank(1.0), longest_at };
    Ok(Report { files, tokens, learnt, total, seq_len, cut, dropped, shown })
}

impl Report {
    fn text(&self) -> String {
        let head = ["file", "format", "records"].map(str::to_string);
        let row = |file: &FileReport| {
            vec![file.path.display().to_string(), file.format.to_string(), file.records.to_string()]
        };
        let rows: Vec<Vec<String>> = self.files.iter().map(row).collect();
        let Self { tokens, learnt, total, seq_len, cut, dropped, .. } = self;
        let Lengths { median, p95, longest, longest_at } = tokens;
        let share = 100.0 * *learnt as f64 / (*total).max(1) as f64;
        text_table(&head, &rows)
            + &format!(
                "\ntokens of a record: median {median}, 95th percentile {p95}, longest {longest} ({})\n\
                 {total} tokens in all, of which {learnt} ({share:.1} %) are learnt\n\
                 at --seq-len {seq_len}: {cut} records are cut off, {dropped} dropped because nothing is left to learn\n\n",
                output::escaped(longest_at)
            )
    }
}

impl Shown {
    /// With each token's text: what it adds to the text before it; the name of a token that adds none.
    fn with_texts(mut self, tokenizer: &Tokenizer) -> Result<Self> {
        let mut stream = tokenizer.stream();
        for &id in &self.tokens {
            let text = stream.push(id)?;
            let own = if text.is_empty() { tokenizer.decode(&[id])? } else { String::new() };
            // The first bytes of a character have no text; a special token has a name.
            self.texts.push(if text.is_empty() && own.is_empty() {
                tokenizer.token(id).unwrap_or_default()
            } else {
                text
            });
        }
        Ok(self)
    }

    /// The record, its tokens apart, and what is learnt in green or between marks.
    fn text(&self, colour: bool) -> String {
        let [given, learnt, end] = if colour { ["\u{1b}[2m", "\u{1b}[32m", "\u{1b}[0m"] } else { ["", "[[", "]]"] };
        let how = if colour { format!("{learnt}learnt{end}") } else { format!("learnt: {learnt}..{end}") };
        let mut text = format!("{} ({how}):\n", output::escaped(&self.at));
        let mut texts = self.texts.as_slice();
        for run in self.mask.chunk_by(|a, b| a == b) {
            let (own, rest) = texts.split_at(run.len());
            texts = rest;
            let learns = run[0];
            let tokens: Vec<String> = own.iter().map(|text| visible(text)).collect();
            let begin = if learns { learnt } else { given };
            let end = if learns || colour { end } else { "" };
            text += &format!("{begin}{}{end}", tokens.join("¦"));
        }
        text + "\n"
    }
}

/// A token's text with line breaks as they are, behind "\n"; other control characters are escaped.
fn visible(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(output::escaped).collect();
    lines.join("\\n\n")
}
