//! Products with frozen matrices, and what prepares their operands.

kernels! {
    /// A matrix to be rounded to a bf16 operand.
    struct OperandParams for rows::[operand] {
        /// The operand, [rows, width].
        out: *mut u16,
        /// Elements from a row of it to the next.
        pitch: u32,
        /// [rows, width], f32 or bf16.
        x: *const u8,
        /// Whether `x` is bf16.
        bf16: u32,
        /// Rows.
        rows: u32,
        /// Rows of `x`; those that follow are zero.
        x_rows: u32,
        /// Columns, without padding.
        width: u32,
    }

    /// A quantised matrix to be decoded to bf16.
    struct DecodeParams for rows::[decode] {
        /// [rows, columns].
        out: *mut u16,
        /// Elements from a row of it to the next.
        pitch: u32,
        /// One of `sizes::FORMAT_*`.
        format: u32,
        /// The quants.
        w: *const u8,
        /// The blocks' scales.
        scales: *const u8,
        /// Columns.
        columns: u32,
        /// Values / 8.
        chunks: u32,
    }

    /// A product with a frozen matrix, C = addend + A · B + A₂ · B₂. See `product.rs`.
    hopper wgmma::[wgmma_rows_bf16 wgmma_columns_bf16]
    struct ProductParams for gemm::[
        gemm_rows_bf16 gemm_rows_q8_0 gemm_rows_q4_0 gemm_rows_q4_1
        gemm_columns_bf16 gemm_columns_q8_0 gemm_columns_q4_0 gemm_columns_q4_1
    ] {
        /// C [m, n], f32 or bf16.
        c: *mut u8,
        /// Elements from a row of C, and of `addend`, to the next.
        c_pitch: u32,
        /// What is added to the products: null, C, or a matrix like C.
        addend: *const u8,
        /// Whether C and `addend` are bf16.
        bf16: u32,
        /// Rows of C.
        m: u32,
        /// Columns of C.
        n: u32,
        /// The operand A [m, k].
        a: *const u16,
        /// Elements from a row of A to the next.
        a_pitch: u32,
        /// Columns of A.
        k: u32,
        /// The frozen matrix: values or quants.
        w: *const u8,
        /// Scales of a block format.
        scales: *const u8,
        /// Elements from a row of the frozen matrix to the next.
        pitch: u32,
        /// The operand A₂ [m, k₂].
        a2: *const u16,
        /// Elements from a row of A₂ to the next.
        a2_pitch: u32,
        /// Columns of A₂; 0 for no second product.
        k2: u32,
        /// The operand B₂ [n, k₂] or [k₂, n].
        b2: *const u16,
        /// Elements from a row of B₂ to the next.
        b2_pitch: u32,
    }

    /// A product of a few tokens with a frozen matrix: y = addend + x Wᵀ + x₂ W₂ᵀ.
    struct MatvecParams for matvec::[matvec_bf16 matvec_q8_0 matvec_q4_0 matvec_q4_1] {
        /// y [tokens, rows], f32 or bf16.
        y: *mut u8,
        /// What is added to the products: null, y, or a matrix like y.
        addend: *const u8,
        /// Whether y and `addend` are bf16.
        bf16: u32,
        /// Elements from a row of y to the next.
        y_pitch: u32,
        /// Rows of x.
        tokens: u32,
        /// The operand x [tokens, columns].
        x: *const u16,
        /// Elements from a row of x to the next.
        x_pitch: u32,
        /// Columns of x and W.
        columns: u32,
        /// W: values or quants.
        w: *const u8,
        /// Scales of a block format.
        scales: *const u8,
        /// Elements from a row of W to the next.
        pitch: u32,
        /// Columns of y.
        rows: u32,
        /// The row of W for each column of y; null if they are W's rows in order.
        ids: *const u32,
        /// The operand x₂ [tokens, columns₂].
        x2: *const u16,
        /// Elements from a row of x₂ to the next.
        x2_pitch: u32,
        /// Columns of x₂ and W₂; 0 for no second product.
        columns2: u32,
        /// W₂ [rows, columns₂].
        w2: *const f32,
    }
}
