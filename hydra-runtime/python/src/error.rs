//! Rust's errors as Python's exceptions.

use hydra_runtime::Error as Failure;
use pyo3::exceptions::{
    PyArithmeticError, PyFileNotFoundError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;

pyo3::create_exception!(hydra, Error, PyRuntimeError, "An error of Hydra that no exception of Python's names.");

/// The exception that says the same.
pub fn exception(error: Failure) -> PyErr {
    let text = error.to_string();
    match error {
        Failure::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(text)
        }
        Failure::Io { .. } => PyOSError::new_err(text),
        Failure::Invalid(_)
        | Failure::Kernel(_)
        | Failure::NoTarget
        | Failure::TokenOutOfRange { .. }
        | Failure::LearningRate(_)
        | Failure::SequenceTooLong { .. }
        | Failure::CacheFull { .. }
        | Failure::WrongAdapter(_)
        | Failure::Format { .. }
        | Failure::Tensors { .. }
        | Failure::Config { .. } => PyValueError::new_err(text),
        Failure::OutOfMemory { .. } => PyMemoryError::new_err(text),
        Failure::NotFinite { .. } | Failure::LogitNotFinite(_) => PyArithmeticError::new_err(text),
        Failure::Cancelled => PyKeyboardInterrupt::new_err(text),
        _ => Error::new_err(text),
    }
}

/// An argument that is wrong.
pub fn wrong(text: String) -> PyErr {
    PyValueError::new_err(text)
}
