//! Attention, forward and backward.

kernels! {
    /// Causal attention over packed segments, after an optional prefix. See `attention.rs`.
    struct AttentionParams for attention::[attention_64 attention_128] {
        /// [tokens, n_heads · d], bf16.
        o: *mut u16,
        /// Elements from a row of o to the next.
        o_pitch: u32,
        /// Logarithm of each softmax's sum, [tokens, n_heads].
        lse: *mut f32,
        /// [tokens, n_heads · d], bf16.
        q: *const u16,
        /// [tokens, kv_heads · d], bf16.
        k: *const u16,
        /// [tokens, kv_heads · d], bf16.
        v: *const u16,
        /// The prefix's keys, [prefix, kv_heads · d], bf16.
        prefix_k: *const u16,
        /// The prefix's values.
        prefix_v: *const u16,
        /// Rows of the prefix.
        prefix: u32,
        /// [blocks, 3]: a segment's first row, the block's first row in it, the segment's length.
        tiles: *const u32,
        /// Keys that a query sees, its own and those just before it.
        window: u32,
        /// Query heads.
        n_heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Columns of a head.
        d: u32,
        /// 1 / √d.
        scale: f32,
    }

    /// delta = Σ d_o ∘ o over a head's columns.
    struct AttentionDeltaParams for attention_backward::[attention_delta] {
        /// [rows].
        delta: *mut f32,
        /// [rows, d], bf16.
        d_o: *const u16,
        /// [tokens, n_heads · d], bf16.
        o: *const u16,
        /// Elements from a row of o to the next.
        o_pitch: u32,
        /// Query heads.
        n_heads: u32,
        /// Tokens · query heads.
        rows: u32,
        /// Columns of a head.
        d: u32,
    }

    /// The gradient of attention's queries.
    struct AttentionDqParams for attention_backward::[attention_dq_64 attention_dq_128] {
        /// [tokens, n_heads · d], bf16.
        dq: *mut u16,
        /// Elements from a row of dq to the next.
        dq_pitch: u32,
        /// The output's gradient, [tokens, n_heads · d], bf16.
        d_o: *const u16,
        /// From the forward pass, [tokens, n_heads].
        lse: *const f32,
        /// From `attention_delta`, [tokens, n_heads].
        delta: *const f32,
        /// [tokens, n_heads · d], bf16.
        q: *const u16,
        /// [tokens, kv_heads · d], bf16.
        k: *const u16,
        /// [tokens, kv_heads · d], bf16.
        v: *const u16,
        /// See [`AttentionParams`].
        tiles: *const u32,
        /// Keys that a query sees, its own and those just before it.
        window: u32,
        /// Query heads.
        n_heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Columns of a head.
        d: u32,
        /// 1 / √d.
        scale: f32,
    }

    /// The gradients of attention's keys and values. Fields are those of [`AttentionDqParams`].
    struct AttentionDkvParams for attention_dkv::[attention_dkv_64 attention_dkv_128] {
        /// [tokens, kv_heads · d], bf16.
        dk: *mut u16,
        /// Elements from a row of dk to the next.
        dk_pitch: u32,
        /// [tokens, kv_heads · d], bf16.
        dv: *mut u16,
        /// Elements from a row of dv to the next.
        dv_pitch: u32,
        /// The output's gradient, [tokens, n_heads · d], bf16.
        d_o: *const u16,
        /// From the forward pass, [tokens, n_heads].
        lse: *const f32,
        /// From `attention_delta`, [tokens, n_heads].
        delta: *const f32,
        /// [tokens, n_heads · d], bf16.
        q: *const u16,
        /// [tokens, kv_heads · d], bf16.
        k: *const u16,
        /// [tokens, kv_heads · d], bf16.
        v: *const u16,
        /// See [`AttentionParams`].
        tiles: *const u32,
        /// Entries of `tiles`.
        tile_count: u32,
        /// Keys that a query sees, its own and those just before it.
        window: u32,
        /// Query heads.
        n_heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Columns of a head.
        d: u32,
        /// 1 / √d.
        scale: f32,
    }
}
