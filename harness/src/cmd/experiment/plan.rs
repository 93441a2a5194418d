//! The TOML file: seeds, settings of all runs, and a list of runs.
//!
//! ```toml
//! seeds = [1, 2, 3]
//!
//! [defaults]              # any option of finetune, by its name there, but those of the command line of compare
//! batch = 8
//! steps = 200
//!
//! [tune]                  # optional: each run without an lr of its own is tried with each of these
//! lr = [3e-4, 1e-3, 3e-3]
//!
//! [[run]]
//! name = "LoRA r=8"
//! method = "lora"
//! rank = 8
//! ```

use crate::cmd::finetune;
use crate::mmlu::Scoring;
use crate::statistics::Bootstrap;
use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// Settings by the names of finetune's options.
pub type Settings = Map<String, Value>;

/// Options that the experiment sets.
const OWN: [&str; 9] = ["model", "data", "eval-data", "out", "seed", "resume", "device", "precision", "threads"];
/// Options that decide which records a step takes: all runs have them from `[defaults]`, so that order and budget are alike.
const SHARED: [&str; 7] = ["template", "seq-len", "batch", "grad-accum", "steps", "epochs", "no-shuffle"];
/// Saves are what an interrupted run goes on from.
const SAVE_EVERY: u64 = 50;

/// What file systems take as a folder's name, nearly.
const MOST_LETTERS: usize = 200;

/// The file, checked.
pub struct Plan {
    /// Of each run.
    pub seeds: Vec<u64>,
    /// At least one.
    pub runs: Vec<Run>,
    /// How to find learning rates.
    pub tune: Option<Tune>,
    /// How MMLU's questions are put.
    pub mmlu: Mmlu,
    /// How intervals are made.
    pub bootstrap: Bootstrap,
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Run {
    /// In the table.
    pub name: String,
    /// Its folder's name.
    pub folder: String,
    /// Defaults filled in.
    pub settings: Settings,
}

/// `[tune]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tune {
    /// The rates to try.
    pub lr: Vec<f64>,
    /// The share of the steps (or epochs) of a run that a trial takes.
    #[serde(default = "quarter")]
    pub fraction: f64,
    /// The share of the training records that is kept apart to choose by.
    #[serde(default = "tenth")]
    pub validation: f64,
    /// Of that split and of the trials.
    #[serde(default)]
    pub seed: u64,
}

fn quarter() -> f64 {
    0.25
}

fn tenth() -> f64 {
    0.1
}

/// `[mmlu]`
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mmlu {
    /// Exemplars a subject.
    pub shots: usize,
    /// letter or cloze.
    pub scoring: Scoring,
    /// The most questions a subject.
    pub limit: Option<usize>,
    /// Only these.
    pub subjects: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    seeds: Vec<u64>,
    #[serde(default)]
    defaults: toml::Table,
    tune: Option<Tune>,
    #[serde(default)]
    mmlu: Mmlu,
    #[serde(default)]
    bootstrap: Bootstrap,
    run: Vec<toml::Table>,
}

