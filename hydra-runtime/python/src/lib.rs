//! The native half of the Python package `hydra`; `python/hydra/_hydra.pyi` documents it for Python.
//!
//! | file | classes and functions |
//! |---|---|
//! | `error.rs` | Rust's errors as Python's exceptions |
//! | `interrupt.rs` | long work without the GIL, ended by Ctrl-C |
//! | `model.rs` | `Model`, its texts and its logits |
//! | `adapter.rs` | `Adapter` |
//! | `train.rs` | `Trainer`, and losses |
//! | `operator.rs` | the operator on arrays, which `hydra.torch` calls |

mod adapter;
mod error;
mod interrupt;
mod model;
mod operator;
mod train;

use pyo3::prelude::*;

#[pymodule]
fn _hydra(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add_class::<model::PyModel>()?;
    module.add_class::<model::PyTextStream>()?;
    module.add_class::<adapter::PyAdapter>()?;
    module.add_class::<train::PyTrainer>()?;
    module.add_function(wrap_pyfunction!(train::losses, module)?)?;
    module.add_class::<operator::Layer>()?;
    Ok(())
}
