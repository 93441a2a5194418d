//! A model's answers: generated greedily, many at once, or the likeliest of a question's choices.

use super::choices::Choices;
use super::metric::Metric;
use super::questions::{Ask, Question};
use crate::data::template::Template;
use crate::eval::loss::losses;
use crate::interrupt;
use crate::progress::Progress;
use crate::ranks::Ranks;
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::Sequence;
use hydra_runtime::generate::{Sampler, StopStrings};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::serve::{Engine, EngineOptions, Event, Request, RequestId};
use hydra_runtime::tokenizer::TextStream;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// Who answers, and how.
pub struct Setting<'a, B: Backend> {
    /// The model.
    pub model: &'a Model<B>,
    /// Its adapter.
    pub adapter: Option<&'a Adapter>,
    /// How questions become prompts.
    pub asking: Asking<'a>,
    /// What counts.
    pub metric: Metric,
    /// How to generate.
    pub generation: &'a Generation,
    /// Who shares the work.
    pub ranks: &'a Ranks,
}

/// How questions become prompts.
pub struct Asking<'a> {
    /// The template of instructions and conversations.
    pub template: &'a Template,
    /// Whether the template was chosen: questions with choices then use it, too, instead of their own prompts.
    pub templated: bool,
    /// The most tokens of a prompt and its answer: the model's context.
    pub context: usize,
}

/// How to generate an answer.
pub struct Generation {
    /// The most tokens of an answer.
    pub max_tokens: usize,
    /// An answer ends before any of these.
    pub stop: Vec<String>,
    /// What follows this in an answer counts.
    pub after: Option<String>,
    /// Answers that are generated at once.
    pub batch: usize,
}

/// A question's outcome: a line of `--predictions`.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// File and line.
    pub at: String,
    /// The question's category.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// The right answer.
    pub answer: String,
    /// The model's: a text, or the choice with the highest log-likelihood.
    pub prediction: String,
    /// From 0 to 1.
    pub score: f64,
    /// The same for the choice with the highest log-likelihood per character.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_norm: Option<f64>,
    /// Log-likelihoods of the choices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_likelihoods: Option<Vec<f64>>,
}

/// All outcomes, and what they cost.
pub struct Outcome {
    /// In the questions' order.
    pub predictions: Vec<Prediction>,
    /// Tokens of the prompts and answers.
    pub tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
}