impl Plan {
    /// Reads and checks a file; what is wrong is named.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let file: File = toml::from_str(&text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let line = line.map_or(String::new(), |line| format!(":{line}"));
            anyhow!("{}{line}: {}", path.display(), error.message())
        })?;
        Self::check(file).with_context(|| path.display().to_string())
    }

    fn check(file: File) -> Result<Self> {
        let File { seeds, defaults, tune, mmlu, bootstrap, run } = file;
        if seeds.is_empty() {
            bail!("seeds = []: wanted at least one");
        }
        if let Some(twice) = seeds.iter().enumerate().find(|(i, seed)| seeds[..*i].contains(seed)) {
            bail!("seeds: {} twice", twice.1);
        }
        let share = bootstrap.level > 0.0 && bootstrap.level < 1.0;
        if !(1..=1_000_000).contains(&bootstrap.samples) || !share {
            bail!("[bootstrap]: wanted 1 to 1000000 samples, and a level between 0 and 1");
        }
        if mmlu.limit == Some(0) || mmlu.subjects.as_ref().is_some_and(Vec::is_empty) {
            bail!("[mmlu]: wanted a limit from 1 on, and one subject at least");
        }
        if let Some(tune) = &tune {
            tune.check().context("[tune]")?;
            if defaults.contains_key("lr") {
                bail!("[defaults] has an lr and [tune] a list of them: wanted one of the two");
            }
        }
        let defaults = settings(&defaults).context("[defaults]")?;
        let mut runs: Vec<Run> = Vec::new();
        for mut table in run {
            let name = match table.remove("name") {
                Some(toml::Value::String(name)) if !name.trim().is_empty() => name,
                _ => bail!("[[run]] {}: without a name", runs.len() + 1),
            };
            let own = settings(&table).with_context(|| format!("run {name:?}"))?;
            if let Some(key) = own.keys().find(|key| SHARED.contains(&key.as_str())) {
                bail!("run {name:?}: {key} belongs in [defaults]: all runs take the same records in the same order");
            }
            let settings: Settings = defaults.clone().into_iter().chain(own).collect();
            let folder = folder(&name);
            if folder.len() > MOST_LETTERS {
                bail!(
                    "run {name:?}: its name makes a folder of {} letters, wanted {MOST_LETTERS} at most",
                    folder.len()
                );
            }
            if let Some(other) = runs.iter().find(|run| run.folder == folder) {
                bail!("runs {:?} and {name:?}: their folder would be {folder} for both", other.name);
            }
            let run = Run { name, folder, settings };
            // Options and values are checked by finetune's own parser.
            run.arguments(&words("m", &["d".into()], "d", "o", &run.settings, 0))?;
            runs.push(run);
        }
        if runs.is_empty() {
            bail!("no [[run]]");
        }
        Ok(Self { seeds, runs, tune, mmlu, bootstrap })
    }
}

impl Tune {
    fn check(&self) -> Result<()> {
        // As finetune takes them.
        let trained = |&lr: &f64| (lr as f32).is_finite() && lr as f32 > 0.0;
        if self.lr.is_empty() || !self.lr.iter().all(trained) {
            bail!("lr: wanted a list of numbers above 0, within the range of f32");
        }
        if !(self.fraction > 0.0 && self.fraction <= 1.0) {
            bail!("fraction {}: wanted more than 0 and at most 1", self.fraction);
        }
        if !(self.validation > 0.0 && self.validation < 1.0) {
            bail!("validation {}: wanted more than 0 and less than 1", self.validation);
        }
        Ok(())
    }
}

impl Run {
    /// What errors call it.
    pub fn title(&self) -> String {
        format!("run {:?}", self.name)
    }

    /// finetune's options, from its command line; an error names the run.
    pub fn arguments(&self, words: &[String]) -> Result<finetune::Arguments> {
        let wrong = |error| anyhow!("{}", crate::wrong_usage(&error).trim_start_matches("error: "));
        finetune::parse(words.iter().cloned()).map_err(wrong).with_context(|| self.title())
    }
}

/// The command line of one fine-tune, `hydra` left out.
pub fn words(model: &str, data: &[String], eval_data: &str, out: &str, settings: &Settings, seed: u64) -> Vec<String> {
    let mut words = vec!["finetune".to_string(), format!("--model={model}"), "--data".to_string()];
    words.extend(data.iter().cloned());
    words.extend([format!("--eval-data={eval_data}"), format!("--out={out}"), format!("--seed={seed}")]);
    for (key, value) in settings {
        match value {
            Value::Bool(true) => words.push(format!("--{key}")),
            Value::Bool(false) => {}
            Value::String(text) => words.push(format!("--{key}={text}")),
            other => words.push(format!("--{key}={other}")),
        }
    }
    if !settings.contains_key("save-every") {
        words.push(format!("--save-every={SAVE_EVERY}"));
    }
    words
}

/// A table's keys must be options of finetune, and none of those that the experiment sets.
fn settings(table: &toml::Table) -> Result<Settings> {
    let options = finetune::options();
    let mut settings = BTreeMap::new();
    for (key, value) in table {
        if OWN.contains(&key.as_str()) {
            let instead =
                if key == "seed" { "seeds = [..] has them" } else { "it is the command line's, for all runs" };
            bail!("{key}: {instead}");
        }
        let Some(&takes_value) = options.get(key) else {
            let names: Vec<&str> = options.keys().map(String::as_str).filter(|name| !OWN.contains(name)).collect();
            bail!("{key}: no option of finetune; there are {}", names.join(", "));
        };
        let value = plain(value).with_context(|| key.clone())?;
        match (takes_value, value.is_boolean()) {
            (true, true) => bail!("{key} = {value}: wanted a value"),
            (false, false) => bail!("{key} = {value}: wanted true or false"),
            _ => settings.insert(key.clone(), value),
        };
    }
    Ok(settings.into_iter().collect())
}

