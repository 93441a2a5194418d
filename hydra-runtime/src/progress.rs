//! How far long work is, and how to end it early.

use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How much of one call's work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tokens that have gone through the model.
    pub done: usize,
    /// Tokens of the whole call.
    pub total: usize,
}

/// Who watches a trainer or an evaluator.
#[derive(Default)]
pub(crate) struct Watch {
    pub cancel: Option<Arc<AtomicBool>>,
    pub progress: Option<Box<dyn FnMut(Progress) + Send + Sync>>,
}

impl Watch {
    /// Reports progress, and fails if the work has been cancelled.
    pub fn report(&mut self, done: usize, total: usize) -> Result<()> {
        if let Some(progress) = &mut self.progress {
            progress(Progress { done, total });
        }
        match &self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}
