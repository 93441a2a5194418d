//! A model's scores for questions. The shared prefix of a subject's prompts is computed once, where that saves enough; the rests
//! are packed into passes.

use super::prompts::{Prompts, letter_ids};
use super::questions::{Question, Subject};
use super::{Asking, LETTERS, Scoring, Style, helm};
use crate::interrupt;
use crate::progress::Progress;
use crate::ranks::Ranks;
use anyhow::{Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::{self, Sequence};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::thread;
use std::time::Instant;

/// Tokens per pass, unless a question is longer.
const PASS_TOKENS: usize = 4096;

/// Tokens that a shared prefix has to save before it is computed by itself: a pass, however short, reads all weights, and takes about
/// as long as so many tokens more in another one.
const SHARED_TOKENS: usize = 256;

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
    /// Scores of A to D: logits, log-probabilities in lm-evaluation-harness's style, or mean log-probabilities of the
    /// texts.
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

/// Scores all questions of `subjects`, with the work of all ranks; an interrupt is the error [`interrupt::Stopped`].
///
/// Under an adapter's label gate, a subject that is named like a label uses its head, any other the mean of all heads.
pub fn score<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    tokenizer: &Tokenizer,
    subjects: &[Subject],
    asking: Asking,
    ranks: &Ranks,
) -> Result<Outcome> {
    let prompts = ranks.agree(tokenize(subjects, asking, tokenizer, model.config().context))?;
    let started = Instant::now();
    let asked: Vec<_> = subjects.iter().zip(&prompts).map(|(subject, p)| Asked::new(subject, p, adapter)).collect();
    let own = || own_scores(model, adapter, &asked, asking, &Letters::new(tokenizer, asking)?, ranks);
    let mut found = ranks.gather(own())?;
    found.sort_by_key(|scores| (scores.subject, scores.index));
    let predictions = found.into_iter().map(|scores| scores.prediction(subjects)).collect();
    let tokens = prompts.iter().map(Prompts::tokens).sum();
    Ok(Outcome { predictions, tokens, seconds: started.elapsed().as_secs_f64() })
}

/// The scores of this rank's questions.
fn own_scores<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    asked: &[Asked<'_>],
    asking: Asking,
    letters: &Letters,
    ranks: &Ranks,
) -> Result<Vec<Scores>> {
    let all: usize = asked.iter().map(|asked| asked.subject.test.len()).sum();
    let (mut progress, mut correct) = (Progress::new("questions", all as u64, 0), 0);
    let pass_tokens = asked.iter().map(|asked| asked.prompts.longest()).max().unwrap_or(1).max(PASS_TOKENS);
    let passes = passes(asked, pass_tokens)?;
    let mut evaluator = Evaluator::new(model, adapter, pass_tokens)?;
    let (mut found, mut prefix) = (Vec::new(), None);
    for pass in &passes[ranks.share_of(passes.len())] {
        interrupt::check()?;
        if prefix.replace(pass.shared) != Some(pass.shared) {
            evaluator.set_prefix(pass.shared.map_or(&[], |subject| &asked[subject].prompts.prefix))?;
        }
        let scores = match asking.scoring {
            Scoring::Letter => letter_scores(&mut evaluator, asked, &pass.questions, letters)?,
            Scoring::Cloze => cloze_scores(&mut evaluator, asked, &pass.questions)?,
        };
        for (&(subject, index), Found { scores, best, greedy }) in pass.questions.iter().zip(scores) {
            let asked = asked[subject].subject;
            if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
                let why = "the model or the adapter has values that are not finite";
                bail!("{} {index}: a score is {score}: {why}", asked.name);
            }
            let question = &asked.test[index];
            let best = best.map(|best| taken_for(best, question, asking.style));
            correct += usize::from(best == Some(question.answer));
            found.push(Scores { subject, index, scores, best, greedy });
        }
        let share = 100.0 * correct as f64 / found.len() as f64;
        let subject = pass.questions.last().map_or("", |&(subject, _)| &asked[subject].subject.name);
        progress.update(ranks.about_done(found.len(), all) as u64, &format!("{share:.1} % correct, {subject}"));
    }
    Ok(found)
}

/// A question's scores, as ranks tell them each other.
#[derive(Serialize, Deserialize)]
struct Scores {
    /// Index of the question's subject.
    subject: usize,
    index: usize,
    scores: [f64; 4],
    best: Option<usize>,
    greedy: [bool; 4],
}

impl Scores {
    fn prediction(self, subjects: &[Subject]) -> Prediction {
        let Self { subject, index, scores, best, greedy } = self;
        let subject = &subjects[subject];
        let answer = LETTERS[subject.test[index].answer];
        let prediction = best.map_or(NO_LETTER, |best| LETTERS[best]);
        Prediction { subject: subject.name.clone(), index, answer, prediction, scores, greedy }
    }
}

/// A subject, and how it is asked.
struct Asked<'a> {
    subject: &'a Subject,
    prompts: &'a Prompts,
    /// The head of its label under the label gate.
    head: Option<u32>,
}

impl<'a> Asked<'a> {
    fn new(subject: &'a Subject, prompts: &'a Prompts, adapter: Option<&Adapter>) -> Self {
        let labels = adapter.filter(|adapter| adapter.config.gate == GateKind::Label).map(|a| &a.config.labels);
        let head = labels.and_then(|labels| labels.iter().position(|label| *label == subject.name));
        Self { subject, prompts, head: head.map(|head| head as u32) }
    }

