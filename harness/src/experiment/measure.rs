//! The loss and accuracy of one adapter, overall, and by record and question.

use super::stage::Stage;
use crate::data::encode::Encoded;
use crate::eval::accuracy;
use crate::eval::loss::{self, EvalLoss};
use crate::eval::mmlu::score::score;
use crate::eval::mmlu::table::Report;
use crate::progress::Progress;
use crate::ranks::Ranks;
use anyhow::Result;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::evaluate::SequenceLoss;
use serde::{Deserialize, Serialize};

/// Accuracy on MMLU.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Accuracy {
    /// Every question weighs the same.
    pub micro: f64,
    /// Every subject weighs the same.
    pub r#macro: f64,
    /// Number of questions.
    pub questions: usize,
}

/// Results by record and by question.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Details {
    /// Negative log-likelihood of each eval record.
    pub nll: Vec<f64>,
    /// Number of its target tokens.
    pub targets: Vec<usize>,
    /// Its category.
    pub categories: Vec<Option<String>>,
    /// Each question's subject.
    pub subjects: Vec<String>,
    /// Whether its answer is right: 0 or 1.
    pub correct: Vec<u8>,
    /// The score of each answer, from 0 to 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<f64>,
    /// Its category.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answer_categories: Vec<Option<String>>,
    /// Training loss by step.
    pub training: Vec<f64>,
}

/// What was measured.
pub struct Measured {
    /// Loss on the eval set.
    pub eval_loss: EvalLoss,
    /// Accuracy on MMLU, if the questions were asked.
    pub mmlu: Option<Accuracy>,
    /// Accuracy on the records of `[accuracy]`, if there are any.
    pub accuracy: Option<accuracy::report::Report>,
    /// By record and by question.
    pub details: Details,
}

/// Measures the model with an adapter or without, on `data` and, if `ask` is set, on the questions; an interrupt is the error
/// [`crate::interrupt::Stopped`].
pub fn measure<B: Backend>(
    stage: &Stage<'_, B>,
    adapter: Option<&Adapter>,
    data: &Encoded,
    ask: bool,
) -> Result<Measured> {
    let ranks = &Ranks::alone();
    let mut progress = Progress::new("records", data.sequences.len() as u64, 0);
    let losses =
        loss::losses(&stage.model, adapter, &data.sequences, ranks, |done| progress.update(done as u64, "eval loss"))?;
    drop(progress);
    let eval_loss = EvalLoss::of(&losses, &data.categories);
    if !eval_loss.all.loss.is_finite() {
        // The questions would have no answers, and JSON has no numbers for the records.
        return Ok(Measured { eval_loss, mmlu: None, accuracy: None, details: Details::default() });
    }
    let mut details = Details {
        nll: losses.iter().map(|loss: &SequenceLoss| loss.nll).collect(),
        targets: losses.iter().map(|loss| loss.targets).collect(),
        categories: data.categories.clone(),
        ..Details::default()
    };
    let mut mmlu = None;
    if let Some(questions) = stage.questions.as_ref().filter(|_| ask) {
        let (subjects, asking) = (&questions.subjects, questions.scoring.into());
        let outcome = score(&stage.model, adapter, &stage.tokenizer, subjects, asking, ranks)?;
        let report = Report::new(&outcome, 0, questions.scoring.into());
        let (micro, r#macro) = (report.accuracy_micro, report.accuracy_macro);
        mmlu = Some(Accuracy { micro, r#macro, questions: report.questions });
        details.subjects = outcome.predictions.iter().map(|p| p.subject.clone()).collect();
        details.correct = outcome.predictions.iter().map(|p| u8::from(p.answer == p.prediction)).collect();
    }
    let mut accuracy = None;
    if let Some(asked) = stage.asked.as_ref().filter(|_| ask) {
        let answers = asked.answers(adapter)?;
        let outcome = answers.of(&stage.model, adapter, &stage.tokenizer, ranks)?;
        accuracy = Some(accuracy::report::Report::new(&outcome, answers.metric));
        details.answers = outcome.predictions.iter().map(|p| p.score).collect();
        details.answer_categories = outcome.predictions.into_iter().map(|p| p.category).collect();
    }
    Ok(Measured { eval_loss, mmlu, accuracy, details })
}
