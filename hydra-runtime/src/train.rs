//! Training: the mean negative log-likelihood of a step's targets, its gradient in the adapter, and AdamW.

mod state;
mod sum;

pub use state::{STATE_FILE, saved_run};

use crate::adapter::device::DeviceAdapter;
use crate::adapter::{Adapter, AdapterConfig};
pub use crate::backend::AdamW;
use crate::backend::{AdamWStep, Backend, Device, Workload};
use crate::batch::{self, Packed, Sequence};
use crate::communicator::{Alone, Communicator};
use crate::config::Config;
use crate::evaluate::Evaluator;
use crate::model::Model;
pub use crate::model::activations::ActivationCheckpointing;
use crate::model::activations::{Activations, Plan, Purpose};
pub use crate::progress::Progress;
use crate::progress::Watch;
use crate::{Error, Result};
use hydra_kernels::random::mix;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use sum::Passes;

/// What stays the same through a run.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// Memory against time.
    pub checkpointing: ActivationCheckpointing,
    /// The most tokens in one pass over the model. A step with more takes several passes; no sequence may be longer.
    pub max_tokens: usize,
    /// Gradients are scaled down to this global norm if theirs is larger.
    pub clip: Option<f32>,
    /// The optimiser's constants.
    pub adam: AdamW,
    /// Seeds the dropout masks.
    pub seed: u64,
}

impl Default for TrainOptions {
    /// No activation checkpointing, passes of up to 2,048 tokens, gradients clipped to norm 1, seed 0.
    fn default() -> Self {
        Self {
            checkpointing: ActivationCheckpointing::Off,
            max_tokens: 2048,
            clip: Some(1.0),
            adam: AdamW::default(),
            seed: 0,
        }
    }
}

impl TrainOptions {
    fn check(&self) -> Result<()> {
        if self.max_tokens == 0 {
            return Err(Error::Invalid("training with max_tokens 0".into()));
        }
        if let Some(clip) = self.clip.filter(|clip| clip.is_nan() || *clip <= 0.0) {
            return Err(Error::Invalid(format!("clipping to norm {clip}: expected a number above 0, or none")));
        }
        Ok(())
    }
}

/// Learning rates of one step. From a number: that rate for all parameters.
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

/// Trains one adapter on one model. It owns all that it needs: it may move to another thread, or into any struct.
pub struct Trainer<B: Backend = Device> {
    model: Model<B>,
    adapter: DeviceAdapter<B>,
    options: TrainOptions,
    activations: Activations<B>,
    rope: B::Buffer,
    /// The gradient, and the parts of its sum.
    sums: Vec<B::Buffer>,
    exp_avg: B::Buffer,
    exp_avg_sq: B::Buffer,
    /// Parameters and moments before the latest update.
    previous: [B::Buffer; 3],
    /// Whether `previous` is the step before this one.
    can_undo: bool,
    steps: u64,
    /// What the program calls the run.
    run: Option<String>,
    ranks: Arc<dyn Communicator>,
    /// What is sent to other ranks, or comes from them.
    message: Vec<f32>,
    watch: Watch,
}

impl<B: Backend> Trainer<B> {
    /// Bytes that a trainer takes beside the weights, `u64::MAX` at most: known before anything is allocated. Fails as
    /// [`Trainer::new`] would for an adapter of this configuration, but for memory. Steps of several passes take
    /// [`Trainer::sum_bytes`] more.
    pub fn plan_bytes(backend: &B, config: &Config, adapter: &AdapterConfig, options: &TrainOptions) -> Result<u64> {
        options.check()?;
        backend.trains()?;
        let purpose = Purpose::Training(options.checkpointing);
        let activations = Plan::new(config, Some(adapter), options.max_tokens, purpose)?;
        let rope = options.max_tokens * config.head_dim;
        let (tokens, adapters) = (options.max_tokens, &adapter.shapes(config));
        let workspace = backend.workspace_bytes(&[Workload { config, tokens, adapters, training: true }]);
        // Parameters, gradients and two moments, and what an update can be undone with.
        let adapter = adapter.parameters(config).saturating_mul(4 * 7);
        let parts = [4 * rope as u64, adapter, workspace];
        Ok(parts.into_iter().fold(activations.bytes(backend), u64::saturating_add))
    }

    /// Bytes that a step of this many passes takes, on any number of ranks, more than one of a single pass does: ⌊log₂
    /// passes⌋ gradients.
    pub fn sum_bytes(config: &Config, adapter: &AdapterConfig, passes: usize) -> u64 {
        adapter.parameters(config).saturating_mul(4 * sum::buffers(passes) as u64)
    }