    /// Whether the prefix is computed once for all questions. Its tokens then get the mean of the heads; with a head of their own they
    /// can't be shared.
    fn shares_prefix(&self) -> bool {
        let sequences = self.subject.test.len() + 3 * self.prompts.continuations.len();
        self.head.is_none() && self.prompts.prefix.len() * sequences.saturating_sub(1) >= SHARED_TOKENS
    }

    /// What each question begins with.
    fn own_prefix(&self) -> &[u32] {
        if self.shares_prefix() { &[] } else { &self.prompts.prefix }
    }

    /// A question's prompt, behind the shared prefix.
    fn prompt(&self, index: usize) -> Vec<u32> {
        [self.own_prefix(), &self.prompts.rests[index]].concat()
    }
}

/// What goes through the model at once.
struct Pass {
    /// The subject whose prefix the questions continue, if they do.
    shared: Option<usize>,
    /// Subject and index of each.
    questions: Vec<(usize, usize)>,
}

/// The passes that take all questions: those with a shared prefix by subject, all others together.
fn passes(asked: &[Asked<'_>], pass_tokens: usize) -> Result<Vec<Pass>> {
    let (sharing, alone): (Vec<_>, Vec<_>) = (0..asked.len()).partition(|&subject| asked[subject].shares_prefix());
    let together = sharing.into_iter().map(|subject| (Some(subject), vec![subject])).chain([(None, alone)]);
    let mut passes = Vec::new();
    for (shared, subjects) in together {
        let of = |&subject: &usize| (0..asked[subject].subject.test.len()).map(move |index| (subject, index));
        let questions: Vec<_> = subjects.iter().flat_map(of).collect();
        let length = |&(subject, index): &(usize, usize)| {
            let asked = &asked[subject];
            asked.prompts.scored(index, asked.own_prefix().len()).min(pass_tokens)
        };
        let lengths: Vec<usize> = questions.iter().map(length).collect();
        let groups = batch::groups(&lengths, pass_tokens)?;
        passes.extend(groups.into_iter().map(|group| Pass { shared, questions: questions[group].to_vec() }));
    }
    Ok(passes)
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
    asked: &[Asked<'_>],
    questions: &[(usize, usize)],
    letters: &Letters,
) -> Result<Vec<Found>> {
    let sequence = |&(subject, index): &(usize, usize)| {
        let asked = &asked[subject];
        Sequence { lora_head: asked.head, ..Sequence::prompt(&asked.prompt(index)) }
    };
    let sequences: Vec<_> = questions.iter().map(sequence).collect();
    let logits = evaluator.last_logits(&sequences, &letters.ids)?;
    Ok(logits.iter().map(|row| letters.found(row)).collect())
}

fn cloze_scores<B: Backend>(
    evaluator: &mut Evaluator<B>,
    asked: &[Asked<'_>],
    questions: &[(usize, usize)],
) -> Result<Vec<Found>> {
    let mut sequences = Vec::with_capacity(4 * questions.len());
    for &(subject, index) in questions {
        let (asked, prompt) = (&asked[subject], asked[subject].prompt(index));
        let answer = |choice: &Vec<u32>| Sequence { lora_head: asked.head, ..Sequence::answer(&prompt, choice) };
        sequences.extend(asked.prompts.continuations[index].iter().map(answer));
    }
    let losses = evaluator.losses(&sequences)?;
    let mean = |loss: &hydra_runtime::evaluate::SequenceLoss| -loss.nll / loss.targets as f64;
    let scores = losses.chunks_exact(4).map(|four| std::array::from_fn(|i| mean(&four[i])));
    Ok(scores.map(Found::best_of).collect())
}

fn first_largest(scores: &[f64; 4]) -> usize {
    (1..4).fold(0, |best, i| if scores[i] > scores[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, questions: usize) -> Subject {
        let question = Question { question: "?".into(), choices: ["1", "2", "3", "4"].map(String::from), answer: 1 };
        Subject { name: name.into(), dev: Vec::new(), test: vec![question; questions] }
    }

    #[test]
    fn a_prefix_is_shared_where_that_saves_a_pass() {
        let subjects = [subject("a", 3), subject("b", 30), subject("c", 2)];
        let tokens =
            |questions| Prompts { prefix: vec![7; 20], rests: vec![vec![8; 10]; questions], continuations: Vec::new() };
        let prompts = subjects.each_ref().map(|subject| tokens(subject.test.len()));
        let asked: Vec<_> = subjects.iter().zip(&prompts).map(|(subject, p)| Asked::new(subject, p, None)).collect();
        assert_eq!(asked.iter().map(|asked| asked.prompt(0).len()).collect::<Vec<_>>(), [30, 10, 30]);
        let passes = passes(&asked, 200).unwrap();
        let found: Vec<_> = passes.iter().map(|pass| (pass.shared, pass.questions.len(), pass.questions[0])).collect();
        // Of "b" 200 tokens are 20 questions; the five of the others go together.
        assert_eq!(found, [(Some(1), 20, (1, 0)), (Some(1), 10, (1, 20)), (None, 5, (0, 0))]);
    }
}
