//! The TOML file of an experiment: seeds, settings of all runs, and a list of runs.
//!
//! ```toml
//! seeds = [1, 2, 3]
//!
//! [defaults]              # options of finetune by their names, except those of the experiment's own command line
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

use crate::data::limit;
use crate::eval::accuracy::AccuracyArgs;
use crate::eval::mmlu::Scoring;
use crate::options::{Count, NonNegative};
use crate::output::printable;
use crate::run::config::{Settings, Table, TomlFile, check_key};
use crate::run::spec::RunSpec;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use toml::Spanned;

/// Options that the experiment sets.
const OWN: [&str; 14] = [
    "model",
    "data",
    "eval-data",
    "out",
    "seed",
    "device",
    "precision",
    "threads",
    "accuracy-data",
    "accuracy-metric",
    "accuracy-after",
    "accuracy-limit",
    "accuracy-max-tokens",
    "accuracy-stop",
];
/// Options that decide which records a step takes: they stand in `[defaults]`, so that all runs have the same budget and order.
const SHARED: [&str; 9] =
    ["template", "chat-template", "data-format", "seq-len", "batch", "grad-accum", "steps", "epochs", "no-shuffle"];

/// The longest name of a folder that file systems take, nearly.
const MOST_LETTERS: usize = 200;

/// The file, checked.
pub struct Plan {
    /// The seeds of each run; at least one.
    pub seeds: Vec<u64>,
    /// At least one run.
    pub runs: Vec<Run>,
    /// How to choose learning rates.
    pub tune: Option<Tune>,
    /// How MMLU's questions are asked, if the file says it.
    pub mmlu: Option<Mmlu>,
    /// Records whose answers are compared.
    pub accuracy: Option<AccuracyArgs>,
    /// How often an interval holds the true difference.
    pub confidence: f64,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name in the table.
    pub name: String,
    /// The name of its folder.
    pub folder: String,
    /// Its options, with those of `[defaults]`.
    pub spec: RunSpec,
}

/// `[tune]`
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tune {
    /// The learning rates to try.
    pub lr: Vec<NonNegative>,
    /// A trial's share of the steps (or epochs) of a run.
    #[serde(default = "quarter")]
    pub fraction: f64,
    /// The share of the training records that is set aside to choose by.
    #[serde(default = "tenth")]
    pub validation: f64,
    /// Seed of that split and of the trials.
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
    /// Exemplars in each prompt.
    pub shots: usize,
    /// letter or cloze.
    pub scoring: Scoring,
    /// The most questions per subject.
    pub limit: Option<Count>,
    /// Only these subjects.
    pub subjects: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    seeds: Spanned<Vec<u64>>,
    #[serde(default)]
    defaults: Table,
    tune: Option<Spanned<Tune>>,
    mmlu: Option<Mmlu>,
    accuracy: Option<AccuracyArgs>,
    #[serde(default = "usual")]
    confidence: Spanned<f64>,
    bootstrap: Option<Spanned<toml::Value>>,
    run: Vec<Spanned<Table>>,
}

fn usual() -> Spanned<f64> {
    Spanned::new(0..0, 0.95)
}

impl Plan {
    /// Reads and checks a file; an error names file, line, and what is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let text = limit::settings(path).with_context(|| path.display().to_string())?;
        Self::parse(TomlFile { path, text: &text, table: None })
    }

    fn parse(toml: TomlFile<'_>) -> Result<Self> {
        let File { seeds, defaults, tune, mmlu, accuracy, confidence, bootstrap, run } = toml.parse()?;
        check_seeds(&seeds).with_context(|| toml.place(&seeds))?;
        let has_lr = defaults.keys().any(|key| key.get_ref() == "lr");
        if let Some(tune) = &tune {
            let file = TomlFile { table: Some("[tune]"), ..toml };
            tune.get_ref().check(has_lr).with_context(|| file.place(tune))?;
        }
        if let Some(bootstrap) = &bootstrap {
            bail!(
                "{}: [bootstrap]: intervals are no longer bootstrapped: remove this table; confidence = 0.95, beside seeds, is their level",
                toml.place(bootstrap)
            );
        }
        if !(*confidence.get_ref() > 0.0 && *confidence.get_ref() < 1.0) {
            let found = confidence.get_ref();
            bail!("{}: confidence: expected more than 0 and less than 1, found {found}", toml.place(&confidence));
        }
        check(mmlu.as_ref()).with_context(|| toml.path.display().to_string())?;
        let defaults = options(defaults, TomlFile { table: Some("[defaults]"), ..toml })?;
        let mut runs: Vec<Run> = Vec::new();
        for table in run {
            let place = toml.place(&table);
            let run = Run::parse(table.into_inner(), &defaults, toml, &place)?;
            if let Some(other) = runs.iter().find(|other| other.folder == run.folder) {
                let (one, two, folder) = (other.title(), run.title(), printable(&run.folder));
                bail!("{place}: {one} and {two} would share the folder {folder}: rename one");
            }
            runs.push(run);
        }
        if runs.is_empty() {
            bail!("{}: no [[run]]: expected at least one", toml.path.display());
        }
        let (seeds, tune) = (seeds.into_inner(), tune.map(Spanned::into_inner));
        Ok(Self { seeds, runs, tune, mmlu, accuracy, confidence: confidence.into_inner() })
    }
}

