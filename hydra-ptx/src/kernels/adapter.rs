//! The adapter's products, its gate and its gradients.

kernels! {
    /// [A; R] whose rows `lora_down` can't load as they are.
    struct PadParams for lora_down::[pad] {
        /// [rows, padded]; padded is the width, rounded up to a multiple of 8.
        out: *mut f32,
        /// [rows, width].
        x: *const f32,
        /// Rows.
        rows: u32,
        /// Columns.
        width: u32,
    }

    /// The adapter's first product, its gate, and B as an operand.
    struct LoraDownParams for lora_down::[lora_down] {
        /// [tokens, a_rows + lora_heads] = [lora_down | gate].
        adapter_state: *mut f32,
        /// The operand [tokens, lora_heads · rank] = scale · gate ∘ lora_down.
        mixed: *mut u16,
        /// Elements from a row of `mixed` to the next.
        mixed_pitch: u32,
        /// Rows of x.
        tokens: u32,
        /// The operand x [tokens, d_in].
        x: *const u16,
        /// Elements from a row of x to the next.
        x_pitch: u32,
        /// Columns of x.
        d_in: u32,
        /// [A; R], or what `pad` made of it: rows of 16-byte aligned values, padded to a multiple of 8.
        a: *const f32,
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
        /// The router's logits, less the largest of them, are multiplied by it.
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
        /// B [d_out, lora_heads · rank].
        b: *const f32,
        /// The operand that it becomes.
        b_bf16: *mut u16,
        /// Elements from a row of it to the next.
        b_bf16_pitch: u32,
        /// Rows of B.
        d_out: u32,
    }

    /// The adapter's first product and its gate for a few tokens, without dropout. Fields are those of `lora_down`.
    struct LoraDownMatvecParams for lora_matvec::[lora_down_matvec] {
        /// [tokens, a_rows + lora_heads].
        adapter_state: *mut f32,
        /// The operand [tokens, lora_heads · rank].
        mixed: *mut u16,
        /// Elements from a row of `mixed` to the next.
        mixed_pitch: u32,
        /// Rows of x.
        tokens: u32,
        /// The operand x [tokens, d_in].
        x: *const u16,
        /// Elements from a row of x to the next.
        x_pitch: u32,
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
        /// The router's logits, less the largest of them, are multiplied by it.
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

    /// dy's two products, d_mixed = dy B and dB = dyᵀ mixed, in parts.
    struct LoraUpBackwardParams for adapter_backward::[lora_up_backward] {
        /// [d_out / 256, tokens, pitch]: d_mixed's parts, with the pitch of an operand of lora_heads · rank columns.
        d_mixed: *mut f32,
        /// [groups, d_out, pitch]: dB's parts; or null, if it isn't wanted.
        db: *mut f32,
        /// Rows of dy.
        tokens: u32,
        /// The operand dy [tokens, d_out].
        dy: *const u16,
        /// Elements from a row of dy to the next.
        dy_pitch: u32,
        /// Columns of dy.
        d_out: u32,
        /// B [d_out, lora_heads · rank].
        b: *const f32,
        /// From the forward pass, [tokens, a_rows + lora_heads].
        adapter_state: *const f32,
        /// Tokens of a group, a multiple of 32.
        group_tokens: u32,
        /// Rows of A.
        a_rows: u32,
        /// Heads: the number of B's.
        lora_heads: u32,
        /// Rank of a head.
        rank: u32,
        /// Whether each head has an A of its own.
        per_head_a: u32,
        /// Seed of the dropout of `mixed`.
        head_seed: u64,
        /// Its p · 2¹⁶.
        head_threshold: u32,
        /// Its 1 / (1 − p).
        head_keep_scale: f32,
    }

    /// The gate's gradient, and the end of dB.
    struct GateBackwardParams for gate_backward::[gate_backward] {
        /// [tokens, a_rows + lora_heads] = [d lora_down | d logits].
        d_adapter_state: *mut f32,
        /// Its first stacked_rows columns as an operand.
        d_adapter_state_bf16: *mut u16,
        /// Elements from a row of it to the next.
        d_adapter_state_pitch: u32,
        /// The same with zeros in A's columns, or null.
        d_router_bf16: *mut u16,
        /// Elements from a row of it to the next.
        d_router_pitch: u32,
        /// [d_mixed_count, tokens, pitch] of `lora_up_backward`; wide rows leave their sum in the first part.
        d_mixed: *mut f32,
        /// Parts of `d_mixed`.
        d_mixed_count: u32,
        /// [d_out, lora_heads · rank], to which it is added.
        db: *mut f32,
        /// [db_count, d_out, pitch] of `lora_up_backward`.
        db_parts: *const f32,
        /// Parts of dB.
        db_count: u32,
        /// Rows of B.
        d_out: u32,
        /// Tokens.
        tokens: u32,
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

    /// d[A; R]: out(j, c) += Σ_t narrow(t, j) · D(wide)(t, c).
    struct WeightGradParams for adapter_backward::[weight_grad] {
        /// [rows, columns].
        out: *mut f32,
        /// What the sum goes over.
        tokens: u32,
        /// The operand x [tokens, columns].
        wide: *const u16,
        /// Elements from a row of `wide` to the next.
        wide_pitch: u32,
        /// Columns of `wide`.
        columns: u32,
        /// The operand [tokens, rows].
        narrow: *const u16,
        /// Elements from a row of `narrow` to the next.
        narrow_pitch: u32,
        /// Columns of `narrow`.
        rows: u32,
        /// Rows j < a_rows read `wide` after dropout.
        a_rows: u32,
        /// Seed of the dropout of `wide`.
        seed: u64,
        /// Its p · 2¹⁶.
        threshold: u32,
        /// Its 1 / (1 − p).
        keep_scale: f32,
        /// Tokens of one part of the sum, a multiple of 32.
        part_tokens: u32,
        /// [parts, rows, pitch]: the parts' sums, if there is more than one; the pitch is that of `wide`.
        parts: *mut f32,
    }

    /// The end of a weight gradient in parts: out += Σ parts.
    struct WeightGradTotalParams for adapter_backward::[weight_grad_total] {
        /// [rows, columns].
        out: *mut f32,
        /// [count, rows, pitch].
        parts: *const f32,
        /// Parts.
        count: u32,
        /// Rows.
        rows: u32,
        /// Columns.
        columns: u32,
    }

    /// The adapter's part of dx that went through dropout.
    struct DroppedDxParams for dropped_dx::[dropped_dx] {
        /// [tokens, d_in], f32 or bf16, to which it is added.
        dx: *mut u8,
        /// Elements from a row of dx to the next.
        pitch: u32,
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