impl<B: Backend> Setting<'_, B> {
    /// Answers all questions; an interrupt is the error [`interrupt::Stopped`].
    pub fn answer(&self, questions: &[Question]) -> Result<Outcome> {
        let started = Instant::now();
        let (predictions, tokens) = match self.metric {
            Metric::Choice => self.choose(questions)?,
            Metric::Exact | Metric::Contains | Metric::F1 => self.generate(questions)?,
        };
        Ok(Outcome { predictions, tokens, seconds: started.elapsed().as_secs_f64() })
    }

    /// The head of a question's label under the label gate.
    fn head(&self, question: &Question) -> Option<usize> {
        let adapter = self.adapter.filter(|adapter| adapter.config.gate == GateKind::Label)?;
        let own = question.label.as_ref()?;
        adapter.config.labels.iter().position(|label| label == own)
    }

    fn choose(&self, questions: &[Question]) -> Result<(Vec<Prediction>, usize)> {
        let mut all: Vec<Sequence> = Vec::new();
        let mut asked: Vec<(&Question, &Choices)> = Vec::with_capacity(questions.len());
        for question in questions {
            let (choices, sequences) = self.asking.choices(question)?;
            let lora_head = self.head(question).map(|head| head as u32);
            all.extend(sequences.into_iter().map(|sequence| Sequence { lora_head, ..sequence }));
            asked.push((question, choices));
        }
        let tokens = all.iter().map(|sequence| sequence.tokens.len()).sum();
        let mut progress = Progress::new("choices", all.len() as u64, 0);
        let losses = losses(self.model, self.adapter, &all, self.ranks, |done| progress.update(done as u64, ""))?;
        let (mut predictions, mut rest) = (Vec::with_capacity(asked.len()), losses.as_slice());
        for (question, choices) in asked {
            let (own, others) = rest.split_at(choices.choices.len());
            rest = others;
            let likelihoods: Vec<f64> = own.iter().map(|loss| -loss.nll).collect();
            if likelihoods.iter().any(|likelihood| !likelihood.is_finite()) {
                bail!("{}: a log-likelihood is not finite: the model or the adapter has such values", question.at);
            }
            predictions.push(chosen(question, choices, likelihoods));
        }
        Ok((predictions, tokens))
    }

    fn generate(&self, questions: &[Question]) -> Result<(Vec<Prediction>, usize)> {
        let prompts: Vec<(Vec<u32>, String)> =
            questions.iter().map(|question| self.asking.prompt(question)).collect::<Result<_>>()?;
        let texts = self.ranks.gather(self.texts(questions, &prompts))?;
        let tokens = prompts.iter().map(|(prompt, _)| prompt.len()).chain(texts.iter().map(|text| text.tokens)).sum();
        let predictions =
            questions.iter().zip(prompts).zip(texts).map(|((question, (_, answer)), Text { text, .. })| {
                let score = self.metric.score(&text, &answer, self.generation.after.as_deref());
                let (at, category) = (question.at.clone(), question.category.clone());
                Prediction { at, category, answer, prediction: text, score, score_norm: None, log_likelihoods: None }
            });
        Ok((predictions.collect(), tokens))
    }

    /// What is generated after the prompts of this rank's questions.
    fn texts(&self, questions: &[Question], prompts: &[(Vec<u32>, String)]) -> Result<Vec<Text>> {
        let Generation { max_tokens, stop, batch, .. } = self.generation;
        let longest = prompts.iter().map(|(prompt, _)| prompt.len()).max().unwrap_or(1);
        let context = Some(self.model.config().context.min(longest.saturating_add(*max_tokens)).max(2));
        let mut engine = Engine::new(self.model, EngineOptions { slots: *batch, context, ..EngineOptions::default() })?;
        let own = self.ranks.share_of(questions.len());
        let (questions, prompts, all) = (&questions[own.clone()], &prompts[own], questions.len());
        let stop = StopStrings::new(stop.clone())?;
        let mut texts = Texts { stop, running: BTreeMap::new(), done: vec![None; questions.len()] };
        let mut heads = BTreeMap::new();
        for (number, (question, (prompt, _))) in questions.iter().zip(prompts).enumerate() {
            let request = self.request(prompt.clone(), self.attached(question, &mut heads)?)?;
            texts.begin(engine.submit(request)?, number, self.asking.template.tokenizer().stream());
        }
        let mut progress = Progress::new("questions", all as u64, 0);
        while !engine.is_idle() {
            interrupt::check()?;
            for event in engine.step()? {
                if let Some(id) = texts.take(event)? {
                    engine.cancel(id);
                }
            }
            let done = texts.done.iter().flatten().count();
            progress.update(self.ranks.about_done(done, all) as u64, "");
        }
        let text = |(question, text): (&Question, Option<Text>)| {
            text.with_context(|| format!("{}: no answer was generated", question.at))
        };
        questions.iter().zip(texts.done).map(text).collect()
    }

    fn request(&self, prompt: Vec<u32>, adapter: Option<AttachedAdapter<B>>) -> Result<Request<B>> {
        let end_tokens = self.model.end_tokens()?;
        let max_tokens = self.generation.max_tokens;
        Ok(Request { adapter, max_tokens, end_tokens, ..Request::new(prompt, Sampler::new(0.0, 1.0, 0)?) })
    }

    /// The adapter, or the head of the question's label; each is attached once.
    fn attached(
        &self,
        question: &Question,
        heads: &mut BTreeMap<Option<usize>, AttachedAdapter<B>>,
    ) -> Result<Option<AttachedAdapter<B>>> {
        let (Some(adapter), head) = (self.adapter, self.head(question)) else { return Ok(None) };
        if let Some(attached) = heads.get(&head) {
            return Ok(Some(attached.clone()));
        }
        let attached = match head {
            Some(head) => self.model.attach(&adapter.head(head)?)?,
            None => self.model.attach(adapter)?,
        };
        heads.insert(head, attached.clone());
        Ok(Some(attached))
    }
}