impl Run {
    /// A `[[run]]`, which begins at `place`.
    fn parse(mut table: Table, defaults: &RunSpec, toml: TomlFile<'_>, place: &str) -> Result<Self> {
        let key = table.keys().find(|key| key.get_ref() == "name").cloned();
        let name = match key.and_then(|key| table.remove(&key)).map(Spanned::into_inner) {
            Some(toml::Value::String(name)) if !name.trim().is_empty() => name,
            _ => bail!("{place}: [[run]] without a name: expected name = \"..\""),
        };
        let title = title(&name);
        let toml = TomlFile { table: Some(&title), ..toml };
        if let Some(key) = table.keys().find(|key| SHARED.contains(&key.get_ref().as_str())) {
            let (place, key) = (toml.place(key), key.get_ref());
            bail!("{place}: {key} belongs in [defaults]: all runs take the same records in the same order");
        }
        let spec = options(table, toml)?.over(defaults)?;
        let folder = folder(&name);
        if folder.len() > MOST_LETTERS {
            bail!("{place}: {title}: name too long: expected at most {MOST_LETTERS} letters, found {}", folder.len());
        }
        Ok(Self { name, folder, spec })
    }

    /// What errors call it.
    pub fn title(&self) -> String {
        title(&self.name)
    }
}

fn title(name: &str) -> String {
    format!("run \"{}\"", printable(name))
}

/// A table of options, none of them one that the experiment sets.
fn options(table: Table, toml: TomlFile<'_>) -> Result<RunSpec> {
    for key in table.keys() {
        check_key(key.get_ref(), &OWN).with_context(|| toml.place(key))?;
    }
    if let Some(key) = table.keys().find(|key| OWN.contains(&key.get_ref().as_str())) {
        let (place, key) = (toml.place(key), key.get_ref());
        match key.as_str() {
            "seed" => bail!("{place}: seed: seeds = [..] lists the seeds of all runs"),
            key if key.starts_with("accuracy-") => bail!("{place}: {key}: [accuracy] is for all runs"),
            _ => bail!("{place}: {key}: give --{key} on the command line, for all runs"),
        }
    }
    RunSpec::from_toml(table, toml)
}

