//! `hydra demo`: LoRA, LoRA-Split and HydraLoRA at about equal parameter counts, on a tiny model and a corpus of four domains
//! that this program carries (`assets/`).

mod assets;

use super::{finetune, positive};
use crate::device::{DeviceArgs, on_device};
use crate::mmlu::Scoring;
use crate::mmlu::questions::{self, Selection, Subject};
use crate::mmlu::score::score;
use crate::mmlu::table::Report;
use crate::report::{self, Curve, curves, section, table};
use crate::{interrupt, output, session};
use anyhow::{Context, Result, bail};
use clap::Args;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Options of `demo`.
#[derive(Args)]
pub struct Arguments {
    /// Where to write; an earlier demo there is replaced
    #[arg(long, value_name = "DIR", default_value = "hydra-demo")]
    out: PathBuf,
    /// Steps of each fine-tune
    #[arg(long, allow_negative_numbers = true, value_name = "S", default_value_t = 400, value_parser = positive)]
    steps: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A method, and the rank at which its parameters are about as many as the others'.
struct Method {
    title: &'static str,
    name: &'static str,
    rank: usize,
    heads: usize,
}

const METHODS: [Method; 3] = [
    Method { title: "LoRA", name: "lora", rank: 12, heads: 1 },
    Method { title: "LoRA-Split", name: "split", rank: 3, heads: 4 },
    Method { title: "HydraLoRA", name: "hydra", rank: 4, heads: 4 },
];

/// The other settings of all three, chosen on the tiny model.
const SETTINGS: &str =
    "--targets all --batch 16 --grad-accum 1 --lr 3e-3 --alpha 32 --dropout 0 --warmup 10 --clip 1 --seed 0";

/// The tiny model can't name letters; it can tell which text fits.
const SCORING: Scoring = Scoring::Cloze;

/// One line of the comparison.
struct Row {
    title: &'static str,
    parameters: u64,
    losses: Vec<f64>,
    accuracy: f64,
    stderr: f64,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    let started = Instant::now();
    let out = &arguments.out;
    assets::write(out)?;
    let subjects = questions::read(&out.join("mmlu"), &Selection::default())?;
    let (mut rows, mut training, mut commands, mut router) = (Vec::new(), Vec::new(), Vec::new(), None);
    let mut domains = Vec::new();
    for method in &METHODS {
        let command = command(method, &arguments);
        output::say(format_args!("\n{command}"));
        let done = finetune::execute(parse(&command, out)?)?;
        if interrupt::requested() {
            return Ok(());
        }
        let [first, .., last] = done.trained.evals.as_slice() else { bail!("the demo measured no held-out loss") };
        let losses = |line: &session::EvalLine| {
            let all = line.held_out.all.loss;
            line.held_out.categories.values().map(|loss| loss.loss).chain([all]).collect::<Vec<_>>()
        };
        if rows.is_empty() {
            domains = first.held_out.categories.keys().cloned().collect();
            let (accuracy, stderr) = accuracy(&arguments, None, &subjects)?;
            rows.push(Row { title: "before", parameters: 0, losses: losses(first), accuracy, stderr });
        }
        let (accuracy, stderr) = accuracy(&arguments, Some(&done.trained.adapter), &subjects)?;
        rows.push(Row { title: method.title, parameters: done.trainable, losses: losses(last), accuracy, stderr });
        let points = done.trained.steps.iter().map(|line| (line.step as f64, line.loss)).collect();
        training.push(Curve { name: method.title.into(), points });
        commands.push(command);
        router = done.router.or(router);
    }
    let (head, cells) = comparison(&domains, &rows);
    output::print(format_args!("\n{}\n", output::text_table(&head, &cells)))?;
    let mut body = format!(
        "<p>Three ways to fine-tune a LLaMA of one million parameters on four domains, at about equal numbers of trainable \
         parameters. Loss is held out, by domain; accuracy is over {} multiple-choice questions, 25 % by chance.</p>",
        subjects.iter().map(|subject| subject.test.len()).sum::<usize>()
    );
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    body += &section("Before and after", &table(&head, &cells));
    body += &section("Training loss by step", &curves(&training));
    if let Some(router) = router {
        body += &section("HydraLoRA's router", &router.html());
    }
    let commands: String = commands.iter().map(|c| format!("<p><code>{}</code></p>", report::escape(c))).collect();
    body += &section("The same by hand", &commands);
    report::write(out, "Hydra demo", &body)?;
    let (seconds, page) = (started.elapsed().as_secs_f64(), out.join(report::FILE));
    output::print(format_args!("{seconds:.0} s; curves and the router's heat map are in {}\n", page.display()))?;
    Ok(())
}

/// What a person would type, up to the folder's name.
fn command(method: &Method, arguments: &Arguments) -> String {
    let Method { name, rank, heads, .. } = method;
    let dir = arguments.out.display();
    let data = format!(
        "--model {dir}/model --data {dir}/corpus/train.jsonl --eval-data {dir}/corpus/test.jsonl --out {dir}/{name}"
    );
    let (steps, device) = (arguments.steps, arguments.device.words().join(" "));
    format!("hydra finetune {data} --method {name} --rank {rank} --heads {heads} {SETTINGS} --steps {steps} {device}")
}

/// The command's options; the folder may have spaces in its name.
fn parse(command: &str, out: &Path) -> Result<finetune::Arguments> {
    const FOLDER: &str = "\u{0}";
    let folder = out.display().to_string();
    let words = command.replace(&folder, FOLDER);
    let words = words.split(' ').skip(1).map(|word| word.replace(FOLDER, &folder));
    Ok(finetune::parse(words)?)
}

fn accuracy(arguments: &Arguments, adapter: Option<&Adapter>, subjects: &[Subject]) -> Result<(f64, f64)> {
    let checkpoint = Checkpoint::open(&arguments.out.join("model"))?;
    let tokenizer = checkpoint.tokenizer()?;
    let outcome = on_device!(arguments.device, device => {
        let model = Model::load(device, &checkpoint)?;
        score(&model, adapter, &tokenizer, subjects, SCORING)?
    });
    let report = Report::new(&outcome, 0, SCORING);
    Ok((report.accuracy_micro, report.stderr))
}

fn comparison(domains: &[String], rows: &[Row]) -> (Vec<String>, Vec<Vec<String>>) {
    let loss = |name: &str| format!("loss {name}");
    let mut head = vec!["method".to_string(), "trainable".to_string()];
    head.extend(domains.iter().map(|domain| loss(domain)).chain([loss("all"), "accuracy %".to_string()]));
    let cells = rows.iter().map(|row| {
        let mut cells = vec![row.title.to_string(), row.parameters.to_string()];
        cells.extend(row.losses.iter().map(|loss| format!("{loss:.3}")));
        cells.push(format!("{:.1} ± {:.1}", 100.0 * row.accuracy, 100.0 * row.stderr));
        cells
    });
    (head, cells.collect())
}

/// Removes what an earlier demo has written; anything else in the folder is refused.
fn clear(out: &Path) -> Result<()> {
    let at = || out.display().to_string();
    if !out.exists() {
        return Ok(());
    }
    let mut entries = fs::read_dir(out).with_context(at)?;
    if entries.next().is_none() {
        return Ok(());
    }
    if !out.join(assets::MARK).is_file() {
        bail!("{} is there and not an earlier demo's: give another --out", out.display());
    }
    for folder in ["model", "corpus", "mmlu"].into_iter().chain(METHODS.map(|method| method.name)) {
        let folder = out.join(folder);
        if folder.is_dir() {
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
    }
    Ok(())
}
