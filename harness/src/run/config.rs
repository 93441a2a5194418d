//! A [`RunSpec`] as a table: TOML files, run.json, and a command line to show.

use super::spec::RunSpec;
use crate::data::limit;
use crate::output::printable;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use toml::Spanned;

/// Options by their names; absent ones and flags that are off are not there.
pub type Settings = Map<String, Value>;

/// A table of TOML, each key and value with its place in the file.
pub type Table = BTreeMap<Spanned<String>, Spanned<toml::Value>>;

impl RunSpec {
    /// Names of all options, as on the command line.
    pub fn names() -> Vec<String> {
        let command = Self::augment_args(clap::Command::new("finetune"));
        let mut names: Vec<String> = command.get_arguments().filter_map(|o| o.get_long()).map(str::to_owned).collect();
        names.sort();
        names
    }

    /// As a table.
    pub fn settings(&self) -> Settings {
        let Ok(Value::Object(mut settings)) = serde_json::to_value(self) else { unreachable!("a struct is an object") };
        settings.retain(|_, value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(values) => !values.is_empty(),
            _ => true,
        });
        settings
    }

    /// From a table: what [`RunSpec::settings`] wrote, or run.json's.
    pub fn from_settings(settings: &Settings) -> Result<Self> {
        for (key, value) in settings {
            check_key(key, &[])?;
            // Each option by itself first, so that an error names it.
            Self::deserialize(Value::Object([(key.clone(), value.clone())].into_iter().collect()))
                .map_err(|error| anyhow!("{key}: {}", expected_and_found(&error.to_string())))?;
        }
        Ok(Self::deserialize(Value::Object(settings.clone()))?)
    }

    /// From a table of a TOML file; an error names file, line and option.
    pub fn from_toml(table: Table, file: TomlFile<'_>) -> Result<Self> {
        let mut whole = toml::Table::new();
        for (key, value) in table {
            let place = file.place(&key);
            let (key, value) = (key.into_inner(), value.into_inner());
            check_key(&key, &[]).with_context(|| place.clone())?;
            let one = toml::Table::from_iter([(key.clone(), value.clone())]);
            let wrong = |error: toml::de::Error| anyhow!("{key}: {}", expected_and_found(error.message()));
            Self::deserialize(one).map_err(wrong).context(place)?;
            whole.insert(key, value);
        }
        Ok(Self::deserialize(whole)?)
    }

    /// From a file: TOML, or the run.json of an earlier run.
    pub fn read(path: &Path) -> Result<Self> {
        let at = || path.display().to_string();
        let text = limit::settings(path).with_context(at)?;
        if path.extension().is_none_or(|extension| extension != "json") {
            let file = TomlFile { path, text: &text, table: None };
            return Self::from_toml(file.parse()?, file);
        }
        let file: Value = serde_json::from_str(&text).with_context(at)?;
        match &file["spec"] {
            Value::Object(settings) => Self::from_settings(settings).with_context(at),
            _ => {
                bail!("{}: no \"spec\": expected the run.json of this version of hydra, or a TOML file", path.display())
            }
        }
    }

    /// These options, and those of `base` that these leave open.
    pub fn over(&self, base: &Self) -> Result<Self> {
        let (own, mut settings) = (self.settings(), base.settings());
        // Either says how long the run is.
        if own.contains_key("steps") || own.contains_key("epochs") {
            settings.retain(|key, _| key != "steps" && key != "epochs");
        }
        settings.extend(own);
        // Flags that were switched off.
        for (name, flag) in [("no-shuffle", self.data.no_shuffle), ("recompute", self.training.recompute)] {
            if flag == Some(false) {
                settings.remove(name);
            }
        }
        Self::from_settings(&settings)
    }

    /// The command line that gives these options, without `hydra`.
    pub fn command_line(&self) -> Vec<String> {
        let mut words = vec!["finetune".to_string()];
        for (key, value) in self.settings() {
            let values: Vec<String> = match value {
                Value::Bool(_) => Vec::new(),
                Value::Array(values) => values.iter().map(as_word).collect(),
                value => vec![as_word(&value)],
            };
            if values.iter().any(|value| value.starts_with('-')) {
                words.extend(values.iter().map(|value| format!("--{key}={value}")));
            } else {
                words.push(format!("--{key}"));
                words.extend(values);
            }
        }
        words
    }
}

fn as_word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Fails if `key` is no option, naming those that there are, without the `excluded` ones.
pub fn check_key(key: &str, excluded: &[&str]) -> Result<()> {
    let mut names = RunSpec::names();
    if names.iter().any(|name| name == key) {
        return Ok(());
    }
    names.retain(|name| !excluded.contains(&name.as_str()));
    bail!("unknown option {}: expected one of {}", printable(key), names.join(", "))
}

/// A TOML file that is being read.
#[derive(Clone, Copy)]
pub struct TomlFile<'f> {
    /// The file.
    pub path: &'f Path,
    /// What is in it.
    pub text: &'f str,
    /// What errors call the table that is being read.
    pub table: Option<&'f str>,
}

impl TomlFile<'_> {
    /// All of it; an error names file and line.
    pub fn parse<T: serde::de::DeserializeOwned>(self) -> Result<T> {
        toml::from_str(self.text).map_err(|error| {
            let message = expected_and_found(error.message());
            match error.span() {
                Some(span) => anyhow!("{}: {message}", self.place_of(span.start)),
                None => anyhow!("{}: {message}", self.path.display()),
            }
        })
    }

    /// "FILE:LINE", or "FILE:LINE: table", of a key or value.
    pub fn place<T>(self, of: &Spanned<T>) -> String {
        self.place_of(of.span().start)
    }

    fn place_of(self, byte: usize) -> String {
        let line = self.text[..byte.min(self.text.len())].matches('\n').count() + 1;
        let table = self.table.map_or(String::new(), |table| format!(": {table}"));
        format!("{}:{line}{table}", self.path.display())
    }
}

