//! Models: their texts and their logits.

use crate::adapter::PyAdapter;
use crate::error::{Whole, exception, wrong};
use crate::interrupt::interruptible;
use hydra_runtime::backend::Device;
use hydra_runtime::backend::cpu::{CpuOptions, Precision};
use hydra_runtime::batch::Sequence;
use hydra_runtime::chat::Message;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::{Generate, Generated, Prompt, Sampling};
use hydra_runtime::model::{AttachedAdapter, Model};
use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// `hydra.Model` is a subclass, in Python.
#[pyclass(name = "Model", module = "hydra._hydra", frozen, subclass)]
pub struct PyModel(pub Model);

/// Where a model's files are.
#[derive(FromPyObject)]
enum Files {
    Path(PathBuf),
    Gguf(Vec<u8>),
    Folder(HashMap<String, Vec<u8>>),
}

/// Token ids as Python has them.
#[derive(FromPyObject)]
pub enum Ids<'py> {
    Array(PyReadonlyArray1<'py, u32>),
    Wide(PyReadonlyArray1<'py, i64>),
    List(Vec<Whole<u32>>),
}

/// An array's values. NumPy first copies those that do not lie at addresses of their type.
pub fn values<T: Element + Copy>(array: &PyReadonlyArray1<'_, T>) -> PyResult<Vec<T>> {
    if array.is_aligned() {
        return Ok(array.as_array().to_vec());
    }
    let copy: PyReadonlyArray1<'_, T> = array.call_method0("copy")?.extract()?;
    Ok(copy.as_array().to_vec())
}

impl Ids<'_> {
    pub fn get(&self) -> PyResult<Vec<u32>> {
        let narrow =
            |&id: &i64| u32::try_from(id).map_err(|_| wrong(format!("token id {id}: expected 0 to 4294967295")));
        match self {
            Self::Array(ids) => values(ids),
            Self::Wide(ids) => values(ids)?.iter().map(narrow).collect(),
            Self::List(ids) => ids.iter().map(|id| id.get("token id")).collect(),
        }
    }
}

/// A text, token ids, or the turns of a conversation.
#[derive(FromPyObject)]
enum Asked<'py> {
    Text(String),
    Ids(Ids<'py>),
    Turns(Vec<HashMap<String, String>>),
}

impl Asked<'_> {
    fn prompt(self) -> PyResult<Prompt> {
        let message = |mut turn: HashMap<String, String>| match (turn.remove("role"), turn.remove("content")) {
            (Some(role), Some(content)) => Ok(Message { role, content }),
            _ => Err(wrong("a message: expected {\"role\": .., \"content\": ..}".into())),
        };
        Ok(match self {
            Self::Text(text) => Prompt::Text(text),
            Self::Ids(ids) => Prompt::Tokens(ids.get()?),
            Self::Turns(turns) => Prompt::Chat(turns.into_iter().map(message).collect::<PyResult<_>>()?),
        })
    }
}

/// How to generate: a dictionary of what `Model.generate` and `Model.stream` are given.
#[derive(FromPyObject)]
struct Options<'py> {
    #[pyo3(item)]
    adapter: Option<PyRef<'py, PyAdapter>>,
    #[pyo3(item)]
    max_tokens: usize,
    #[pyo3(item)]
    temperature: f32,
    #[pyo3(item)]
    top_k: usize,
    #[pyo3(item)]
    top_p: f32,
    #[pyo3(item)]
    min_p: f32,
    #[pyo3(item)]
    repetition_penalty: f32,
    #[pyo3(item)]
    presence_penalty: f32,
    #[pyo3(item)]
    frequency_penalty: f32,
    #[pyo3(item)]
    seed: u64,
    #[pyo3(item)]
    stop: Vec<String>,
}

impl PyModel {
    /// The adapter on this model's device.
    pub fn attached(&self, adapter: Option<&PyAdapter>) -> PyResult<Option<AttachedAdapter>> {
        adapter.map(|adapter| adapter.attached(&self.0)).transpose()
    }

    fn request(&self, prompt: Asked<'_>, options: &Options<'_>) -> PyResult<(Generate, Arc<AtomicBool>)> {
        let cancel = Arc::new(AtomicBool::new(false));
        let sampling = Sampling {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            repetition_penalty: options.repetition_penalty,
            presence_penalty: options.presence_penalty,
            frequency_penalty: options.frequency_penalty,
            seed: options.seed,
        };
        let mut generate = self.0.generate(prompt.prompt()?).cancel(Arc::clone(&cancel));
        generate = generate.max_tokens(options.max_tokens).sampling(sampling);
        if let Some(adapter) = self.attached(options.adapter.as_deref())? {
            generate = generate.adapter(&adapter);
        }
        Ok((options.stop.iter().fold(generate, Generate::stop), cancel))
    }
}

