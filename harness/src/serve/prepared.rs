//! A request that is ready for the engine.

use super::request::Common;
use super::shape::Shape;
use std::time::Instant;

/// A request whose prompts are token ids.
pub struct Prepared {
    /// What both kinds of requests have.
    pub common: Common,
    /// How its answer is written.
    pub shape: Shape,
    /// The adapter's name.
    pub adapter: Option<String>,
    /// None of them empty, or longer than the context.
    pub prompts: Vec<Vec<u32>>,
    /// Whether the answer begins with the prompt.
    pub echo: bool,
    /// The number of alternatives whose log-probabilities are reported.
    pub logprobs: Option<usize>,
    /// When the request came.
    pub received: Instant,
}
