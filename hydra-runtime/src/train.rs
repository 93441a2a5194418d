//! Training: the mean negative log-likelihood of a step's targets, its gradient in the adapter, and AdamW.

mod state;

pub use state::STATE_FILE;

use crate::adapter::device::{DeviceAdapter, Training};
use crate::adapter::{Adapter, AdapterConfig};
pub use crate::backend::AdamW;
use crate::backend::{AdamWStep, Backend};
use crate::batch::{self, Packed, Sequence};
use crate::config::Config;
pub use crate::model::activations::ActivationCheckpointing;
use crate::model::activations::{Activations, Plan, Purpose};
use crate::model::{Cached, Model, Pass};
use crate::{Error, Result};
use hydra_kernels::random::mix;

/// What stays the same through a run.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// Memory against time.
    pub checkpointing: ActivationCheckpointing,
    /// The most tokens in one pass over the model; a step with more takes several, and no sequence may be longer.
    pub max_tokens: usize,
    /// Gradients are scaled down to this norm where theirs is larger.
    pub clip: Option<f32>,
    /// The optimiser's constants.
    pub adam: AdamW,
    /// Seeds the dropout masks.
    pub seed: u64,
}

impl TrainOptions {
    fn check(&self) -> Result<()> {
        if self.max_tokens == 0 {
            return Err(Error::Invalid("training with max_tokens 0".into()));
        }
        if let Some(clip) = self.clip.filter(|clip| clip.is_nan() || *clip <= 0.0) {
            return Err(Error::Invalid(format!("clipping to a norm of {clip}: wanted a positive number, or none")));
        }
        Ok(())
    }
}

/// Learning rates of one step; from a number, that for all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of A and B.
    pub lr: f32,
    /// Of the routers' rows.
    pub router: f32,
}

impl From<f32> for Rates {
    fn from(lr: f32) -> Self {
        Self { lr, router: lr }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean negative log-likelihood over the step's targets, before the update; without the load-balance term.
    pub loss: f64,
    /// Norm of the gradient, that of the load-balance term included, before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Targets among them.
    pub targets: usize,
}

/// Trains one adapter on one model.
pub struct Trainer<'m, 'w, B: Backend> {
    model: &'m Model<'w, B>,
    adapted: DeviceAdapter<B>,
    options: TrainOptions,
    activations: Activations<B>,
    rope: B::Buffer,
    grads: B::Buffer,
    exp_avg: B::Buffer,
    exp_avg_sq: B::Buffer,
    /// The three before the latest update.
    before: [B::Buffer; 3],
    /// Whether `before` is the step before this one.
    can_undo: bool,
    steps: u64,
}

impl<'m, 'w, B: Backend> Trainer<'m, 'w, B> {
    /// Bytes that a trainer takes beside the weights, `u64::MAX` at most: known before anything is allocated. Fails as [`Trainer::new`] would for an
    /// adapter of this configuration, but for memory.
    pub fn plan_bytes(backend: &B, config: &Config, adapter: &AdapterConfig, options: &TrainOptions) -> Result<u64> {
        options.check()?;
        let purpose = Purpose::Training(options.checkpointing);
        let activations = Plan::new(config, Some(adapter), options.max_tokens, purpose)?;
        let rope = options.max_tokens * config.head_dim;
        // Parameters, gradients and two moments, and what an update can be undone with.
        let adapter = adapter.parameters(config).saturating_mul(4 * 7);
        let workspace = backend.workspace_bytes(options.max_tokens, config);
        let parts = [4 * rope as u64, adapter, workspace];
        Ok(parts.into_iter().fold(activations.bytes(backend), u64::saturating_add))
    }

    /// Allocates all that training takes. Fails if the adapter does not fit the model or memory does not suffice.
    pub fn new(model: &'m Model<'w, B>, adapter: &Adapter, options: TrainOptions) -> Result<Self> {
        options.check()?;
        let (backend, config) = (&model.backend, &model.config);
        let adapted = DeviceAdapter::upload(backend, config, adapter)?;
        let purpose = Purpose::Training(options.checkpointing);
        let activations = Plan::new(config, Some(&adapter.config), options.max_tokens, purpose)?.allocate(backend)?;
        let parameters = || backend.buffer(adapted.slots.len);
        Ok(Self {
            rope: model.rope_table(options.max_tokens)?,
            grads: parameters()?,
            exp_avg: parameters()?,
            exp_avg_sq: parameters()?,
            before: [parameters()?, parameters()?, parameters()?],
            can_undo: false,
            model,
            adapted,
            options,
            activations,
            steps: 0,
        })
    }