    /// Bytes that an [`Evaluator`] of the same adapter takes beside the trainer, for passes of up to `tokens` tokens: they share
    /// what the backend keeps for itself.
    pub fn evaluator_bytes(
        backend: &B,
        config: &Config,
        adapter: &AdapterConfig,
        options: &TrainOptions,
        tokens: usize,
    ) -> Result<u64> {
        let adapters = &adapter.shapes(config);
        let training = Workload { config, tokens: options.max_tokens, adapters, training: true };
        let evaluation = Workload { config, tokens, adapters, training: false };
        let more = backend.workspace_bytes(&[training, evaluation]) - backend.workspace_bytes(&[training]);
        Ok(more.saturating_add(Evaluator::own_bytes(backend, config, Some(adapter), tokens)?))
    }

    /// Allocates all that training takes, for steps of one pass. Fails if the adapter does not fit the model or memory
    /// does not suffice.
    pub fn new(model: &Model<B>, adapter: &Adapter, options: TrainOptions) -> Result<Self> {
        options.check()?;
        let (backend, config) = (model.backend(), model.config());
        backend.trains()?;
        let purpose = Purpose::Training(options.checkpointing);
        let plan = Plan::new(config, Some(&adapter.config), options.max_tokens, purpose)?;
        let adapter = DeviceAdapter::upload(backend, config, adapter)?;
        let parameters = || backend.buffer(adapter.slots.len);
        Ok(Self {
            activations: plan.allocate(backend)?,
            rope: model.0.rope_table(options.max_tokens)?,
            sums: vec![parameters()?],
            exp_avg: parameters()?,
            exp_avg_sq: parameters()?,
            previous: [parameters()?, parameters()?, parameters()?],
            can_undo: false,
            model: model.clone(),
            adapter,
            options,
            steps: 0,
            run: None,
            ranks: Arc::new(Alone),
            message: Vec::new(),
            watch: Watch::default(),
        })
    }

    /// Allocates what steps of this many passes take, which the first such step would do otherwise.
    pub fn with_passes(mut self, passes: usize) -> Result<Self> {
        self.reserve_sums(passes)?;
        Ok(self)
    }

    /// Puts a text into the states that are saved, from which the program knows the run: [`saved_run`] reads it.
    pub fn with_run(mut self, run: impl Into<String>) -> Self {
        self.run = Some(run.into());
        self
    }

    /// Trains on several ranks, which share each step's passes. All must have the same model, adapter and options,
    /// begin in the same state, and make the same calls with the same sequences; each then has the same results, with
    /// the bits that a single rank gives. (Where the ranks' CPUs differ in their instruction sets, a result may depend
    /// on which rank computes which pass.)
    ///
    /// [`Error::NotFinite`] and errors of the arguments are the same on every rank. Any other error,
    /// [`Error::Cancelled`] among them, may be this rank's own, and the others wait for it: see [`Communicator`].
    pub fn with_ranks(mut self, ranks: Arc<dyn Communicator>) -> Self {
        self.ranks = ranks;
        self
    }

    /// Ends a step with [`Error::Cancelled`], and without an update, soon after `flag` is set.
    pub fn with_cancel(mut self, flag: Arc<AtomicBool>) -> Self {
        self.watch.cancel = Some(flag);
        self
    }

    /// Calls `report` after each of this rank's passes over the model.
    pub fn with_progress(mut self, report: impl FnMut(Progress) + Send + Sync + 'static) -> Self {
        self.watch.progress = Some(Box::new(report));
        self
    }

