//! Everything of a model that is no product: norms, rotations, the loss, the optimiser.

kernels! {
    /// RMSNorm.
    struct RmsNormParams for rows::[rms_norm] {
        /// [rows, d], bf16.
        y: *mut u16,
        /// Elements from a row of y to the next.
        y_pitch: u32,
        /// 1 / √(mean x² + eps), [rows].
        inv_rms: *mut f32,
        /// [rows, d].
        x: *const f32,
        /// [d].
        weight: *const f32,
        /// Columns.
        d: u32,
        /// Added to the mean square.
        eps: f32,
    }

    /// RMSNorm's gradient.
    struct RmsNormBackwardParams for rows::[rms_norm_backward] {
        /// [rows, d], to which the gradient is added.
        dx: *mut f32,
        /// [rows, d].
        dy: *const f32,
        /// [rows, d].
        x: *const f32,
        /// From the forward pass, [rows].
        inv_rms: *const f32,
        /// [d].
        weight: *const f32,
        /// Columns.
        d: u32,
    }

    /// The norm of each head.
    struct HeadNormParams for heads::[head_norm] {
        /// [heads, d], bf16.
        y: *mut u16,
        /// [heads, d], bf16.
        x: *const u16,
        /// [d].
        weight: *const f32,
        /// Heads of all rows.
        heads: u32,
        /// Columns of a head, an even number.
        d: u32,
        /// Added to the mean square.
        eps: f32,
    }

    /// The gradient of the norm of each head.
    struct HeadNormBackwardParams for heads::[head_norm_backward] {
        /// The gradient of y, replaced by that of x; [rows, n_heads · d], bf16.
        dx: *mut u16,
        /// Elements from a row of dx to the next.
        pitch: u32,
        /// Heads of a row.
        n_heads: u32,
        /// [heads, d], bf16.
        x: *const u16,
        /// [d].
        weight: *const f32,
        /// Heads of all rows.
        heads: u32,
        /// Columns of a head, an even number.
        d: u32,
        /// Added to the mean square.
        eps: f32,
    }

    /// A projection's bias.
    struct AddBiasParams for rows::[add_bias] {
        /// [rows, d], changed in place.
        y: *mut u8,
        /// Whether y is bf16, else f32.
        bf16: u32,
        /// [d].
        bias: *const f32,
        /// Rows.
        rows: u32,
        /// Columns.
        d: u32,
    }

    /// Rows of the embedding table.
    struct EmbedParams for rows::[embed] {
        /// [tokens, d].
        out: *mut f32,
        /// The table's values or quants.
        table: *const u8,
        /// Scales of a block format.
        scales: *const u8,
        /// One of `sizes::FORMAT_*`.
        format: u32,
        /// Elements from a row of the table to the next.
        pitch: u32,
        /// Columns.
        d: u32,
        /// Row of each token, [tokens].
        ids: *const u32,
    }

    /// Rows to be gathered or scattered.
    struct MoveRowsParams for rows::[gather scatter] {
        /// Rows of width d.
        out: *mut f32,
        /// Rows of width d.
        x: *const f32,
        /// Words from a row of x to the next.
        x_pitch: u32,
        /// The row of `x` (gather) or of `out` (scatter) for each row that moves.
        rows: *const u32,
        /// Columns, as words of 32 bits.
        d: u32,
    }

    /// Rotary position embedding.
    struct RopeParams for elementwise::[rope] {
        /// [tokens, n_heads · d], bf16, changed in place.
        x: *mut u16,
        /// Elements from a row of x to the next.
        pitch: u32,
        /// [positions, d]: cosines, then sines.
        table: *const f32,
        /// [tokens].
        positions: *const u32,
        /// Rows of `x`.
        tokens: u32,
        /// Heads.
        n_heads: u32,
        /// Columns of a head.
        d: u32,
        /// 1, or −1 to rotate back.
        sign: f32,
    }

    /// SwiGLU.
    struct SwigluParams for elementwise::[swiglu] {
        /// [rows, d], bf16.
        out: *mut u16,
        /// Elements from a row of `out` to the next.
        pitch: u32,
        /// [rows, d], bf16.
        gate: *const u16,
        /// [rows, d], bf16.
        up: *const u16,
        /// Rows.
        rows: u32,
        /// Columns.
        d: u32,
    }

    /// SwiGLU's gradient.
    struct SwigluBackwardParams for elementwise::[swiglu_backward] {
        /// The output's gradient, replaced by the gate's; [rows, d], bf16.
        dgate: *mut u16,
        /// Elements from a row of `dgate` to the next.
        dgate_pitch: u32,
        /// The gradient of `up`, [rows, d], bf16.
        dup: *mut u16,
        /// Elements from a row of `dup` to the next.
        dup_pitch: u32,
        /// [rows, d], bf16.
        gate: *const u16,
        /// [rows, d], bf16.
        up: *const u16,
        /// Rows.
        rows: u32,
        /// Columns.
        d: u32,
    }

    /// A block of the vocabulary in the loss's running softmax. See `loss.rs`.
    struct OnlineSoftmaxParams for loss::[online_softmax] {
        /// The operand exp(logit − max), [rows, count].
        p: *mut u16,
        /// [rows, 3]: largest logit, sum, the target's logit.
        state: *mut f32,
        /// [rows, d], rescaled to the new maximum; or null.
        dx: *mut f32,
        /// [rows, count].
        logits: *const f32,
        /// Ids of this block.
        count: u32,
        /// Each row's target id, [rows].
        targets: *const u32,
        /// The block's first id.
        first: u32,
        /// Columns of dx.
        d: u32,
    }

    /// The end of the loss.
    struct FinishLossParams for loss::[finish_loss] {
        /// [rows].
        nll: *mut f32,
        /// [rows, d], or null.
        dx: *mut f32,
        /// [rows, 3], from `online_softmax`.
        state: *const f32,
        /// The vocabulary's matrix: values or quants.
        lm_head: *const u8,
        /// Scales of a block format.
        scales: *const u8,
        /// One of `sizes::FORMAT_*`.
        format: u32,
        /// Elements from a row of the vocabulary's matrix to the next.
        pitch: u32,
        /// Each row's target id, [rows].
        targets: *const u32,
        /// Columns of dx.
        d: u32,
        /// Factor of dx.
        scale: f32,
    }

    /// Partial sums of squares.
    struct SquaresParams for optimizer::[squares] {
        /// Σ x² over 16 Ki values each.
        parts: *mut f64,
        /// [len].
        x: *const f32,
        /// Values.
        len: u64,
    }

    /// The sum of partial sums.
    struct SquaresTotalParams for optimizer::[squares_total] {
        /// One value.
        out: *mut f64,
        /// [count].
        parts: *const f64,
        /// Partial sums.
        count: u32,
    }

    /// A step of AdamW.
    struct AdamWParams for optimizer::[adamw] {
        /// [len].
        params: *mut f32,
        /// First moments, [len].
        m: *mut f32,
        /// Second moments, [len].
        v: *mut f32,
        /// [len].
        grads: *const f32,
        /// Parameters.
        len: u64,
        /// Decay of the first moments.
        beta1: f32,
        /// Decay of the second moments.
        beta2: f32,
        /// Added to the root of the second moment.
        eps: f32,
        /// 1 − lr · weight decay.
        keep: f32,
        /// lr / (1 − β₁ᵗ).
        step: f32,
        /// √(1 − β₂ᵗ).
        root: f32,
        /// Factor of the gradients.
        grad_scale: f32,
    }
}
