//! Training and evaluation.

use crate::adapter::{self, Attached, hydra_adapter};
use crate::arguments::{Out, optional, slice, slice_mut};
use crate::error::{Result, door, hydra_status, invalid};
use crate::handle::{self, Object, Table, exclusive};
use crate::model::hydra_model;
use hydra_runtime::batch::Sequence;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::model::Model;
use hydra_runtime::train::{ActivationCheckpointing, AdamW, TrainOptions, Trainer};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// An adapter in training, with its optimiser. 0 is no trainer.
pub type hydra_trainer = u64;

struct Training {
    trainer: Mutex<Trainer>,
    cancel: Arc<AtomicBool>,
}

impl Object for Training {
    const KIND: usize = 4;
    fn table() -> &'static Table<Self> {
        static TABLE: Table<Training> = Table::new();
        &TABLE
    }
}

/// No loss is taken at a position with this target.
pub const HYDRA_NO_TARGET: u32 = u32::MAX;

/// The head of a sequence without a label: under the label gate all heads have the same weight.
pub const HYDRA_NO_LORA_HEAD: u32 = u32::MAX;

/// One example.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_sequence {
    /// `len` token ids.
    pub tokens: *const u32,
    /// What is to be predicted after each of them, or HYDRA_NO_TARGET: `len` ids. If it is null, the tokens after the first
    /// `prompt_len` are to be predicted, each from those before it.
    pub targets: *const u32,
    /// Number of tokens.
    pub len: usize,
    /// Tokens that need not be predicted; not read if there are targets.
    pub prompt_len: usize,
    /// For the label gate, the head of this example's label, or HYDRA_NO_LORA_HEAD.
    pub lora_head: u32,
}

unsafe fn sequences(data: *const hydra_sequence, count: usize) -> Result<Vec<Sequence>> {
    let read = |sequence: &hydra_sequence| {
        let &hydra_sequence { tokens, targets, len, prompt_len, lora_head } = sequence;
        // SAFETY: the caller's word.
        let tokens = unsafe { slice("a sequence's tokens", tokens, len)? };
        let lora_head = (lora_head != HYDRA_NO_LORA_HEAD).then_some(lora_head);
        if !targets.is_null() {
            // SAFETY: the caller's word.
            let targets = unsafe { slice("a sequence's targets", targets, len)? };
            return Ok(Sequence { tokens: tokens.into(), targets: targets.into(), lora_head });
        }
        if prompt_len > len {
            return Err(invalid(format!("prompt_len: expected at most the {len} tokens, found {prompt_len}")));
        }
        let (prompt, answer) = tokens.split_at(prompt_len);
        Ok(Sequence { lora_head, ..Sequence::answer(prompt, answer) })
    };
    // SAFETY: the caller's word.
    unsafe { slice("sequences", data, count)? }.iter().map(read).collect()
}

/// What stays the same through a run.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_train_options {
    /// The most tokens in one pass over the model; no sequence may be longer. Memory grows with it.
    pub max_tokens: usize,
    /// Gradients are clipped to this global norm; 0 for no clipping.
    pub clip: f32,
    /// AdamW's weight decay.
    pub weight_decay: f32,
    /// Seeds the dropout masks.
    pub seed: u64,
    /// Not 0: each layer's activations are computed again in the backward pass, which saves memory and costs time.
    pub checkpoint_activations: i32,
}

/// Passes of 2,048 tokens, gradients clipped to norm 1, no decay, seed 0, activations kept. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_train_options_default() -> hydra_train_options {
    let TrainOptions { max_tokens, clip, adam, seed, .. } = TrainOptions::default();
    let (clip, weight_decay) = (clip.unwrap_or(0.0), adam.weight_decay);
    hydra_train_options { max_tokens, clip, weight_decay, seed, checkpoint_activations: 0 }
}

