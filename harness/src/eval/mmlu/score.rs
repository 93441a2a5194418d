//! A model's scores for questions. The shared prefix of a subject's prompts is computed once; the rests are packed into passes.

use super::prompts::{Prompts, letter_ids};
use super::questions::Subject;
use super::{LETTERS, Scoring};
use crate::interrupt;
use crate::progress::Progress;
use anyhow::{Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::{self, Sequence};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use serde::Serialize;
use std::ops::Range;
use std::thread;
use std::time::Instant;

/// Tokens per pass, unless a question is longer.
const PASS_TOKENS: usize = 4096;

/// The outcome of one question: a line of `--predictions`.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// The subject.
    pub subject: String,
    /// The question's index in its subject.
    pub index: usize,
    /// The right letter.
    pub answer: char,
    /// The letter with the highest score; the first if several are equal.
    pub prediction: char,
    /// Scores of A to D: logits, or mean log-probabilities.
    pub scores: [f64; 4],
}

/// All outcomes, and what they cost.
pub struct Outcome {
    /// In the order of the subjects.
    pub predictions: Vec<Prediction>,
    /// Number of tokens of the prompts, prefixes counted each time.
    pub tokens: usize,
    /// Wall-clock time of scoring.
    pub seconds: f64,
}

/// Scores all questions of `subjects`; an interrupt is the error [`interrupt::Stopped`].
///
/// Under an adapter's label gate, a subject that is named like a label uses its head, any other the mean of all heads.
pub fn score<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    tokenizer: &Tokenizer,
    subjects: &[Subject],
    scoring: Scoring,
) -> Result<Outcome> {
    let prompts = tokenize(subjects, scoring, tokenizer, model.config().context)?;
    let letters = letter_ids(tokenizer)?;
    let longest_choice = |p: &Prompts| p.continuations.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let longest_rest = |p: &Prompts| p.prefix.len() + p.rests.iter().map(Vec::len).max().unwrap_or(0);
    let longest = prompts.iter().map(|p| longest_rest(p) + longest_choice(p)).max().unwrap_or(1);
    let pass_tokens = longest.max(PASS_TOKENS);
    let mut evaluator = Evaluator::new(model, adapter, pass_tokens)?;
    let questions: usize = subjects.iter().map(|subject| subject.test.len()).sum();
    let mut progress = Progress::new("questions", questions as u64, 0);
    let (started, mut predictions, mut correct) = (Instant::now(), Vec::with_capacity(questions), 0);
    for (subject, prompts) in subjects.iter().zip(&prompts) {
        let labels = adapter.filter(|adapter| adapter.config.gate == GateKind::Label).map(|a| &a.config.labels);
        let head = labels.and_then(|labels| labels.iter().position(|label| *label == subject.name));
        // A prefix's tokens get the mean of the heads; with a head of their own they can't be shared.
        let prefix = if head.is_none() { prompts.prefix.as_slice() } else { &[] };
        evaluator.set_prefix(prefix)?;
        let own: &[u32] = if head.is_none() { &[] } else { &prompts.prefix };
        let length = |i| prompts.scored(i, own.len()).min(pass_tokens);
        let lengths: Vec<usize> = (0..subject.test.len()).map(length).collect();
        for chunk in batch::groups(&lengths, pass_tokens)? {
            interrupt::check()?;
            let head = head.map(|head| head as u32);
            let scores = match scoring {
                Scoring::Letter => letter_scores(&mut evaluator, prompts, chunk.clone(), own, head, &letters)?,
                Scoring::Cloze => cloze_scores(&mut evaluator, prompts, chunk.clone(), own, head)?,
            };
            for (index, scores) in chunk.zip(scores) {
                if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
                    let why = "the model or the adapter has values that are not finite";
                    bail!("{} {index}: a score is {score}: {why}", subject.name);
                }
                let answer = subject.test[index].answer;
                let best = first_largest(&scores);
                correct += usize::from(best == answer);
                let (answer, prediction) = (LETTERS[answer], LETTERS[best]);
                predictions.push(Prediction { subject: subject.name.clone(), index, answer, prediction, scores });
            }
            let share = 100.0 * correct as f64 / predictions.len() as f64;
            progress.update(predictions.len() as u64, &format!("{share:.1} % correct, {}", subject.name));
        }
    }
    let tokens = prompts.iter().map(Prompts::tokens).sum();
    Ok(Outcome { predictions, tokens, seconds: started.elapsed().as_secs_f64() })
}

/// Tokenizes on all cores: prompts with five exemplars are tens of megabytes of text.
fn tokenize(subjects: &[Subject], scoring: Scoring, tokenizer: &Tokenizer, context: usize) -> Result<Vec<Prompts>> {
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    let share = subjects.len().div_ceil(workers).max(1);
    thread::scope(|scope| {
        let one = |subject| Prompts::new(subject, scoring, tokenizer, context);
        let part = |part| scope.spawn(move || -> Result<Vec<_>> { <[Subject]>::iter(part).map(one).collect() });
        let running: Vec<_> = subjects.chunks(share).map(part).collect();
        let mut prompts = Vec::with_capacity(subjects.len());
        for worker in running {
            prompts.extend(worker.join().expect("a tokenizing thread does not panic")?);
        }
        Ok(prompts)
    })
}

fn letter_scores<B: Backend>(
    evaluator: &mut Evaluator<B>,
    prompts: &Prompts,
    chunk: Range<usize>,
    own: &[u32],
    head: Option<u32>,
    letters: &[u32; 4],
) -> Result<Vec<[f64; 4]>> {
    let sequence = |i: usize| Sequence { lora_head: head, ..Sequence::prompt(&[own, &prompts.rests[i]].concat()) };
    let sequences: Vec<_> = chunk.map(sequence).collect();
    let logits = evaluator.last_logits(&sequences, letters)?;
    Ok(logits.iter().map(|row| std::array::from_fn(|i| f64::from(row[i]))).collect())
}

fn cloze_scores<B: Backend>(
    evaluator: &mut Evaluator<B>,
    prompts: &Prompts,
    chunk: Range<usize>,
    own: &[u32],
    head: Option<u32>,
) -> Result<Vec<[f64; 4]>> {
    let continued = |i: usize, choice: &Vec<u32>| Sequence {
        lora_head: head,
        ..Sequence::answer(&[own, &prompts.rests[i]].concat(), choice)
    };
    let choices = |i: usize| prompts.continuations[i].iter().map(move |choice| continued(i, choice));
    let sequences: Vec<_> = chunk.flat_map(choices).collect();
    let losses = evaluator.losses(&sequences)?;
    let mean = |loss: &hydra_runtime::evaluate::SequenceLoss| -loss.nll / loss.targets as f64;
    Ok(losses.chunks_exact(4).map(|four| std::array::from_fn(|i| mean(&four[i]))).collect())
}

fn first_largest(scores: &[f64; 4]) -> usize {
    (1..4).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}
