//! Two models on the same text, in f32 and on the CPU: what was written, and what it was made of.

use super::Source;
use anyhow::{Result, bail};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Format;
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::Sequence;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;

/// What both read: prose, code and arithmetic.
const TEXTS: [&str; 3] = [
    "The lake of Lerna lies south of Argos. In it lived a water snake of nine heads; where one was cut off, two grew in its place.",
    "def mean(values):\n    return sum(values) / len(values)\n\n",
    "Question: A dozen eggs cost 3.60. What do 5 eggs cost?\nAnswer: 3.60 / 12 = 0.30, and 5 * 0.30 = 1.50.",
];
/// The most tokens of a text; the logits of all of them are in memory.
const TOKENS: usize = 48;

/// The texts as token ids, and the logits that the model with its adapter gives, under the fixed gate.
pub struct Prompts<'a> {
    source: &'a Source,
    sequences: Vec<Sequence>,
    wanted: Vec<Vec<f32>>,
}

/// How near two models are.
pub struct Agreement {
    /// The largest difference of a logit, relative to the largest logit; NaN if one is.
    pub difference: f64,
    /// The mean over positions of KL(wanted || found), in nats.
    pub mean_kl: f64,
    /// The largest.
    pub largest_kl: f64,
    /// Positions that were compared.
    pub tokens: usize,
}

impl<'a> Prompts<'a> {
    /// Runs the model with its adapter.
    pub fn new(source: &'a Source) -> Result<Self> {
        let (fixed, lora_head) = source.adapter.with_fixed_gate(source.gate)?;
        let tokenizer = source.checkpoint.tokenizer()?;
        let sequence = |text: &&str| {
            let mut ids = tokenizer.encode_prompt(text)?;
            ids.truncate(TOKENS.min(source.checkpoint.config().context));
            Ok(Sequence { lora_head, ..Sequence::prompt(&ids) })
        };
        let sequences = TEXTS.iter().map(sequence).collect::<Result<Vec<_>>>()?;
        let mut prompts = Self { source, sequences, wanted: Vec::new() };
        prompts.wanted = prompts.logits(&source.checkpoint, Some(&fixed))?;
        Ok(prompts)
    }

    /// Compares with a model that was written, or with the adapter that was written on the same model.
    pub fn compare(&self, checkpoint: &Checkpoint, adapter: Option<&Adapter>) -> Result<Agreement> {
        let tokenizer = checkpoint.tokenizer()?;
        for (text, sequence) in TEXTS.iter().zip(&self.sequences) {
            if !tokenizer.encode_prompt(text)?.starts_with(&sequence.tokens) {
                bail!("the written model's tokenizer gives other token ids than that of {}", self.source.model);
            }
        }
        Ok(agreement(&self.logits(checkpoint, adapter)?, &self.wanted, checkpoint.config().vocab))
    }

    /// What the adapter itself changes.
    pub fn effect(&self) -> Result<Agreement> {
        self.compare(&self.source.checkpoint, None)
    }

    fn logits(&self, checkpoint: &Checkpoint, adapter: Option<&Adapter>) -> Result<Vec<Vec<f32>>> {
        let options = CpuOptions { threads: self.source.threads, precision: Precision::F32, ..CpuOptions::default() };
        let model = Model::load(Cpu::new(options)?, checkpoint)?;
        let mut evaluator = Evaluator::new(&model, adapter, TOKENS)?;
        Ok(self.sequences.iter().map(|sequence| evaluator.logits(sequence)).collect::<Result<_, _>>()?)
    }
}

impl Agreement {
    /// Fails if they differ by more than rounding to the written format may move them.
    pub fn require(&self, formats: &[Format]) -> Result<()> {
        let names = formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ");
        let Limits { difference, mean_kl } = limits(formats);
        // Not a number is not a small difference either.
        if self.difference.is_nan() || self.difference > difference {
            bail!(
                "not kept, as its logits differ from those of the model with its adapter by {:.1e} of the largest logit: expected at \
                 most {difference:.0e} in {names}",
                self.difference
            );
        }
        if self.mean_kl.is_nan() || self.mean_kl > mean_kl {
            bail!(
                "not kept, as its probabilities differ from those of the model with its adapter by a mean KL of {:.1e}: expected at \
                 most {mean_kl:.0e} in {names}",
                self.mean_kl
            );
        }
        Ok(())
    }
}

/// What rounding to a format may do.
pub struct Limits {
    /// To a logit, as a share of the largest.
    pub difference: f64,
    /// To the probabilities: the mean KL, in nats.
    pub mean_kl: f64,
}

/// The limits of the coarsest format.
pub fn limits(formats: &[Format]) -> Limits {
    let of = |format: &Format| match format {
        Format::F32 => (1e-4, 1e-5),
        Format::F16 => (5e-3, 1e-3),
        Format::Bf16 => (4e-2, 1e-2),
        Format::Q8_0 => (0.2, 0.05),
        // Small models lose much in four bits; what is wrong loses all.
        _ => (f64::INFINITY, 1.0),
    };
    let largest = |pick: fn((f64, f64)) -> f64| formats.iter().map(|format| pick(of(format))).fold(0.0, f64::max);
    Limits { difference: largest(|(difference, _)| difference), mean_kl: largest(|(_, kl)| kl) }
}

fn agreement(got: &[Vec<f32>], want: &[Vec<f32>], vocab: usize) -> Agreement {
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0, |max: f64, x| if x.is_nan() || max.is_nan() { f64::NAN } else { max.max(x) })
    };
    let pairs = || got.iter().flatten().zip(want.iter().flatten());
    let difference = largest(&mut pairs().map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs()));
    let scale = largest(&mut pairs().map(|(_, &b)| f64::from(b).abs()));
    let rows = || got.iter().flat_map(|rows| rows.chunks(vocab)).zip(want.iter().flat_map(|rows| rows.chunks(vocab)));
    let divergences: Vec<f64> = rows().map(|(got, want)| divergence(want, got)).collect();
    Agreement {
        difference: difference / scale,
        mean_kl: divergences.iter().sum::<f64>() / divergences.len() as f64,
        largest_kl: largest(&mut divergences.iter().copied()),
        tokens: divergences.len(),
    }
}

/// KL(softmax(p) || softmax(q)), in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln()
    };
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (log_p, log_q) = (f64::from(p) - of_p, f64::from(q) - of_q);
        log_p.exp() * (log_p - log_q)
    };
    // Rounding may leave a little less than none.
    p.iter().zip(q).map(term).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_is_that_of_the_probabilities() {
        assert_eq!(divergence(&[1.0, 2.0, 3.0], &[2.0, 3.0, 4.0]), 0.0);
        // KL((1/2, 1/2) || (3/4, 1/4)) = ln 2 / 2 + ln(2/3) / 2
        let want = 0.5 * (2.0f64.ln() + (2.0f64 / 3.0).ln());
        assert!((divergence(&[0.0, 0.0], &[3.0f32.ln(), 0.0]) - want).abs() < 1e-6);
        assert!(agreement(&[vec![f32::NAN, 1.0]], &[vec![1.0, 1.0]], 2).difference.is_nan());
    }
}
