//! An adapter merged into its model's weights and written as a Hugging Face folder ([`write()`]) or as a GGUF file
//! ([`write_gguf`]); and an adapter under a fixed gate as one plain LoRA ([`Adapter::as_lora`]).
//!
//! If the heads' weights g are the same for every token, adapter and frozen weight add up to one matrix:
//!
//! ```text
//! W' = W + s · Σ_e g_e B_e A_e            g_e = 1/N (uniform), 1 for one head and 0 for the others, or N = 1 and g = 1
//! ```
//!
//! Sums are f32, row by row, and rounded once to the type that is written. Tensors are computed one at a time as they are
//! written, so memory holds one of them. A router's weights depend on the token, so a merged router is an approximation.

mod folder;
mod gguf;

pub use folder::{COMPANIONS, MergeOptions, write};
pub use gguf::{GgufOptions, write_gguf};

use crate::adapter::{Adapter, AdapterConfig, AdapterPair, GateKind, Method};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::{Error, Result};
use hydra_kernels::isa::Isa;
use hydra_kernels::quant::Format;
use hydra_kernels::shape::HydraShape;
use std::cmp::Reverse;

/// The heads' weights in a merged model, the same for every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeGate {
    /// 1/N each.
    Uniform,
    /// 1 for this lora head, 0 for the others.
    Head(usize),
    /// The only head.
    One,
}

impl MergeGate {
    /// Fails if an adapter of this number of heads can't be merged so.
    fn check(self, lora_heads: usize) -> Result<()> {
        let refuse = |message| Err(Error::WrongAdapter(message));
        match self {
            Self::Head(head) if head >= lora_heads => {
                refuse(format!("head {head} of an adapter of {lora_heads} heads"))
            }
            Self::One if lora_heads != 1 => {
                refuse(format!("gate one needs an adapter with one head, found {lora_heads}"))
            }
            _ => Ok(()),
        }
    }

    fn weight(self, head: usize, lora_heads: usize) -> f32 {
        match self {
            Self::Uniform => 1.0 / lora_heads as f32,
            Self::Head(chosen) => f32::from(chosen == head),
            Self::One => 1.0,
        }
    }
}

impl Adapter {
    /// This adapter under a fixed gate, for comparison with a merged model: without its router, if it has one, and with the
    /// lora head that all sequences must then name ([`crate::batch::Sequence::lora_head`]).
    pub fn with_fixed_gate(&self, gate: MergeGate) -> Result<(Self, Option<u32>)> {
        gate.check(self.config.lora_heads)?;
        let mut fixed = self.clone();
        let head = match gate {
            MergeGate::Head(head) => Some(head as u32),
            // A sequence without a lora head is mixed uniformly.
            MergeGate::Uniform => None,
            MergeGate::One => Some(0),
        };
        if self.config.gate != GateKind::One {
            fixed.config = fixed.config.without_router(GateKind::Label);
            fixed.config.labels.clear();
            let had = self.config.clone();
            for pair in fixed.layers.iter_mut().flatten().flatten() {
                pair.a.truncate(had.shape_of(pair.d_in, pair.d_out).a_rows() * pair.d_in);
            }
        }
        Ok((fixed, head))
    }

