//! Adapters: files, configuration, and tensors as arrays.

use crate::error::{Whole, exception, wrong};
use crate::model::PyModel;
use hydra_runtime::adapter::{Adapter, AdapterConfig, GateKind, HeadInit, Method};
use hydra_runtime::model::{AttachedAdapter, Model};
use hydra_runtime::projection::Projection;
use numpy::{IntoPyArray, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Mutex;

/// An adapter, and where it has been attached last.
#[pyclass(name = "Adapter", module = "hydra._hydra", frozen)]
pub struct PyAdapter {
    pub adapter: Adapter,
    attached: Mutex<Option<AttachedAdapter>>,
}

/// An array [rows, columns] of f32.
type Matrix<'py> = Bound<'py, PyArray2<f32>>;

/// What `Adapter.init` is given, as a dictionary.
#[derive(FromPyObject)]
pub struct Settings {
    #[pyo3(item)]
    method: String,
    #[pyo3(item)]
    gate: Option<String>,
    #[pyo3(item)]
    rank: Whole<usize>,
    #[pyo3(item)]
    lora_heads: Whole<usize>,
    #[pyo3(item)]
    alpha: f32,
    #[pyo3(item)]
    dropout: f32,
    #[pyo3(item)]
    targets: Vec<String>,
    #[pyo3(item)]
    labels: Vec<String>,
    #[pyo3(item)]
    head_dropout: f32,
    #[pyo3(item)]
    temperature: f32,
    #[pyo3(item)]
    top_k: Option<Whole<usize>>,
    #[pyo3(item)]
    load_balance: f32,
}

impl Settings {
    fn config(self) -> PyResult<AdapterConfig> {
        let method = Method::parse(&self.method);
        let method = method
            .ok_or_else(|| wrong(format!("method {:?}: expected \"hydra\", \"lora\" or \"split\"", self.method)))?;
        let gate = match self.gate.as_deref() {
            None => method.default_gate(),
            Some(name) => GateKind::parse(name).ok_or_else(|| {
                wrong(format!("gate {name:?}: expected \"router\", \"label\", \"uniform\" or \"one\""))
            })?,
        };
        let projection = |name: &String| {
            let known = Projection::ALL.map(Projection::name).join(", ");
            Projection::parse(name).ok_or_else(|| wrong(format!("target {name:?}: expected one of {known}")))
        };
        let mut targets = self.targets.iter().map(projection).collect::<PyResult<Vec<_>>>()?;
        targets.sort();
        targets.dedup();
        Ok(AdapterConfig {
            method,
            gate,
            rank: self.rank.get("rank")?,
            lora_heads: self.lora_heads.get("lora_heads")?,
            alpha: self.alpha,
            dropout: self.dropout,
            head_dropout: self.head_dropout,
            temperature: self.temperature,
            top_k: self.top_k.map(|top_k| top_k.get("top_k")).transpose()?,
            load_balance: self.load_balance,
            targets,
            labels: self.labels,
            head_init: HeadInit::Zero,
            ..AdapterConfig::default()
        })
    }
}

impl PyAdapter {
    pub fn new(adapter: Adapter) -> Self {
        Self { adapter, attached: Mutex::new(None) }
    }

    /// The adapter on the model's device: copied there at the first use, and kept for the next.
    pub fn attached(&self, model: &Model) -> PyResult<AttachedAdapter> {
        let mut last = self.attached.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*last {
            Some(attached) if std::ptr::eq(attached.model().config(), model.config()) => Ok(attached.clone()),
            _ => {
                let attached = model.attach(&self.adapter).map_err(exception)?;
                Ok(last.insert(attached).clone())
            }
        }
    }
}

#[pymethods]
impl PyAdapter {
    #[staticmethod]
    #[pyo3(signature = (folder, model = None))]
    fn load(py: Python<'_>, folder: PathBuf, model: Option<PyRef<'_, PyModel>>) -> PyResult<Self> {
        let model = model.map(|model| model.0.clone());
        let load = || match &model {
            Some(model) => Adapter::load(&folder, model.config()),
            None => Adapter::open(&folder),
        };
        py.detach(load).map(Self::new).map_err(exception)
    }

    #[staticmethod]
    fn _init(model: PyRef<'_, PyModel>, settings: Settings, seed: Whole<u64>) -> PyResult<Self> {
        Adapter::init(model.0.config(), settings.config()?, seed.get("seed")?).map(Self::new).map_err(exception)
    }

    fn head(&self, py: Python<'_>, head: Whole<usize>) -> PyResult<Self> {
        let head = head.get("head")?;
        py.detach(|| self.adapter.head(head)).map(Self::new).map_err(exception)
    }

    fn save(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        py.detach(|| self.adapter.save(&folder)).map_err(exception)
    }

    #[getter]
    fn parameters(&self) -> u64 {
        self.adapter.parameters()
    }

    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (config, dict) = (&self.adapter.config, PyDict::new(py));
        let targets: Vec<_> = config.targets.iter().map(|target| target.name()).collect();
        dict.set_item("method", config.method.name())?;
        dict.set_item("gate", config.gate.name())?;
        dict.set_item("rank", config.rank)?;
        dict.set_item("lora_heads", config.lora_heads)?;
        dict.set_item("alpha", config.alpha)?;
        dict.set_item("rslora", config.rslora)?;
        dict.set_item("scale", config.scale())?;
        dict.set_item("dropout", config.dropout)?;
        dict.set_item("targets", targets)?;
        dict.set_item("labels", config.labels.clone())?;
        dict.set_item("head_dropout", config.head_dropout)?;
        dict.set_item("load_balance", config.load_balance)?;
        dict.set_item("temperature", config.temperature)?;
        dict.set_item("top_k", config.top_k)?;
        dict.set_item("layers", self.adapter.layers.len())?;
        Ok(dict)
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Vec<(String, Matrix<'py>)>> {
        self.adapter.check().map_err(exception)?;
        let array =
            |(name, shape, values): (String, [usize; 2], Vec<f32>)| Ok((name, values.into_pyarray(py).reshape(shape)?));
        self.adapter.tensors().map(array).collect()
    }

    fn pair<'py>(
        &self,
        py: Python<'py>,
        layer: Whole<usize>,
        target: &str,
    ) -> PyResult<Option<(Matrix<'py>, Matrix<'py>)>> {
        let pairs = self.adapter.layers.get(layer.get("layer")?);
        let Some(pair) = pairs.zip(Projection::parse(target)).and_then(|(pairs, target)| pairs[target].as_ref()) else {
            return Ok(None);
        };
        let matrix = |values: &[f32], columns: usize| {
            values.to_vec().into_pyarray(py).reshape([values.len() / columns.max(1), columns])
        };
        Ok(Some((matrix(&pair.a, pair.d_in)?, matrix(&pair.b, pair.b.len() / pair.d_out.max(1))?)))
    }
}
