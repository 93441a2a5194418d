//! The loss on an eval set, overall and by category.

use crate::data::encode::Encoded;
use crate::interrupt;
use crate::output::{printable, text_table};
use crate::ranks::Ranks;
use anyhow::Result;
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::{self, Sequence};
use hydra_runtime::evaluate::{Evaluator, SequenceLoss};
use hydra_runtime::model::Model;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Tokens per pass, unless a record is longer.
const PASS_TOKENS: usize = 2048;

/// A mean over target tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// Mean negative log-likelihood of a target token.
    pub loss: f64,
    /// Target tokens.
    pub tokens: usize,
    /// Records.
    pub records: usize,
}

impl Loss {
    /// Adds a record; `loss` is a sum until [`Loss::finish`].
    fn add(&mut self, nll: f64, targets: usize) {
        self.loss += nll;
        self.tokens += targets;
        self.records += 1;
    }

    fn finish(&mut self) {
        self.loss /= self.tokens.max(1) as f64;
    }
}

/// The loss on an eval set: what `eval loss --json` writes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalLoss {
    /// Over all records.
    #[serde(flatten)]
    pub all: Loss,
    /// By category; records without one count in `all` alone.
    pub categories: BTreeMap<String, Loss>,
}

/// Measures the loss on `data`, with the work of all ranks; an interrupt is the error [`interrupt::Stopped`]. `tick`
/// gets the number of records done.
pub fn measure<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    data: &Encoded,
    ranks: &Ranks,
    tick: impl FnMut(usize),
) -> Result<EvalLoss> {
    Ok(EvalLoss::of(&losses(model, adapter, &data.sequences, ranks, tick)?, &data.categories))
}

/// The most tokens of a pass over `sequences`.
pub fn pass_tokens(sequences: &[Sequence]) -> usize {
    let lengths = || sequences.iter().map(|sequence| sequence.tokens.len());
    lengths().sum::<usize>().min(PASS_TOKENS).max(lengths().max().unwrap_or(1))
}

/// The loss of each record, with the work of all ranks; an interrupt is the error [`interrupt::Stopped`]. `tick` gets
/// the number of records done.
pub fn losses<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    sequences: &[Sequence],
    ranks: &Ranks,
    tick: impl FnMut(usize),
) -> Result<Vec<SequenceLoss>> {
    let own = own_losses(model, adapter, sequences, ranks, tick);
    // As bits: JSON has no numbers for a loss that is not finite.
    let bits = own.map(|own| own.iter().map(|loss| (loss.nll.to_bits(), loss.targets)).collect());
    let all = ranks.gather(bits)?.into_iter();
    Ok(all.map(|(nll, targets)| SequenceLoss { nll: f64::from_bits(nll), targets }).collect())
}

/// The losses of this rank's records.
fn own_losses<B: Backend>(
    model: &Model<B>,
    adapter: Option<&Adapter>,
    sequences: &[Sequence],
    ranks: &Ranks,
    mut tick: impl FnMut(usize),
) -> Result<Vec<SequenceLoss>> {
    let pass = pass_tokens(sequences);
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
    let passes = batch::groups(&lengths, pass)?;
    let mut evaluator = Evaluator::new(model, adapter, pass)?;
    let mut found = Vec::new();
    for own in &passes[ranks.share_of(passes.len())] {
        interrupt::check()?;
        found.extend(evaluator.losses(&sequences[own.clone()])?);
        tick(ranks.about_done(found.len(), sequences.len()));
    }
    Ok(found)
}

impl EvalLoss {
    /// Adds up the records' losses, by their categories.
    pub fn of(losses: &[SequenceLoss], categories: &[Option<String>]) -> Self {
        let mut found = Self::default();
        for (loss, category) in losses.iter().zip(categories) {
            found.all.add(loss.nll, loss.targets);
            if let Some(category) = category {
                found.categories.entry(category.clone()).or_default().add(loss.nll, loss.targets);
            }
        }
        found.all.finish();
        found.categories.values_mut().for_each(Loss::finish);
        found
    }

    /// As a table, a line per category.
    pub fn table(&self) -> String {
        let row = |(name, loss): (&String, &Loss)| {
            vec![printable(name), loss.records.to_string(), loss.tokens.to_string(), format!("{:.4}", loss.loss)]
        };
        let rows: Vec<Vec<String>> = self.categories.iter().chain([(&"all".to_string(), &self.all)]).map(row).collect();
        text_table(&["category", "records", "tokens", "loss"].map(str::to_owned), &rows)
    }
}