    /// This adapter under a fixed gate as one LoRA, which does the same: the head itself, or for the mean of the heads the mean of
    /// their B; with an A for each head, all of them one above the other, of rank heads · rank.
    pub fn as_lora(&self, gate: MergeGate) -> Result<Self> {
        self.check()?;
        let AdapterConfig { rank, lora_heads, method, .. } = self.config;
        gate.check(lora_heads)?;
        match gate {
            MergeGate::One => return self.head(0),
            MergeGate::Head(head) => return self.head(head),
            MergeGate::Uniform => {}
        }
        let mut lora = self.head(0)?;
        if method == Method::Split {
            lora.config.rank = lora_heads * rank;
            lora.config.alpha = self.config.scale() * lora.config.rank as f32;
            lora.config.rslora = false;
        }
        let share = 1.0 / lora_heads as f32;
        for (lora, pairs) in lora.layers.iter_mut().zip(&self.layers) {
            for (lora, pair) in
                lora.iter_mut().zip(pairs.iter()).filter_map(|(lora, pair)| lora.as_mut().zip(pair.as_ref()))
            {
                let shape = self.config.shape_of(pair.d_in, pair.d_out);
                lora.a = pair.a[..shape.a_rows() * pair.d_in].to_vec();
                let rows = pair.b.chunks_exact(shape.mixed_width());
                lora.b = match method {
                    Method::Split => pair.b.iter().map(|b| share * b).collect(),
                    _ => rows
                        .flat_map(|row| {
                            (0..rank).map(|column| share * row.iter().skip(column).step_by(rank).sum::<f32>())
                        })
                        .collect(),
                };
            }
        }
        Ok(lora)
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The types of the tensors; the largest share first.
    pub formats: Vec<Format>,
    /// Weights files.
    pub shards: usize,
    /// Their tensors' bytes.
    pub bytes: u64,
}

/// The formats of tensors, each with its bytes: the largest share first.
fn formats(tensors: impl Iterator<Item = (Format, u64)>) -> Vec<Format> {
    let mut shares = Format::ALL.map(|format| (format, 0));
    for (format, bytes) in tensors {
        shares.iter_mut().filter(|(other, _)| *other == format).for_each(|(_, share)| *share += bytes);
    }
    shares.sort_by_key(|&(_, share)| Reverse(share));
    shares.into_iter().filter(|&(_, share)| share > 0).map(|(format, _)| format).collect()
}

/// A model and what is merged into it.
#[derive(Clone, Copy)]
struct Merging<'a> {
    checkpoint: &'a Checkpoint,
    adapter: &'a Adapter,
    gate: MergeGate,
}

impl<'a> Merging<'a> {
    /// Fails if they don't go together, or the adapter has values that aren't finite.
    fn new(checkpoint: &'a Checkpoint, adapter: &'a Adapter, gate: MergeGate) -> Result<Self> {
        adapter.fits(checkpoint.config())?;
        adapter.check_finite()?;
        gate.check(adapter.config.lora_heads)?;
        Ok(Self { checkpoint, adapter, gate })
    }

    /// Rows of a tensor; 1 of a vector.
    fn row_count(&self, id: TensorId) -> usize {
        id.dims(self.checkpoint.config()).0.unwrap_or(1)
    }

    /// The pair that changes a tensor.
    fn pair(&self, id: TensorId) -> Option<&'a AdapterPair> {
        match id {
            TensorId::Projection(layer, projection) => self.adapter.layers[layer][projection].as_ref(),
            _ => None,
        }
    }

    /// Hands rows of the merged tensor to `put`, in the order of `rows`. A vector has row 0.
    fn rows(&self, id: TensorId, rows: impl IntoIterator<Item = usize>, mut put: impl FnMut(&[f32])) {
        let (height, cols) = id.dims(self.checkpoint.config());
        if height.is_none() {
            return put(&self.checkpoint.vector(id));
        }
        let (weight, isa, pair) = (self.checkpoint.weight(id), Isa::detect(), self.pair(id));
        let mut row = vec![0.0; cols];
        for o in rows {
            weight.decode_row(isa, o, 0, &mut row);
            if let Some(pair) = pair {
                let shape = self.adapter.config.shape_of(pair.d_in, pair.d_out);
                add_row(isa, &mut row, o, pair, &shape, self.adapter.config.scale(), self.gate);
            }
            put(&row);
        }
    }
}

/// `row` [d_in] += row `o` of scale · Σ_e g_e B_e A_e.
fn add_row(isa: Isa, row: &mut [f32], o: usize, pair: &AdapterPair, shape: &HydraShape, scale: f32, gate: MergeGate) {
    let mut sum = vec![0.0; row.len()];
    for (column, &b) in pair.b[o * shape.mixed_width()..][..shape.mixed_width()].iter().enumerate() {
        let factor = gate.weight(column / shape.rank, shape.lora_heads) * b;
        if factor == 0.0 {
            continue;
        }
        let of_a = if shape.per_head_a { column } else { column % shape.rank };
        let a = &pair.a[of_a * pair.d_in..][..pair.d_in];
        isa.vectorize(
            #[inline(always)]
            || sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a),
        );
    }
    row.iter_mut().zip(&sum).for_each(|(row, sum)| *row += scale * sum);
}
