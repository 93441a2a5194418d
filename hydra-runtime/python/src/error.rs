//! Rust's errors as Python's exceptions.

use hydra_runtime::Error as Failure;
use pyo3::exceptions::{
    PyArithmeticError, PyFileNotFoundError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyOverflowError,
    PyRuntimeError, PyValueError,
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

/// A whole number, or the digits of one that T has no room for, which is an argument that is wrong and no `OverflowError`.
pub struct Whole<T>(Result<T, String>);

impl<'a, 'py, T: FromPyObject<'a, 'py, Error = PyErr>> FromPyObject<'a, 'py> for Whole<T> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<T>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(Err(object.str()?.to_string())))
            }
            number => number.map(|number| Self(Ok(number))),
        }
    }
}

impl<T: Copy> Whole<T> {
    /// The number, of an unsigned type.
    pub fn get(&self, what: &str) -> PyResult<T> {
        let most = u64::MAX >> (64 - 8 * size_of::<T>());
        self.0.as_ref().copied().map_err(|found| wrong(format!("{what} {found}: expected 0 to {most}")))
    }
}