    /// One optimiser step at these learning rates. The loss is the mean over all targets of `sequences`, however many passes
    /// they take. If the gradient is not finite, or the step makes the adapter overflow, that is an error and the adapter is as
    /// before. If the loss is not finite, that is an error and the step that led there is undone, if this trainer took it.
    ///
    /// With a load-balance weight C each router adds, for each pass, C · N · Σ f_e P_e over that pass's tokens (see
    /// [`hydra_kernels::gate::Routing`]) times the pass's share of the step's tokens.
    pub fn step(&mut self, sequences: &[Sequence], rates: impl Into<Rates>) -> Result<StepReport> {
        let seed = mix(self.options.seed ^ mix(self.steps));
        let mut report = self.accumulate(sequences, Some(seed))?;
        let (backend, len) = (&self.model.backend, self.adapted.slots.len);
        report.grad_norm = backend.sum_of_squares(&self.grads, len)?.sqrt();
        let step = self.steps + 1;
        let finite = |what, value: f64| {
            if value.is_finite() { Ok(()) } else { Err(Error::NotFinite { what, value, step }) }
        };
        finite("loss", report.loss).inspect_err(|_| self.undo())?;
        finite("gradient norm", report.grad_norm)?;
        let scale = match self.options.clip {
            // PyTorch's clip_grad_norm_.
            Some(clip) => (f64::from(clip) / (report.grad_norm + 1e-6)).min(1.0) as f32,
            None => 1.0,
        };
        self.can_undo = false;
        let [params, exp_avg, exp_avg_sq] = &mut self.before;
        backend.copy(params, 0, &self.adapted.params, len)?;
        backend.copy(exp_avg, 0, &self.exp_avg, len)?;
        backend.copy(exp_avg_sq, 0, &self.exp_avg_sq, len)?;
        self.can_undo = true;
        self.steps = step;
        let rates = rates.into();
        backend.adamw(AdamWStep {
            params: &mut self.adapted.params,
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
            grads: &self.grads,
            rates: &self.adapted.slots.rates(rates.lr, rates.router),
            adam: self.options.adam,
            step: self.steps,
            grad_scale: scale,
        })?;
        let value = backend.sum_of_squares(&self.adapted.params, len)?;
        finite("sum of the adapter's squares", value).inspect_err(|_| self.undo())?;
        Ok(report)
    }

    /// Goes back to before the latest update, if this trainer has made one since it began, loaded a state or went back.
    pub fn undo(&mut self) {
        if core::mem::take(&mut self.can_undo) {
            let [params, exp_avg, exp_avg_sq] = &mut self.before;
            core::mem::swap(params, &mut self.adapted.params);
            core::mem::swap(exp_avg, &mut self.exp_avg);
            core::mem::swap(exp_avg_sq, &mut self.exp_avg_sq);
            self.steps -= 1;
        }
    }

    /// Loss and gradients of `sequences` without an update, dropout and load-balance term; gradients come in the adapter's shape.
    /// With [`Trainer::set_adapter`], for optimisers of one's own.
    pub fn gradients(&mut self, sequences: &[Sequence]) -> Result<(StepReport, Adapter)> {
        let mut report = self.accumulate(sequences, None)?;
        let backend = &self.model.backend;
        report.grad_norm = backend.sum_of_squares(&self.grads, self.adapted.slots.len)?.sqrt();
        Ok((report, self.adapted.download(backend, &self.grads)?))
    }

    fn accumulate(&mut self, sequences: &[Sequence], seed: Option<u64>) -> Result<StepReport> {
        self.adapted.check_lora_heads(sequences)?;
        let config = &self.model.config;
        let lengths: Vec<usize> = sequences.iter().map(|s| s.tokens.len()).collect();
        let groups = batch::groups(&lengths, self.options.max_tokens)?;
        let packs = groups.into_iter().map(|group| Packed::new(&sequences[group], 0, config.vocab));
        let packs = packs.collect::<Result<Vec<_>>>()?;
        let targets: usize = packs.iter().map(|packed| packed.targets.len()).sum();
        if targets == 0 {
            return Err(Error::Invalid("a step without a single target".into()));
        }
        self.model.backend.zero(&mut self.grads, self.adapted.slots.len)?;
        let tokens: usize = lengths.iter().sum();
        let (mut nll, mut sum) = (Vec::new(), 0.0);
        for (i, packed) in packs.iter().enumerate() {
            let pass = Pass {
                model: self.model,
                adapted: Some(&self.adapted),
                packed,
                rope: &self.rope,
                training: seed.map(|seed| Training {
                    seed: mix(seed ^ mix(i as u64)),
                    share: (packed.len() as f64 / tokens as f64) as f32,
                }),
            };
            nll.resize(packed.targets.len(), 0.0);
            pass.forward(&mut self.activations, Cached::No)?;
            pass.gradient(&mut self.activations, &mut nll, &mut self.grads, 1.0 / targets as f32)?;
            sum += nll.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
        Ok(StepReport { loss: sum / targets as f64, grad_norm: 0.0, tokens, targets })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> Result<Adapter> {
        self.adapted.download(&self.model.backend, &self.adapted.params)
    }

    /// Goes on from other parameters, of an adapter of the same configuration. AdamW's moments and the number of steps stay.
    pub fn set_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        if adapter.config != self.adapted.config {
            return Err(Error::Invalid("an adapter of another configuration than the trainer's".into()));
        }
        self.can_undo = false;
        self.adapted.set(&self.model.backend, &self.model.config, adapter)
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

#[cfg(test)]
mod tests;