fn check_seeds(seeds: &Spanned<Vec<u64>>) -> Result<()> {
    let all = seeds.get_ref();
    if all.is_empty() {
        bail!("seeds = []: expected at least one seed");
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = all.iter().find(|seed| !seen.insert(**seed)) {
        bail!("seeds has {twice} twice");
    }
    Ok(())
}

fn check(mmlu: Option<&Mmlu>) -> Result<()> {
    if mmlu.and_then(|mmlu| mmlu.subjects.as_ref()).is_some_and(Vec::is_empty) {
        bail!("[mmlu]: subjects = []: expected at least one subject");
    }
    Ok(())
}

impl Tune {
    fn check(&self, defaults_have_lr: bool) -> Result<()> {
        if defaults_have_lr {
            bail!("learning rates in [defaults] and in [tune]: expected one of the two");
        }
        if self.lr.is_empty() || self.lr.iter().any(|lr| lr.get() == 0.0) {
            bail!("lr: expected a list of numbers above 0");
        }
        if !(self.fraction > 0.0 && self.fraction <= 1.0) {
            bail!("fraction: expected more than 0 and at most 1, found {}", self.fraction);
        }
        if !(self.validation > 0.0 && self.validation < 1.0) {
            bail!("validation: expected more than 0 and less than 1, found {}", self.validation);
        }
        Ok(())
    }
}

/// The options that make a run what it is, without those that the experiment sets.
pub fn settings(spec: &RunSpec) -> Settings {
    let mut settings = spec.settings();
    settings.retain(|key, _| !OWN.contains(&key.as_str()));
    settings
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
    use serde_json::{Value, json};

    fn read(text: &str) -> Result<Plan> {
        Plan::parse(TomlFile { path: Path::new("c.toml"), text, table: None })
    }

    #[test]
    fn runs_override_defaults() {
        let plan = read(
            "seeds = [1, 2]\n[defaults]\nrank = 4\nlr = 1e-3\ntargets = ['q', 'v']\nrecompute = true\n\
             [[run]]\nname = 'LoRA, r=8'\nmethod = 'lora'\nrank = 8\nrecompute = false\n[[run]]\nname = 'Hydra'\n",
        )
        .unwrap();
        assert_eq!(plan.runs[0].folder, "lora-r-8");
        let [lora, hydra] = [0, 1].map(|i| Value::Object(settings(&plan.runs[i].spec)));
        assert_eq!(lora, json!({"method": "lora", "rank": 8, "targets": "q,v", "lr": 1e-3}));
        assert_eq!(hydra, json!({"rank": 4, "targets": "q,v", "lr": 1e-3, "recompute": true}));
    }

    #[test]
    fn errors_say_where_and_what() {
        let wrong = |text: &str| format!("{:#}", read(&format!("seeds = [1]\n{text}")).err().unwrap());
        let start = |text: &str, wanted: &str| {
            let error = wrong(text);
            assert!(error.starts_with(wanted), "{error}");
        };
        start(
            "[defaults]\nrnak = 4\n[[run]]\nname = 'a'",
            "c.toml:3: [defaults]: unknown option rnak: expected one of ",
        );
        start("[[run]]\nname = 'a'\nrank = 0", "c.toml:4: run \"a\": rank: expected a whole number from 1, found 0");
        start(
            "[[run]]\nname = 'a'\nmethod = 'b'",
            "c.toml:4: run \"a\": method: expected one of hydra, lora, split, found b",
        );
        start("[[run]]\nname = 'a'\nseed = 3", "c.toml:4: run \"a\": seed: seeds = [..]");
        start("[[run]]\nname = 'a'\nbatch = 3", "c.toml:4: run \"a\": batch belongs in [defaults]");
        start("[[run]]\nrank = 3", "c.toml:2: [[run]] without a name");
        start(&format!("[[run]]\nname = '{}'", "x".repeat(201)), "c.toml:2: run");
        assert!(wrong("[[run]]\nname = 'a b'\n[[run]]\nname = 'A-b'").contains("share the folder a-b"));
        start(
            "[[run]]\nname = 'a'\nrecompute = 1",
            "c.toml:4: run \"a\": recompute: expected a boolean, found integer 1",
        );
        start("[[run]]\nname = 'a'\nlr = [1e-3]", "c.toml:4: run \"a\": lr: expected a number from 0");
        start("[tune]\nlr = []\n[[run]]\nname = 'a'", "c.toml:2: [tune]: lr: expected a list of numbers above 0");
        start(
            "[tune]\nlr = [1e-3, 1e40]\n[[run]]\nname = 'a'",
            "c.toml:3: expected a number from 0, within the range of f32",
        );
        start("[mmlu]\nlimit = 0\n[[run]]\nname = 'a'", "c.toml:3: expected a whole number from 1");
        start("[mmlu]\nsubjects = []\n[[run]]\nname = 'a'", "c.toml: [mmlu]: subjects = []");
        start(
            "confidence = 95\n[[run]]\nname = 'a'",
            "c.toml:2: confidence: expected more than 0 and less than 1, found 95",
        );
        start(
            "[bootstrap]\nsamples = 5\n[[run]]\nname = 'a'",
            "c.toml:2: [bootstrap]: intervals are no longer bootstrapped: remove this table",
        );
        start("[tun]\nlr = []\n[[run]]\nname = 'a'", "c.toml:2: unknown key tun");
    }

    #[test]
    fn one_stop_needs_no_list() {
        let stop = |stop: &str| {
            let text = format!("seeds = [1]\n[accuracy]\ndata = 'd'\nstop = {stop}\n[[run]]\nname = 'a'");
            read(&text).map(|plan| plan.accuracy.unwrap().stop).map_err(|error| error.to_string())
        };
        assert_eq!(stop("'x'").unwrap(), stop("['x']").unwrap());
        assert!(stop("3").unwrap_err().starts_with("c.toml:4: expected a string or a list of strings"));
    }

    #[test]
    fn the_configurations_of_the_experiments_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let plans: Vec<Plan> = files
            .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
            .map(|path| Plan::read(&path).unwrap())
            .collect();
        assert!(plans.len() >= 5 && plans.iter().all(|plan| plan.runs.len() > 1), "{}", plans.len());
    }
}