/// A TOML value as the command line has it; a list becomes names with commas between them.
fn plain(value: &toml::Value) -> Result<Value> {
    Ok(match value {
        toml::Value::String(text) => text.clone().into(),
        toml::Value::Integer(n) => (*n).into(),
        toml::Value::Float(x) => {
            serde_json::Number::from_f64(*x).map(Value::Number).context("wanted a finite number")?
        }
        toml::Value::Boolean(b) => (*b).into(),
        toml::Value::Array(items) => {
            let name = |item: &toml::Value| item.as_str().map(str::to_owned);
            let names: Option<Vec<String>> = items.iter().map(name).collect();
            names
                .context("a list of other than strings; for learning rates to choose from there is [tune]")?
                .join(",")
                .into()
        }
        toml::Value::Datetime(_) | toml::Value::Table(_) => bail!("wanted a string, a number, true or false"),
    })
}

/// A name as a folder's: small letters and digits, a dash for anything else.
fn folder(name: &str) -> String {
    let dashed: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let parts: Vec<&str> = dashed.split('-').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { "run".to_string() } else { parts.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Plan> {
        Plan::check(toml::from_str(text)?)
    }

    #[test]
    fn defaults_fill_in_and_runs_override() {
        let plan = check(
            "seeds = [1, 2]\n[defaults]\nrank = 4\nlr = 1e-3\ntargets = ['q', 'v']\nrecompute = true\n\
             [[run]]\nname = 'LoRA, r=8'\nmethod = 'lora'\nrank = 8\n[[run]]\nname = 'Hydra'\n",
        )
        .unwrap();
        assert_eq!(plan.runs[0].folder, "lora-r-8");
        assert_eq!((&plan.runs[0].settings["rank"], &plan.runs[1].settings["rank"]), (&8.into(), &4.into()));
        let words = words("m", &["a b".into()], "e", "o", &plan.runs[0].settings, 7);
        let joined = words.join(" ");
        assert!(joined.contains("--targets=q,v") && joined.contains("--seed=7") && joined.contains("--recompute"));
        plan.runs[0].arguments(&words).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text: &str| format!("{:#}", check(&format!("seeds = [1]\n{text}")).err().unwrap());
        assert!(wrong("[defaults]\nrnak = 4\n[[run]]\nname = 'a'").contains("[defaults]: rnak: no option of finetune"));
        assert!(wrong("[[run]]\nname = 'a'\nrank = 0").contains("run \"a\": invalid value '0' for '--rank"));
        assert!(wrong("[[run]]\nname = 'a'\nmethod = 'b'").contains("possible values: hydra, lora, split"));
        assert!(wrong("[[run]]\nname = 'a'\nseed = 3").contains("seeds = [..]"));
        assert!(wrong("[[run]]\nname = 'a'\nbatch = 3").contains("belongs in [defaults]"));
        assert!(wrong("[[run]]\nrank = 3").contains("without a name"));
        assert!(wrong(&format!("[[run]]\nname = '{}'", "x".repeat(201))).contains("201 letters"));
        assert!(wrong("[[run]]\nname = 'a b'\n[[run]]\nname = 'A-b'").contains("a-b for both"));
        assert!(wrong("[[run]]\nname = 'a'\nrecompute = 1").contains("wanted true or false"));
        assert!(wrong("[[run]]\nname = 'a'\nlr = [1e-3]").contains("[tune]"));
        assert!(wrong("[tune]\nlr = []\n[[run]]\nname = 'a'").contains("numbers above 0"));
        assert!(wrong("[tune]\nlr = [1e-3, 1e40]\n[[run]]\nname = 'a'").contains("range of f32"));
        assert!(wrong("[mmlu]\nlimit = 0\n[[run]]\nname = 'a'").contains("limit from 1 on"));
        assert!(wrong("[mmlu]\nsubjects = []\n[[run]]\nname = 'a'").contains("one subject"));
        assert!(wrong("[tun]\nlr = []\n[[run]]\nname = 'a'").contains("unknown field `tun`"));
    }
}
