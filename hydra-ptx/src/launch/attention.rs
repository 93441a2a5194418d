//! Attention, forward and backward.

use super::*;

/// The widest head there is a kernel for.
pub const WIDEST_HEAD: u32 = 128;

/// Sizes of an attention, and its blocks of rows.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head, even, at most [`WIDEST_HEAD`].
    pub d: u32,
    /// [n, 3]: a segment's first row, the block's first row in it, the segment's length.
    pub tiles: Ptr,
    /// n.
    pub tile_count: u32,
}

impl Attention {
    /// The blocks of rows of segments (start, len), as the kernels want them.
    pub fn tiles(segments: impl IntoIterator<Item = (u32, u32)>) -> Vec<u32> {
        let blocks = |(start, len)| {
            let firsts = (0..len).step_by(ATTENTION_TILE as usize);
            firsts.flat_map(move |first| [start, first, len])
        };
        segments.into_iter().flat_map(blocks).collect()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    /// The padded width, and which of two kernels has it.
    fn width(&self, entries: [&'static str; 2]) -> (u32, &'static str) {
        assert!(self.d <= WIDEST_HEAD && self.d.is_multiple_of(2), "heads of {} columns", self.d);
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
pub fn attention(o: Ptr, lse: Ptr, shape: &Attention, [q, k, v]: [Ptr; 3], prefix: Option<Prefix>) -> Launch {
    let (width, entry) = shape.width(["attention_64", "attention_128"]);
    let prefix = prefix.unwrap_or(Prefix { k, v, len: 0 });
    let &Attention { n_heads, kv_heads, d, tiles, tile_count } = shape;
    let launch = launch!(
        entry,
        [tile_count, n_heads],
        attention_shared(width),
        o,
        lse,
        q,
        k,
        v,
        prefix.k,
        prefix.v,
        prefix.len,
        tiles,
        n_heads,
        kv_heads,
        d,
        shape.scale()
    );
    Launch { threads: ATTENTION_THREADS, ..launch }
}

/// `delta` [tokens, n_heads] = Σ d o ∘ o.
pub fn attention_delta(delta: Ptr, tokens: u32, shape: &Attention, d_o: Ptr, o: Ptr) -> Launch {
    let rows = tokens * shape.n_heads;
    launch!("attention_delta", [rows.div_ceil(THREADS / 32), 1], 0, delta, d_o, o, rows, shape.d)
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
pub fn attention_dq(dq: Ptr, shape: &Attention, saved: &Saved, [q, k, v]: [Ptr; 3]) -> Launch {
    let (width, entry) = shape.width(["attention_dq_64", "attention_dq_128"]);
    let &Attention { n_heads, kv_heads, d, tiles, tile_count } = shape;
    let (grid, shared) = ([tile_count, n_heads], attention_dq_shared(width));
    let &Saved { d_o, lse, delta } = saved;
    let launch = launch!(entry, grid, shared, dq, d_o, lse, delta, q, k, v, tiles, n_heads, kv_heads, d, shape.scale());
    Launch { threads: ATTENTION_THREADS, ..launch }
}

/// `dk`, `dv` [tokens, kv_heads · d].
pub fn attention_dkv([dk, dv]: [Ptr; 2], shape: &Attention, saved: &Saved, [q, k, v]: [Ptr; 3]) -> Launch {
    let (width, entry) = shape.width(["attention_dkv_64", "attention_dkv_128"]);
    let &Attention { n_heads, kv_heads, d, tiles, tile_count } = shape;
    let (grid, shared) = ([tile_count, kv_heads], attention_dkv_shared(width));
    let &Saved { d_o, lse, delta } = saved;
    let launch =
        launch!(entry, grid, shared, dk, dv, d_o, lse, delta, q, k, v, tiles, n_heads, kv_heads, d, shape.scale());
    Launch { threads: ATTENTION_THREADS, ..launch }
}