fn device(name: &str, options: CpuOptions) -> PyResult<Device> {
    if name == "cpu" {
        return Device::cpu(options).map_err(exception);
    }
    let ordinal = if name == "cuda" { Some(0) } else { name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) };
    gpu(ordinal.ok_or_else(|| wrong(format!("device {name:?}: expected \"cpu\" or \"cuda:N\"")))?)
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: u32) -> PyResult<Device> {
    Device::cuda(ordinal).map_err(exception)
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: u32) -> PyResult<Device> {
    let how = "pip install --config-settings=build-args=\"--features cuda\" hydra-runtime/python";
    Err(wrong(format!("device \"cuda:{ordinal}\": this package was built without CUDA; {how}")))
}

#[pymethods]
impl PyModel {
    #[new]
    #[pyo3(signature = (files, *, device = "cpu", threads = None, precision = "f32"))]
    fn new(
        py: Python<'_>,
        files: Files,
        device: &str,
        threads: Option<Whole<usize>>,
        precision: &str,
    ) -> PyResult<Self> {
        let precision = Precision::parse(precision)
            .ok_or_else(|| wrong(format!("precision {precision:?}: expected \"f32\", \"bf16\" or \"q8\"")))?;
        let threads = threads.map(|threads| threads.get("threads")).transpose()?;
        let device = self::device(device, CpuOptions { threads, precision, ..CpuOptions::default() })?;
        let load = || {
            let checkpoint = match files {
                Files::Path(path) => Checkpoint::open(path)?,
                Files::Gguf(bytes) => Checkpoint::from_gguf(bytes)?,
                Files::Folder(files) => Checkpoint::from_files(files)?,
            };
            Model::load(device, &checkpoint)
        };
        Ok(Self(py.detach(load).map_err(exception)?))
    }

    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (config, dict) = (self.0.config(), PyDict::new(py));
        let sizes = [
            ("vocab", config.vocab),
            ("d_model", config.d_model),
            ("d_ffn", config.d_ffn),
            ("layers", config.layers),
            ("n_heads", config.n_heads),
            ("kv_heads", config.kv_heads),
            ("head_dim", config.head_dim),
            ("context", config.context),
        ];
        sizes.into_iter().try_for_each(|(name, size)| dict.set_item(name, size))?;
        dict.set_item("eos", config.eos.clone())?;
        Ok(dict)
    }

    #[getter]
    fn eos(&self) -> PyResult<Option<u32>> {
        Ok(self.0.tokenizer().map_err(exception)?.eos())
    }

    #[pyo3(signature = (text, *, begins = false))]
    fn encode<'py>(&self, py: Python<'py>, text: &str, begins: bool) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let tokenizer = self.0.tokenizer().map_err(exception)?;
        let ids = if begins { tokenizer.encode_prompt(text) } else { tokenizer.encode(text) };
        Ok(ids.map_err(exception)?.into_pyarray(py))
    }

    fn decode(&self, tokens: Ids<'_>) -> PyResult<String> {
        let tokens = tokens.get()?;
        self.0.tokenizer().and_then(|tokenizer| tokenizer.decode(&tokens)).map_err(exception)
    }

    #[pyo3(signature = (tokens, *, adapter = None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        tokens: Ids<'_>,
        adapter: Option<PyRef<'_, PyAdapter>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (tokens, cancel) = (tokens.get()?, Arc::new(AtomicBool::new(false)));
        let attached = self.attached(adapter.as_deref())?;
        let work = || {
            let evaluator = Evaluator::attached(&self.0, attached.as_ref(), tokens.len().max(1))?;
            evaluator.with_cancel(Arc::clone(&cancel)).logits(&Sequence::prompt(&tokens))
        };
        let logits = interruptible(py, &cancel, work)?;
        logits.into_pyarray(py).reshape([tokens.len(), self.0.config().vocab])
    }

    fn _generate(&self, py: Python<'_>, prompt: Asked<'_>, options: Options<'_>) -> PyResult<String> {
        let (generate, cancel) = self.request(prompt, &options)?;
        interruptible(py, &cancel, || generate.text())
    }

    fn _stream(&self, py: Python<'_>, prompt: Asked<'_>, options: Options<'_>) -> PyResult<PyTextStream> {
        let (generate, cancel) = self.request(prompt, &options)?;
        let generated = interruptible(py, &cancel, || generate.stream())?;
        Ok(PyTextStream { generated, cancel })
    }
}

/// Pieces of a text as it is generated.
#[pyclass(name = "TextStream", module = "hydra._hydra")]
pub struct PyTextStream {
    generated: Generated,
    cancel: Arc<AtomicBool>,
}

#[pymethods]
impl PyTextStream {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<String>> {
        let Self { generated, cancel } = self;
        interruptible(py, cancel, || generated.next().transpose())
    }

    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        PyArray1::from_slice(py, self.generated.tokens())
    }
}