/// serde's messages in the words of all others: "expected X, found Y".
fn expected_and_found(message: &str) -> String {
    let message = message.replace('`', "");
    let split = |prefix: &str| message.strip_prefix(prefix)?.split_once(", expected ");
    if let Some((found, expected)) =
        split("invalid type: ").or_else(|| split("invalid value: ")).or_else(|| split("unknown variant "))
    {
        return format!("expected {expected}, found {}", printable(found));
    }
    if let Some((found, expected)) = split("unknown field ") {
        return format!("unknown key {}: expected {expected}", printable(found));
    }
    message.replace("missing field", "missing key")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Count, NonNegative, Seed};
    use crate::run::choices::{Heads, Targets};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[arg(long)]
        config: Option<String>,
        #[command(flatten)]
        spec: RunSpec,
    }

    fn line(words: &str) -> RunSpec {
        let words = ["hydra"].into_iter().chain(words.split_whitespace());
        let Line { config, spec } = Line::try_parse_from(words).unwrap();
        assert!(config.is_none() || spec.model.model.is_none());
        spec
    }

    fn toml(text: &str) -> Result<RunSpec> {
        let file = TomlFile { path: Path::new("c.toml"), text, table: None };
        RunSpec::from_toml(file.parse()?, file)
    }

    const ALL: &str = "--model m --data a.jsonl b.jsonl --template official --chat-template c.jinja --data-format text \
        --seq-len 64 --no-shuffle --method hydra --gate router \
        --rank 8 --heads auto --alpha 16 --dropout 0.1 --head-dropout 0.2 --head-init random --router-temperature 0.5 --top-k 2 \
        --targets q,v --label-field topic --init-adapter i --batch 2 --grad-accum 3 --steps 7 --lr 1e-3 --router-lr 1e-2 \
        --schedule linear --warmup 5 --clip 0 --load-balance 0.01 --seed 9 --recompute --eval-data e.jsonl --eval-every 4 \
        --accuracy-data q.jsonl --accuracy-metric f1 --accuracy-after x --accuracy-limit 3 --accuracy-max-tokens 9 --accuracy-stop y --out o \
        --save-every 3 --device cpu --precision bf16 --threads 2";

    #[test]
    fn command_line_toml_and_json_say_the_same() {
        let spec = line(ALL);
        let settings = spec.settings();
        assert_eq!(settings.len() + 1, RunSpec::names().len(), "all options but --epochs, which excludes --steps");
        assert_eq!(RunSpec::from_settings(&settings).unwrap(), spec);
        // JSON's values are TOML's.
        let text: String = settings.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        assert_eq!(toml(&text).unwrap(), spec);
        assert_eq!(line(&spec.command_line()[1..].join(" ")), spec);
    }

    #[test]
    fn the_command_line_takes_precedence() {
        let file = toml("model = 'm'\ndata = 'd'\nout = 'o'\nsteps = 5\nrank = 8\nrecompute = true").unwrap();
        let spec = line("--config c --rank 2 --epochs 0.5 --recompute=false").over(&file).unwrap();
        assert_eq!(spec.model(), "m");
        assert_eq!((spec.adapter.rank, spec.training.recompute), (Some(Count::new(2)), None));
        assert_eq!((spec.training.steps, spec.training.epochs), (None, Some(NonNegative::new(0.5))));
        spec.check().unwrap();
        let error = line("--config c --rank 2").check().unwrap_err().to_string();
        assert!(error.starts_with("--model is missing"), "{error}");
    }

    #[test]
    fn tables_take_what_toml_has() {
        let spec = toml("targets = ['v', 'q_proj']\nheads = 3\nlr = 1\nseed = 5\ndata = ['a', 'b']").unwrap();
        assert_eq!(spec.adapter.targets, Some("q,v".parse::<Targets>().unwrap()));
        assert_eq!(spec.adapter.heads, Some(Heads::Number(Count::new(3))));
        assert_eq!((spec.training.lr, spec.training.seed), (Some(NonNegative::new(1.0)), Some(Seed::new(5))));
        assert_eq!(spec.data.data.len(), 2);
    }

    #[test]
    fn errors_say_where_and_what() {
        let wrong = |text: &str| format!("{:#}", toml(text).unwrap_err());
        assert!(
            wrong("rank = 4\nrnak = 4").starts_with("c.toml:2: unknown option rnak: expected one of accuracy-after, ")
        );
        assert_eq!(wrong("rank = 'x'"), "c.toml:1: rank: expected a whole number from 1, found string \"x\"");
        assert_eq!(wrong("\n\nlr = -1"), "c.toml:3: lr: expected a number from 0, within the range of f32, found -1");
        assert_eq!(wrong("heads = 'some'"), "c.toml:1: heads: expected a whole number from 1, or auto, found \"some\"");
        assert_eq!(
            wrong("targets = ['w']"),
            "c.toml:1: targets: expected all, or some of q, k, v, o, gate, up, down, found \"w\""
        );
        assert_eq!(wrong("schedule = 'x'"), "c.toml:1: schedule: expected one of constant, linear, cosine, found x");
        assert_eq!(wrong("recompute = 1"), "c.toml:1: recompute: expected a boolean, found integer 1");
        assert_eq!(wrong("rank = [1"), "c.toml:1: unclosed array, expected ]");
        let control = wrong(&format!("rank = \"{}\\u001b\"", "x".repeat(99)));
        assert!(!control.contains('\u{1b}') && control.len() < 160, "{control}");
    }
}