    /// One optimiser step at these learning rates. The loss is the mean over all targets of `sequences`, however many
    /// passes they take.
    ///
    /// With a load-balance coefficient C each router adds, for each pass that has a target, C · N · Σ f_e P_e over that pass's tokens
    /// (see [`hydra_kernels::gate::Routing`]) times the pass's share of the step's tokens.
    ///
    /// # Errors
    /// Among others [`Error::NoTarget`], [`Error::SequenceTooLong`], [`Error::LearningRate`] and [`Error::Cancelled`]; the adapter
    /// is then as before. [`Error::NotFinite`] if the gradient is not finite or the step makes the adapter overflow: the adapter is
    /// as before; or if the loss is not finite: the step that led there is undone, if this trainer took it.
    pub fn step(&mut self, sequences: &[Sequence], rates: impl Into<Rates>) -> Result<StepReport> {
        let rates = rates.into();
        let wrong = |rate: &f32| !(rate.is_finite() && *rate >= 0.0);
        if let Some(rate) = [rates.lr, rates.router].into_iter().find(wrong) {
            return Err(Error::LearningRate(rate));
        }
        let _bound = self.model.backend().bind_caller();
        let seed = mix(self.options.seed ^ mix(self.steps));
        let mut report = self.accumulate(sequences, Some(seed))?;
        report.grad_norm = self.grad_norm()?;
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
        self.update(rates, scale)?;
        let value = self.model.backend().sum_of_squares(&self.adapter.params, self.adapter.slots.len)?;
        finite("sum of the adapter's squares", value).inspect_err(|_| self.undo())?;
        Ok(report)
    }

    fn grad_norm(&self) -> Result<f64> {
        Ok(self.model.backend().sum_of_squares(&self.sums[0], self.adapter.slots.len)?.sqrt())
    }

    /// AdamW on gradients times `scale`; the state before it is kept.
    fn update(&mut self, rates: Rates, scale: f32) -> Result<()> {
        let (backend, len) = (self.model.backend(), self.adapter.slots.len);
        self.can_undo = false;
        let [params, exp_avg, exp_avg_sq] = &mut self.previous;
        backend.copy(params, 0, &self.adapter.params, len)?;
        backend.copy(exp_avg, 0, &self.exp_avg, len)?;
        backend.copy(exp_avg_sq, 0, &self.exp_avg_sq, len)?;
        self.can_undo = true;
        self.steps += 1;
        backend.adamw(AdamWStep {
            params: &mut self.adapter.params,
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
            grads: &self.sums[0],
            rates: &self.adapter.slots.rates(rates.lr, rates.router),
            adam: self.options.adam,
            step: self.steps,
            grad_scale: scale,
        })
    }

    /// Goes back to before the latest update, if this trainer has made one since it began, loaded a state or went back.
    pub fn undo(&mut self) {
        if core::mem::take(&mut self.can_undo) {
            let [params, exp_avg, exp_avg_sq] = &mut self.previous;
            core::mem::swap(params, &mut self.adapter.params);
            core::mem::swap(exp_avg, &mut self.exp_avg);
            core::mem::swap(exp_avg_sq, &mut self.exp_avg_sq);
            self.steps -= 1;
        }
    }

    /// Loss and gradients of `sequences` without an update, dropout and load-balance term; gradients come in the
    /// adapter's shape. With [`Trainer::set_adapter`], for optimisers of one's own.
    pub fn gradients(&mut self, sequences: &[Sequence]) -> Result<(StepReport, Adapter)> {
        let mut report = self.accumulate(sequences, None)?;
        report.grad_norm = self.grad_norm()?;
        Ok((report, self.adapter.download(self.model.backend(), &self.sums[0])?))
    }

    /// Loss and gradients; `seed` is that of a training step's dropout masks.
    fn accumulate(&mut self, sequences: &[Sequence], seed: Option<u64>) -> Result<StepReport> {
        self.adapter.check_lora_heads(sequences)?;
        let lengths: Vec<usize> = sequences.iter().map(|s| s.tokens.len()).collect();
        let groups = batch::groups(&lengths, self.options.max_tokens)?;
        let packs = groups.into_iter().map(|group| Packed::new(&sequences[group], 0, self.model.config().vocab));
        let packs = packs.collect::<Result<Vec<_>>>()?;
        let targets: usize = packs.iter().map(|packed| packed.targets.len()).sum();
        if targets == 0 {
            return Err(Error::NoTarget);
        }
        let tokens = lengths.iter().sum();
        let sum = self.sum_gradients(&Passes { packs: &packs, tokens, targets, seed })?;
        Ok(StepReport { loss: sum / targets as f64, grad_norm: 0.0, tokens, targets })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> Result<Adapter> {
        self.adapter.download(self.model.backend(), &self.adapter.params)
    }

    /// Goes on from other parameters, of an adapter of the same configuration. AdamW's moments and the number of steps
    /// stay.
    pub fn set_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        if adapter.config != self.adapter.config {
            return Err(Error::WrongAdapter("an adapter of another configuration than the trainer's".into()));
        }
        self.can_undo = false;
        self.adapter.set(self.model.backend(), self.model.config(), adapter)
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The model that the adapter is trained on.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }
}

#[cfg(test)]
mod tests;
