//! The adapter's products, its gate and its gradients.

kernels! {
    /// [A; R] to be split into two parts of bf16.
    struct SplitParams for adapter::[split] {
        /// [rows, 2 half]; half is the width, rounded up to a multiple of 128.
        out: *mut u16,
        /// [rows, width].
        x: *const f32,
        /// Rows.
        rows: u32,
        /// Columns.
        width: u32,
    }

    /// The adapter's first product and its gate.
    struct LoraDownParams for adapter::[lora_down] {
        /// [tokens, a_rows + lora_heads] = [lora_down | gate].
        adapter_state: *mut f32,
        /// The operand [tokens, lora_heads · rank] = scale · gate ∘ lora_down.
        mixed: *mut u16,
        /// Rows of x.
        tokens: u32,
        /// The operand x [tokens, d_in].
        x: *const u16,
        /// Columns of x.
        d_in: u32,
        /// [A; R] as `split` writes it.
        a: *const u16,
        /// Rows of [A; R].
        stacked_rows: u32,
        /// α / rank.
        scale: f32,
        /// Rows of A.
        a_rows: u32,
        /// Heads: the number of B's.
        lora_heads: u32,
        /// Rank of a head.
        rank: u32,
        /// Whether each head has an A of its own.
        per_head_a: u32,
        /// One of `sizes::GATE_*`.
        gate: u32,
        /// Each token's head under the label gate, [tokens].
        labels: *const u32,
        /// The router's logits are multiplied by it.
        inverse_temperature: f32,
        /// How many of a token's largest logits take part.
        top_k: u32,
        /// Seed of the dropout of `mixed`.
        head_seed: u64,
        /// Its p · 2¹⁶.
        head_threshold: u32,
        /// Its 1 / (1 − p).
        head_keep_scale: f32,
        /// Seed of the dropout of x.
        seed: u64,
        /// Its p · 2¹⁶.
        threshold: u32,
        /// Its 1 / (1 − p).
        keep_scale: f32,
    }

    /// The adapter's first product and its gate for a few tokens, without dropout. Fields are those of `lora_down`.
    struct LoraDownMatvecParams for lora_matvec::[lora_down_matvec] {
        /// [tokens, a_rows + lora_heads].
        adapter_state: *mut f32,
        /// The operand [tokens, lora_heads · rank].
        mixed: *mut u16,
        /// Rows of x.
        tokens: u32,
        /// The operand x [tokens, d_in].
        x: *const u16,
        /// Columns of x.
        d_in: u32,
        /// [A; R] itself, [stacked_rows, d_in].
        a: *const f32,
        /// Rows of [A; R].
        stacked_rows: u32,
        /// α / rank.
        scale: f32,
        /// Rows of A.
        a_rows: u32,
        /// Heads.
        lora_heads: u32,
        /// Rank of a head.
        rank: u32,
        /// Whether each head has an A of its own.
        per_head_a: u32,
        /// One of `sizes::GATE_*`.
        gate: u32,
        /// Each token's head under the label gate, [tokens].
        labels: *const u32,
        /// The router's logits are multiplied by it.
        inverse_temperature: f32,
        /// How many of a token's largest logits take part.
        top_k: u32,
    }

    /// The gradient of the load-balancing loss with respect to each token's gate.
    struct BalanceLossGradParams for gate::[balance_loss_grad] {
        /// [lora_heads]: the same for all tokens.
        out: *mut f32,
        /// [tokens, a_rows + lora_heads].
        adapter_state: *const f32,
        /// Tokens.
        tokens: u32,
        /// Rows of A.
        a_rows: u32,
        /// Heads.
        lora_heads: u32,
        /// The loss's coefficient · heads / tokens.
        scale: f32,
    }

    /// The gradient of everything between dY and [A; R]'s product.
    struct LoraUpBackwardParams for adapter::[lora_up_backward] {
        /// [tokens, a_rows + lora_heads] = [d lora_down | d logits].
        d_adapter_state: *mut f32,
        /// Its first stacked_rows columns as an operand.
        d_adapter_state_bf16: *mut u16,
        /// The same with zeros in A's columns, or null.
        d_router_bf16: *mut u16,
        /// The operand gate ∘ lora_down, [tokens, lora_heads · rank].
        mixed: *mut u16,
        /// Its gradient, [tokens, lora_heads · rank].
        d_mixed: *mut f32,
        /// Rows of dy.
        tokens: u32,
        /// The operand dy [tokens, d_out].
        dy: *const u16,
        /// Columns of dy.
        d_out: u32,
        /// B as an operand, [d_out, lora_heads · rank].
        b: *const u16,
        /// From the forward pass, [tokens, a_rows + lora_heads].
        adapter_state: *const f32,
        /// What the load-balancing loss adds to each token's d gate, [lora_heads]; or null.
        balance_loss_grad: *const f32,
        /// α / rank.
        scale: f32,
        /// Rows of [A; R].
        stacked_rows: u32,
        /// Rows of A.
        a_rows: u32,
        /// Heads.
        lora_heads: u32,
        /// Rank of a head.
        rank: u32,
        /// Whether each head has an A of its own.
        per_head_a: u32,
        /// One of `sizes::GATE_*`.
        gate: u32,
        /// The router's logits were multiplied by it.
        inverse_temperature: f32,
        /// Seed of the dropout of `mixed`.
        head_seed: u64,
        /// Its p · 2¹⁶.
        head_threshold: u32,
        /// Its 1 / (1 − p).
        head_keep_scale: f32,
    }

    /// A weight gradient of the adapter: out(c, j) += scale · Σ_t D(wide)(t, c) · narrow(t, j).
    struct WeightGradParams for adapter::[weight_grad] {
        /// Element (c, j) lies at c · c_stride + j · j_stride.
        out: *mut f32,
        /// See `out`.
        c_stride: u32,
        /// See `out`.
        j_stride: u32,
        /// What the sum goes over.
        tokens: u32,
        /// The operand x or dy, [tokens, columns].
        wide: *const u16,
        /// Columns of `wide`.
        columns: u32,
        /// The operand [tokens, rows].
        narrow: *const u16,
        /// Columns of `narrow`.
        rows: u32,
        /// Factor of the sum.
        scale: f32,
        /// Rows j < a_rows read `wide` after dropout.
        a_rows: u32,
        /// Seed of the dropout of `wide`.
        seed: u64,
        /// Its p · 2¹⁶.
        threshold: u32,
        /// Its 1 / (1 − p).
        keep_scale: f32,
        /// Tokens of one part of the sum, a multiple of 128.
        part_tokens: u32,
        /// [parts, columns, rows]: the parts' sums, if there is more than one.
        parts: *mut f32,
    }

    /// The end of a weight gradient in parts: out(c, j) += scale · Σ parts.
    struct WeightGradTotalParams for adapter::[weight_grad_total] {
        /// Element (c, j) lies at c · c_stride + j · j_stride.
        out: *mut f32,
        /// See `out`.
        c_stride: u32,
        /// See `out`.
        j_stride: u32,
        /// [count, columns, rows].
        parts: *const f32,
        /// Parts.
        count: u32,
        /// Columns of the wide operand.
        columns: u32,
        /// Columns of the narrow one.
        rows: u32,
        /// Factor of the sum.
        scale: f32,
    }

    /// The adapter's part of dx that went through dropout.
    struct DroppedDxParams for adapter::[dropped_dx] {
        /// [tokens, d_in], f32 or bf16, to which it is added.
        dx: *mut u8,
        /// Whether `dx` is bf16.
        bf16: u32,
        /// Rows of dx.
        tokens: u32,
        /// Columns of dx.
        d_in: u32,
        /// [tokens, state_width].
        d_adapter_state: *const f32,
        /// Columns of `d_adapter_state`.
        state_width: u32,
        /// A [a_rows, d_in].
        a: *const f32,
        /// Rows of A.
        a_rows: u32,
        /// Seed of the dropout of x.
        seed: u64,
        /// Its p · 2¹⁶.
        threshold: u32,
        /// Its 1 / (1 − p).
        keep_scale: f32,
    }
}