impl Asking<'_> {
    /// Fails, naming its place, if a question can't be asked.
    pub fn check(&self, question: &Question, metric: Metric) -> Result<()> {
        match metric {
            Metric::Choice => self.choices(question).map(drop),
            Metric::Exact | Metric::Contains | Metric::F1 => self.prompt(question).map(drop),
        }
    }

    /// A question's choices, and the question with each of them.
    fn choices<'q>(&self, question: &'q Question) -> Result<(&'q Choices, Vec<Sequence>)> {
        let (at, context) = (&question.at, self.context);
        let Ask::Choices(choices) = &question.ask else { bail!("{at}: expected choices") };
        let mut sequences = Vec::with_capacity(choices.choices.len());
        for choice in &choices.choices {
            let (prompt, answer) = self.with_choice(choices, choice).with_context(|| at.clone())?;
            let tokens = prompt.len() + answer.len();
            if tokens > context {
                bail!("{at}: expected at most {context} tokens, the model's context, found {tokens}");
            }
            sequences.push(Sequence::answer(&prompt, &answer));
        }
        Ok((choices, sequences))
    }

    /// The tokens of a question and those of one of its choices.
    fn with_choice(&self, choices: &Choices, choice: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let tokenizer = self.template.tokenizer();
        let (prompt, answer) = if self.templated {
            (self.template.prompt(&choices.question)?, tokenizer.encode(choice)?)
        } else {
            // Tokenized as one text, and cut where the question alone ends, as lm-evaluation-harness does.
            let prompt = tokenizer.encode_prompt(&choices.prompt)?;
            let whole = tokenizer.encode_prompt(&format!("{} {choice}", choices.prompt))?;
            let answer = whole.get(prompt.len()..).unwrap_or_default().to_vec();
            (prompt, answer)
        };
        if prompt.is_empty() || answer.is_empty() {
            bail!("a question or a choice has no tokens");
        }
        Ok((prompt, answer))
    }

    /// The tokens of a question, and the right answer.
    fn prompt(&self, question: &Question) -> Result<(Vec<u32>, String)> {
        let (at, most) = (&question.at, self.context.saturating_sub(1));
        let found = match &question.ask {
            Ask::Record(record) => self.template.question(record),
            Ask::Choices(choices) => {
                let prompt = match self.templated {
                    true => self.template.prompt(&choices.question),
                    false => Ok(self.template.tokenizer().encode_prompt(&choices.prompt)?),
                };
                prompt.map(|prompt| (prompt, choices.choices[choices.answer].clone()))
            }
        };
        let (prompt, answer) = found.with_context(|| at.clone())?;
        if prompt.is_empty() || prompt.len() > most {
            bail!("{at}: expected 1 to {most} tokens, the model's context, found {}", prompt.len());
        }
        Ok((prompt, answer))
    }
}

/// Answers while they are generated.
struct Texts {
    /// As it is before a text begins.
    stop: StopStrings,
    running: BTreeMap<RequestId, Running>,
    /// By question.
    done: Vec<Option<Text>>,
}

/// A generated text.
#[derive(Clone, Serialize, Deserialize)]
struct Text {
    text: String,
    tokens: usize,
}

struct Running {
    question: usize,
    stream: TextStream,
    stop: StopStrings,
    text: String,
    tokens: usize,
}

impl Texts {
    fn begin(&mut self, id: RequestId, question: usize, stream: TextStream) {
        self.running.insert(id, Running { question, stream, stop: self.stop.clone(), text: String::new(), tokens: 0 });
    }

    /// Takes what a step of the engine did; returns a request that is to be ended.
    fn take(&mut self, event: Event) -> Result<Option<RequestId>> {
        let id = event.id();
        match event {
            Event::Token { token, .. } => {
                let Some(running) = self.running.get_mut(&id) else { return Ok(None) };
                running.tokens += 1;
                let piece = running.stream.push(token)?;
                running.text += &running.stop.push(&piece);
                let finished = running.stop.finished();
                if finished {
                    self.finish(id)?;
                }
                Ok(finished.then_some(id))
            }
            Event::Finished { .. } => self.finish(id).map(|()| None),
            Event::Failed { error, .. } => Err(error.into()),
            Event::Prompt { .. } => Ok(None),
        }
    }

    fn finish(&mut self, id: RequestId) -> Result<()> {
        let Some(running) = self.running.remove(&id) else { return Ok(()) };
        let Running { question, stream, mut stop, mut text, tokens } = running;
        text += &stop.push(&stream.finish()?);
        text += &stop.finish();
        self.done[question] = Some(Text { text, tokens });
        Ok(())
    }
}

/// The choice with the highest log-likelihood, the first of equals; and by log-likelihood per character.
fn chosen(question: &Question, choices: &Choices, likelihoods: Vec<f64>) -> Prediction {
    let best = |score: &dyn Fn(usize) -> f64| {
        (0..likelihoods.len()).reduce(|best, next| if score(next) > score(best) { next } else { best }).unwrap_or(0)
    };
    let characters = |i: usize| choices.choices[i].chars().count().max(1) as f64;
    let (sum, mean) = (best(&|i| likelihoods[i]), best(&|i| likelihoods[i] / characters(i)));
    Prediction {
        at: question.at.clone(),
        category: question.category.clone(),
        answer: choices.choices[choices.answer].clone(),
        prediction: choices.choices[sum].clone(),
        score: f64::from(sum == choices.answer),
        score_norm: Some(f64::from(mean == choices.answer)),
        log_likelihoods: Some(likelihoods),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_likeliest_is_chosen() {
        let choices = Choices {
            question: String::new(),
            prompt: String::new(),
            choices: ["long choice", "one", "two"].map(String::from).to_vec(),
            answer: 0,
        };
        let question = Question { at: "f:1".into(), category: None, label: None, ask: Ask::Choices(choices.clone()) };
        let found = chosen(&question, &choices, vec![-4.0, -3.0, -3.0]);
        assert_eq!((found.prediction.as_str(), found.score, found.score_norm), ("one", 0.0, Some(1.0)));
    }
}
