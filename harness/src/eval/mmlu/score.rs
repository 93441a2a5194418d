//! A model's scores for questions. The shared prefix of a subject's prompts is computed once; the rests are packed into passes.

use super::prompts::{Prompts, letter_ids};
use super::questions::{Question, Subject};
use super::{Asking, LETTERS, Scoring, Style, helm};
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
    /// The letter with the highest score, the first if several are equal; `-` if HELM's answer is none.
    pub prediction: char,
    /// Scores of A to D: logits, log-probabilities in lm-evaluation-harness's style, or mean log-probabilities of the texts.
    pub scores: [f64; 4],
    /// Whether each letter is the likeliest of all tokens, where that was looked at.
    #[serde(skip)]
    pub greedy: [bool; 4],
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
    asking: Asking,
) -> Result<Outcome> {
    let prompts = tokenize(subjects, asking, tokenizer, model.config().context)?;
    let letters = Letters::new(tokenizer, asking)?;
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
            let found = match asking.scoring {
                Scoring::Letter => letter_scores(&mut evaluator, prompts, chunk.clone(), own, head, &letters)?,
                Scoring::Cloze => cloze_scores(&mut evaluator, prompts, chunk.clone(), own, head)?,
            };
            for (index, Found { scores, best, greedy }) in chunk.zip(found) {
                if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
                    let why = "the model or the adapter has values that are not finite";
                    bail!("{} {index}: a score is {score}: {why}", subject.name);
                }
                let answer = subject.test[index].answer;
                let best = best.map(|best| taken_for(best, &subject.test[index], asking.style));
                correct += usize::from(best == Some(answer));
                let (answer, prediction) = (LETTERS[answer], best.map_or(NO_LETTER, |best| LETTERS[best]));
                let subject = subject.name.clone();
                predictions.push(Prediction { subject, index, answer, prediction, scores, greedy });
            }
            let share = 100.0 * correct as f64 / predictions.len() as f64;
            progress.update(predictions.len() as u64, &format!("{share:.1} % correct, {}", subject.name));
        }
    }
    let tokens = prompts.iter().map(Prompts::tokens).sum();
    Ok(Outcome { predictions, tokens, seconds: started.elapsed().as_secs_f64() })
}

/// Tokenizes on all cores: prompts with five exemplars are tens of megabytes of text.
fn tokenize(subjects: &[Subject], asking: Asking, tokenizer: &Tokenizer, context: usize) -> Result<Vec<Prompts>> {
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    let share = subjects.len().div_ceil(workers).max(1);
    thread::scope(|scope| {
        let one = |subject| Prompts::new(subject, asking, tokenizer, context);
        let part = |part| scope.spawn(move || -> Result<Vec<_>> { <[Subject]>::iter(part).map(one).collect() });
        let running: Vec<_> = subjects.chunks(share).map(part).collect();
        let mut prompts = Vec::with_capacity(subjects.len());
        for worker in running {
            prompts.extend(worker.join().expect("a tokenizing thread does not panic")?);
        }
        Ok(prompts)
    })
}

/// What is found for a question.
struct Found {
    /// The scores of A to D.
    scores: [f64; 4],
    /// The answer, if it is one of them.
    best: Option<usize>,
    /// Whether each is the likeliest of all tokens.
    greedy: [bool; 4],
}

impl Found {
    fn best_of(scores: [f64; 4]) -> Self {
        Self { scores, best: Some(first_largest(&scores)), greedy: [false; 4] }
    }
}

/// The choice that a style takes the best one for: HELM the right one, if its text is the same.
fn taken_for(best: usize, question: &Question, style: Option<Style>) -> usize {
    let choices = &question.choices;
    let same = style == Some(Style::Helm) && helm::same(choices, best) == helm::same(choices, question.answer);
    if same { question.answer } else { best }
}

/// The prediction where the likeliest token is no letter.
const NO_LETTER: char = '-';

/// The tokens whose logits are read.
struct Letters {
    ids: Vec<u32>,
    /// Where the letters are among `ids`.
    places: [usize; 4],
    /// What is made of the logits.
    style: Option<Style>,
    /// HELM: which letter each token is.
    of_token: Vec<Option<usize>>,
}

impl Letters {
    fn new(tokenizer: &Tokenizer, asking: Asking) -> Result<Self> {
        let (letters, style) = (letter_ids(tokenizer)?, asking.style);
        if !matches!(style, Some(Style::Helm | Style::LmEval)) {
            return Ok(Self { ids: letters.to_vec(), places: [0, 1, 2, 3], style, of_token: Vec::new() });
        }
        let ids: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
        let letter = |&id: &u32| {
            let text = tokenizer.decode(&[id])?;
            Ok(LETTERS.iter().position(|letter| text.trim() == letter.to_string()))
        };
        let of_token =
            if style == Some(Style::Helm) { ids.iter().map(letter).collect::<Result<_>>()? } else { Vec::new() };
        Ok(Self { ids, places: letters.map(|id| id as usize), style, of_token })
    }

    /// From the logits of `ids`.
    fn found(&self, logits: &[f32]) -> Found {
        let scores = self.places.map(|place| f64::from(logits[place]));
        let likeliest =
            (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best }).unwrap_or(0);
        match self.style {
            Some(Style::Helm) => Found { best: self.of_token[likeliest], ..Found::best_of(scores) },
            Some(Style::LmEval) => {
                let most = f64::from(logits[likeliest]);
                let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
                let greedy = self.places.map(|place| place == likeliest);
                Found { greedy, ..Found::best_of(scores.map(|score| score - most - sum.ln())) }
            }
            Some(Style::Hendrycks | Style::Opencompass) | None => Found::best_of(scores),
        }
    }
}

fn letter_scores<B: Backend>(
    evaluator: &mut Evaluator<B>,
    prompts: &Prompts,
    chunk: Range<usize>,
    own: &[u32],
    head: Option<u32>,
    letters: &Letters,
) -> Result<Vec<Found>> {
    let sequence = |i: usize| Sequence { lora_head: head, ..Sequence::prompt(&[own, &prompts.rests[i]].concat()) };
    let sequences: Vec<_> = chunk.map(sequence).collect();
    let logits = evaluator.last_logits(&sequences, &letters.ids)?;
    Ok(logits.iter().map(|row| letters.found(row)).collect())
}

fn cloze_scores<B: Backend>(
    evaluator: &mut Evaluator<B>,
    prompts: &Prompts,
    chunk: Range<usize>,
    own: &[u32],
    head: Option<u32>,
) -> Result<Vec<Found>> {
    let continued = |i: usize, choice: &Vec<u32>| Sequence {
        lora_head: head,
        ..Sequence::answer(&[own, &prompts.rests[i]].concat(), choice)
    };
    let choices = |i: usize| prompts.continuations[i].iter().map(move |choice| continued(i, choice));
    let sequences: Vec<_> = chunk.flat_map(choices).collect();
    let losses = evaluator.losses(&sequences)?;
    let mean = |loss: &hydra_runtime::evaluate::SequenceLoss| -loss.nll / loss.targets as f64;
    let scores = losses.chunks_exact(4).map(|four| std::array::from_fn(|i| mean(&four[i])));
    Ok(scores.map(Found::best_of).collect())
}

fn first_largest(scores: &[f64; 4]) -> usize {
    (1..4).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}