/// Makes a trainer that starts from the adapter, which itself stays as it is. `options` may be null, for the defaults. Any
/// thread may call it. The caller owns `trainer` and frees it with `hydra_trainer_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_trainer_new(
    model: hydra_model,
    adapter: hydra_adapter,
    options: *const hydra_train_options,
    trainer: *mut hydra_trainer,
) -> hydra_status {
    // SAFETY: the caller's word, for both.
    door(|| unsafe {
        let (model, adapter) = (handle::get::<Model>(model)?, handle::get::<Attached>(adapter)?);
        let (options, out) = (optional("options", options)?, Out::new("trainer", trainer)?);
        let options = options.copied().unwrap_or_else(|| hydra_train_options_default());
        if !(options.weight_decay.is_finite() && options.weight_decay >= 0.0) {
            let found = options.weight_decay;
            return Err(invalid(format!("weight_decay: expected a finite number from 0 on, found {found}")));
        }
        let checkpointing = match options.checkpoint_activations {
            0 => ActivationCheckpointing::Off,
            _ => ActivationCheckpointing::EveryLayer,
        };
        let options = TrainOptions {
            checkpointing,
            max_tokens: options.max_tokens,
            clip: (options.clip != 0.0).then_some(options.clip),
            adam: AdamW { weight_decay: options.weight_decay, ..AdamW::default() },
            seed: options.seed,
        };
        let cancel = Arc::new(AtomicBool::new(false));
        let trainer = Trainer::new(&model, &adapter.adapter, options)?.with_cancel(Arc::clone(&cancel));
        out.set(handle::insert(Training { trainer: Mutex::new(trainer), cancel })?);
        Ok(())
    })
}

/// What one training step did.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_step_report {
    /// Mean negative log-likelihood of the targets, before the update.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Targets among them.
    pub targets: usize,
}

/// One step of AdamW on the mean loss of `count` sequences, with learning rate `lr`. `report` may be null.
///
/// After an error the adapter is as it was before the step. If the loss isn't finite (HYDRA_STATUS_NOT_FINITE), the trainer's
/// last step, which has led there, is taken back too.
///
/// Use a trainer from one thread at a time; a second call at the same time returns HYDRA_STATUS_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_trainer_step(
    trainer: hydra_trainer,
    sequences: *const hydra_sequence,
    count: usize,
    lr: f32,
    report: *mut hydra_step_report,
) -> hydra_status {
    // SAFETY: the caller's word, for both.
    door(|| unsafe {
        let training = handle::get::<Training>(trainer)?;
        let (sequences, out) = (self::sequences(sequences, count)?, Out::optional("report", report)?);
        let step = exclusive("trainer", &training.trainer)?.step(&sequences, lr);
        if matches!(step, Err(hydra_runtime::Error::Cancelled)) {
            training.cancel.store(false, Ordering::Relaxed);
        }
        let hydra_runtime::train::StepReport { loss, grad_norm, tokens, targets } = step?;
        if let Some(out) = out {
            out.set(hydra_step_report { loss, grad_norm, tokens, targets });
        }
        Ok(())
    })
}

/// Ends the step that is under way in another thread, or else the next one, with HYDRA_STATUS_CANCELLED. Any thread may
/// call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_trainer_cancel(trainer: hydra_trainer) -> hydra_status {
    door(|| {
        handle::get::<Training>(trainer)?.cancel.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// Copies the adapter as it is now, attached to the trainer's model. Threads as `hydra_trainer_step`. The caller owns
/// `adapter` and frees it with `hydra_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_trainer_adapter(trainer: hydra_trainer, adapter: *mut hydra_adapter) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (training, out) = (handle::get::<Training>(trainer)?, Out::new("adapter", adapter)?);
        let trainer = exclusive("trainer", &training.trainer)?;
        out.set(adapter::insert(trainer.model(), trainer.adapter()?)?);
        Ok(())
    })
}

/// Frees a trainer. 0 is allowed. Any thread may call it; memory in use by a call is given back when that call ends.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_trainer_free(trainer: hydra_trainer) -> hydra_status {
    door(|| handle::remove::<Training>(trainer))
}

/// A sequence's loss.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_loss {
    /// Negative log-likelihood, summed over the targets, in nats.
    pub nll: f64,
    /// Number of targets.
    pub targets: usize,
}

/// Writes the losses of `count` sequences to `losses`. `adapter` may be 0, for none; `max_tokens` is the most tokens in one
/// pass, and no sequence may be longer. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_evaluate(
    model: hydra_model,
    adapter: hydra_adapter,
    sequences: *const hydra_sequence,
    count: usize,
    max_tokens: usize,
    losses: *mut hydra_loss,
) -> hydra_status {
    // SAFETY: the caller's word, for both.
    door(|| unsafe {
        let (model, adapter) = (handle::get::<Model>(model)?, handle::get_optional::<Attached>(adapter)?);
        let (sequences, out) = (self::sequences(sequences, count)?, slice_mut("losses", losses, count)?);
        let attached = adapter.as_ref().map(|adapter| &adapter.attached);
        let losses = Evaluator::attached(&model, attached, max_tokens)?.losses(&sequences)?;
        for (out, loss) in out.iter_mut().zip(losses) {
            *out = hydra_loss { nll: loss.nll, targets: loss.targets };
        }
        Ok(())
    })
}
