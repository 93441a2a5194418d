//! Attention, forward and backward.

use super::*;
use crate::kernels::attention::*;

/// The widest head there is a kernel for.
pub const MAX_HEAD_DIM: u32 = 128;

/// The window of an attention without one: the largest that the kernels take, and more keys than a device holds.
pub const NO_WINDOW: u32 = (1 << 31) - 1;

/// An attention's sizes and its blocks of rows.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head, even, at most [`MAX_HEAD_DIM`].
    pub d: u32,
    /// [n, 3]: a segment's first row, the block's first row in it, the segment's length.
    pub tiles: Ptr,
    /// n.
    pub tile_count: u32,
    /// Keys that a query sees, its own and those just before it; [`NO_WINDOW`]: all before it.
    pub window: u32,
}

impl Attention {
    /// The blocks of rows of segments (start, len), in the kernels' format and order.
    pub fn tiles(segments: impl IntoIterator<Item = (u32, u32)>) -> Vec<u32> {
        let blocks = |(start, len)| {
            let firsts = (0..len).step_by(ATTENTION_QUERIES as usize);
            firsts.map(move |first| [start, first, len])
        };
        let mut tiles: Vec<[u32; 3]> = segments.into_iter().flat_map(blocks).collect();
        tiles.sort_by_key(|&[_, first, _]| std::cmp::Reverse(first));
        tiles.concat()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// The padded width, and the kernel for it.
    fn width(&self, entries: [&'static str; 2]) -> (u32, &'static str) {
        assert!(self.d <= MAX_HEAD_DIM && self.d.is_multiple_of(2), "heads of {} columns", self.d);
        if self.d <= 64 { (64, entries[0]) } else { (128, entries[1]) }
    }
}

/// Keys and values before all segments.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    /// [len, kv_heads · d].
    pub k: Ptr,
    /// [len, kv_heads · d].
    pub v: Ptr,
    /// Rows.
    pub len: u32,
}

/// o [tokens, n_heads · d] and lse [tokens, n_heads].
pub fn attention(o: Rows, lse: Ptr, shape: &Attention, [q, k, v]: [Ptr; 3], prefix: Option<Prefix>) -> Launch {
    let (width, entry) = shape.width(["attention_64", "attention_128"]);
    let Prefix { k: prefix_k, v: prefix_v, len: prefix } = prefix.unwrap_or(Prefix { k, v, len: 0 });
    let (&Attention { n_heads, kv_heads, d, tiles, tile_count, window }, scale) = (shape, shape.scale());
    let Rows { at: o, pitch: o_pitch } = o;
    let params = AttentionParams {
        o,
        o_pitch,
        lse,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        prefix,
        tiles,
        window,
        n_heads,
        kv_heads,
        d,
        scale,
    };
    let launch = Launch::new(entry, [tile_count * n_heads, 1], attention_shared(width), params.args());
    Launch { threads: ATTENTION_THREADS, ..launch }
}

/// `delta` [tokens, n_heads] = Σ d o ∘ o.
pub fn attention_delta(delta: Ptr, tokens: u32, shape: &Attention, d_o: Ptr, o: Rows) -> Launch {
    let (&Attention { n_heads, d, .. }, Rows { at: o, pitch: o_pitch }) = (shape, o);
    let rows = tokens * n_heads;
    let params = AttentionDeltaParams { delta, d_o, o, o_pitch, n_heads, rows, d };
    Launch::new("attention_delta", [rows.div_ceil(THREADS / 32), 1], 0, params.args())
}

/// What the backward pass reads beside q, k and v.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// Gradient of o.
    pub d_o: Ptr,
    /// From the forward pass.
    pub lse: Ptr,
    /// From [`attention_delta`].
    pub delta: Ptr,
}

/// `dq` [tokens, n_heads · d].
pub fn attention_dq(dq: Rows, shape: &Attention, saved: &Saved, [q, k, v]: [Ptr; 3]) -> Launch {
    let (width, entry) = shape.width(["attention_dq_64", "attention_dq_128"]);
    let (&Attention { n_heads, kv_heads, d, tiles, tile_count, window }, scale) = (shape, shape.scale());
    let &Saved { d_o, lse, delta } = saved;
    let Rows { at: dq, pitch: dq_pitch } = dq;
    let params =
        AttentionDqParams { dq, dq_pitch, d_o, lse, delta, q, k, v, tiles, window, n_heads, kv_heads, d, scale };
    let launch = Launch::new(entry, [tile_count * n_heads, 1], attention_dq_shared(width), params.args());
    Launch { threads: ATTENTION_THREADS, ..launch }
}

/// `dk`, `dv` [tokens, kv_heads · d].
pub fn attention_dkv([dk, dv]: [Rows; 2], shape: &Attention, saved: &Saved, [q, k, v]: [Ptr; 3]) -> Launch {
    let (width, entry) = shape.width(["attention_dkv_64", "attention_dkv_128"]);
    let (&Attention { n_heads, kv_heads, d, tiles, tile_count, window }, scale) = (shape, shape.scale());
    let &Saved { d_o, lse, delta } = saved;
    let (Rows { at: dk, pitch: dk_pitch }, Rows { at: dv, pitch: dv_pitch }) = (dk, dv);
    let params = AttentionDkvParams {
        dk,
        dk_pitch,
        dv,
        dv_pitch,
        d_o,
        lse,
        delta,
        q,
        k,
        v,
        tiles,
        tile_count,
        window,
        n_heads,
        kv_heads,
        d,
        scale,
    };
    let launch = Launch::new(entry, [2 * tile_count * kv_heads, 1], attention_dkv_shared(width), params.args());
    Launch { threads: ATTENTION_THREADS, ..launch }
}
