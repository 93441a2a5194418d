//! Training, and losses.

use crate::adapter::PyAdapter;
use crate::error::{Whole, exception, wrong};
use crate::interrupt::interruptible;
use crate::model::{Ids, PyModel, values};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::train::{ActivationCheckpointing, AdamW, TrainOptions, Trainer};
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// One example: tokens, targets (negative: none) or how many tokens begin without any, and a head.
#[derive(FromPyObject)]
pub struct Example<'py>(Ids<'py>, Targets<'py>, Option<Whole<u32>>);

#[derive(FromPyObject)]
enum Targets<'py> {
    Prompt(Whole<usize>),
    Each(numpy::PyReadonlyArray1<'py, i64>),
}

impl Example<'_> {
    fn sequence(&self) -> PyResult<Sequence> {
        let (tokens, lora_head) = (self.0.get()?, self.2.as_ref().map(|head| head.get("head")).transpose()?);
        match &self.1 {
            Targets::Prompt(prompt) => {
                let prompt = prompt.get("a prompt's length")?;
                let Some((prompt, answer)) = tokens.split_at_checked(prompt) else {
                    return Err(wrong(format!("a prompt of {prompt} tokens in a sequence of {}", tokens.len())));
                };
                Ok(Sequence { lora_head, ..Sequence::answer(prompt, answer) })
            }
            Targets::Each(targets) => {
                let target = |&id: &i64| match u32::try_from(id) {
                    Ok(id) => Ok(id),
                    Err(_) if id < 0 => Ok(NO_TARGET),
                    Err(_) => Err(wrong(format!("target {id}: expected a token id, or a negative number for none"))),
                };
                let targets = values(targets)?.iter().map(target).collect::<PyResult<_>>()?;
                Ok(Sequence { tokens, targets, lora_head })
            }
        }
    }
}

fn sequences(examples: &[Example<'_>]) -> PyResult<Vec<Sequence>> {
    examples.iter().map(Example::sequence).collect()
}

#[pyclass(name = "Trainer", module = "hydra._hydra", subclass)]
pub struct PyTrainer {
    trainer: Trainer,
    cancel: Arc<AtomicBool>,
}

/// What `Trainer` is given, as a dictionary.
#[derive(FromPyObject)]
pub struct Settings {
    #[pyo3(item)]
    max_tokens: Whole<usize>,
    #[pyo3(item)]
    clip: Option<f32>,
    #[pyo3(item)]
    weight_decay: f32,
    #[pyo3(item)]
    seed: Whole<u64>,
    #[pyo3(item)]
    checkpoint_activations: bool,
}

#[pymethods]
impl PyTrainer {
    #[new]
    fn new(
        py: Python<'_>,
        model: PyRef<'_, PyModel>,
        adapter: PyRef<'_, PyAdapter>,
        settings: Settings,
    ) -> PyResult<Self> {
        let Settings { max_tokens, clip, weight_decay, seed, checkpoint_activations } = settings;
        if !(weight_decay.is_finite() && weight_decay >= 0.0) {
            return Err(wrong(format!("weight_decay: expected a finite number from 0 on, found {weight_decay}")));
        }
        let checkpointing =
            if checkpoint_activations { ActivationCheckpointing::EveryLayer } else { ActivationCheckpointing::Off };
        let adam = AdamW { weight_decay, ..AdamW::default() };
        let (max_tokens, seed) = (max_tokens.get("max_tokens")?, seed.get("seed")?);
        let options = TrainOptions { checkpointing, max_tokens, clip, adam, seed };
        let (model, adapter, cancel) = (&model.0, &adapter.adapter, Arc::new(AtomicBool::new(false)));
        let trainer = py.detach(|| Trainer::new(model, adapter, options)).map_err(exception)?;
        Ok(Self { trainer: trainer.with_cancel(Arc::clone(&cancel)), cancel })
    }

    /// Loss, gradient norm, tokens, targets.
    #[pyo3(signature = (examples, lr, router_lr = None))]
    fn step(
        &mut self,
        py: Python<'_>,
        examples: Vec<Example<'_>>,
        lr: f32,
        router_lr: Option<f32>,
    ) -> PyResult<(f64, f64, usize, usize)> {
        let (sequences, Self { trainer, cancel }) = (sequences(&examples)?, self);
        let rates = hydra_runtime::train::Rates { lr, router: router_lr.unwrap_or(lr) };
        let report = interruptible(py, cancel, || trainer.step(&sequences, rates))?;
        Ok((report.loss, report.grad_norm, report.tokens, report.targets))
    }

    fn adapter(&self, py: Python<'_>) -> PyResult<PyAdapter> {
        py.detach(|| self.trainer.adapter()).map(PyAdapter::new).map_err(exception)
    }

    #[getter]
    fn steps(&self) -> u64 {
        self.trainer.steps()
    }
}

/// Each example's negative log-likelihood, and its number of targets.
type Losses<'py> = (Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<u64>>);

#[pyfunction]
pub fn losses<'py>(
    py: Python<'py>,
    model: PyRef<'_, PyModel>,
    examples: Vec<Example<'_>>,
    adapter: Option<PyRef<'_, PyAdapter>>,
    max_tokens: Whole<usize>,
) -> PyResult<Losses<'py>> {
    let (sequences, max_tokens) = (sequences(&examples)?, max_tokens.get("max_tokens")?);
    let cancel = Arc::new(AtomicBool::new(false));
    let (attached, model) = (model.attached(adapter.as_deref())?, &model.0);
    let losses = interruptible(py, &cancel, || {
        let evaluator = Evaluator::attached(model, attached.as_ref(), max_tokens)?;
        evaluator.with_cancel(Arc::clone(&cancel)).losses(&sequences)
    })?;
    let (nll, targets): (Vec<_>, Vec<_>) = losses.iter().map(|loss| (loss.nll, loss.targets as u64)).unzip();
    Ok((nll.into_pyarray(py), targets.into_pyarray(py)))
}
