//! Attention, forward and backward.

use super::buffer::{Activations, size};
use super::driver::Driver;
use super::launcher::Cuda;
use super::state::State;
use crate::backend::{Attention, AttentionBackward, AttentionShape, Prefix};
use crate::batch::Segment;
use crate::{Error, Result};
use hydra_ptx::launch::{self, MAX_HEAD_DIM, NO_WINDOW, Ptr, Saved};
use std::num::NonZeroUsize;

/// What both passes hand to their launches.
struct Inputs {
    shape: launch::Attention,
    /// Rows of q, k and v.
    tokens: usize,
    /// Addresses of q, k and v.
    qkv: [Ptr; 3],
}

impl<D: Driver> Cuda<D> {
    /// Checks the inputs, and uploads the segments' blocks of rows.
    fn attention_inputs(
        &self,
        state: &mut State<D>,
        shape: AttentionShape,
        segments: &[Segment],
        window: Option<NonZeroUsize>,
        [q, k, v]: [&Activations<D>; 3],
    ) -> Result<Inputs> {
        let d = shape.head_dim;
        if d > MAX_HEAD_DIM as usize || !d.is_multiple_of(2) {
            let what = format!("heads of {d} columns: attention on a GPU takes even numbers up to {MAX_HEAD_DIM}");
            return Err(Error::Invalid(what));
        }
        let mut rows = Vec::with_capacity(segments.len());
        for segment in segments {
            rows.push((size(segment.start)?, size(segment.len)?));
        }
        let tokens = segments.iter().map(|segment| segment.start + segment.len).max().unwrap_or(0);
        let tiles = launch::Attention::tiles(rows);
        let launched = launch::Attention {
            n_heads: size(shape.n_heads)?,
            kv_heads: size(shape.kv_heads)?,
            d: size(d)?,
            tile_count: size(tiles.len() / 3)?,
            tiles: state.ids.on_device(&self.driver, &tiles)?,
            // A window of more keys than a device holds hides none.
            window: window.map_or(NO_WINDOW, |window| window.get().min(NO_WINDOW as usize) as u32),
        };
        let kv_len = tokens * shape.kv_width();
        let qkv = [self.bf16(q, tokens * shape.q_width()), self.bf16(k, kv_len), self.bf16(v, kv_len)];
        Ok(Inputs { shape: launched, tokens, qkv })
    }

    pub(super) fn attention_forward(&self, args: Attention<'_, Self>) -> Result<()> {
        let Attention { o, lse, shape, segments, window, q, k, v, prefix } = args;
        let state = &mut *self.state();
        let inputs = self.attention_inputs(state, shape, segments, window, [q, k, v])?;
        let prefix = match prefix {
            None => None,
            Some(Prefix { k, v, len }) => {
                let values = len * shape.kv_width();
                Some(launch::Prefix { k: self.bf16(k, values), v: self.bf16(v, values), len: size(len)? })
            }
        };
        let o = self.rows(o, inputs.tokens, shape.q_width())?;
        let lse = self.f32(lse, inputs.tokens * shape.n_heads);
        self.run(&launch::attention(o, lse, &inputs.shape, inputs.qkv, prefix))
    }

    pub(super) fn attention_gradient(&self, args: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { dq, dk, dv, shape, segments, window, d_o, o, lse, q, k, v } = args;
        let state = &mut *self.state();
        let Inputs { shape: launched, tokens, qkv } =
            self.attention_inputs(state, shape, segments, window, [q, k, v])?;
        let q_len = tokens * shape.q_width();
        let (d_o, o) = (self.bf16(d_o, q_len), self.rows(o, tokens, shape.q_width())?);
        let delta = state.partial.f32(&self.driver, tokens * shape.n_heads)?;
        let saved = Saved { d_o, lse: self.f32(lse, tokens * shape.n_heads), delta };
        let dq_at = self.rows(dq, tokens, shape.q_width())?;
        let (dk_at, dv_at) = (self.rows(dk, tokens, shape.kv_width())?, self.rows(dv, tokens, shape.kv_width())?);
        self.run(&launch::attention_delta(delta, size(tokens)?, &launched, d_o, o))?;
        self.run(&launch::attention_dq(dq_at, &launched, &saved, qkv))?;
        self.run(&launch::attention_dkv([dk_at, dv_at], &launched, &saved, qkv))?;
        if window.is_some_and(|window| window.get() == 1) {
            // The softmax over a single key is constant. Rounding would leave a gradient that AdamW makes into steps.
            dq.0.zero(&self.driver, tokens, shape.q_width())?;
            dk.0.zero(&self.driver, tokens, shape.kv_width())?;
        }
        Ok(())
    }
}
