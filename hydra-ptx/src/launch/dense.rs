//! Products with a frozen matrix.

use super::*;

/// Which side of W is summed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// C [m, rows] = A Wᵀ: the forward pass.
    Rows,
    /// C [m, columns] = A W: the backward pass.
    Columns,
}

/// Whether a matrix of so many rows and columns has enough of the largest tiles to keep a large device busy.
pub fn is_large(rows: usize, columns: usize) -> bool {
    rows.div_ceil(WGMMA_M as usize) * columns.div_ceil(WGMMA_N as usize) >= WGMMA_LEAST_TILES as usize
}

/// A second product that is added to the first: A₂ [m, k] times B, [n, k] or [k, n] as the form says. Both bf16, padded.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    /// A₂.
    pub a: Ptr,
    /// What is summed over.
    pub k: u32,
    /// B.
    pub b: Ptr,
}

/// `c` [m, n] = `before` + `a` (an operand [m, k]) · W, and the second product.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// C.
    pub c: Values,
    /// What is added to, of c's kind: null, c or something else.
    pub before: Ptr,
    /// Rows of C.
    pub m: u32,
    /// Which side of W is summed over.
    pub form: Form,
    /// A.
    pub a: Ptr,
    /// W.
    pub w: &'a Matrix,
    /// The second product, which is added.
    pub second: Option<Second>,
}

impl Product<'_> {
    /// n, the columns of C, and k.
    pub fn sizes(&self) -> (u32, u32) {
        match self.form {
            Form::Rows => (self.w.rows, self.w.columns),
            Form::Columns => (self.w.columns, self.w.rows),
        }
    }

    /// Whether C has no elements.
    pub fn is_empty(&self) -> bool {
        self.m == 0 || self.sizes().0 == 0
    }

    /// Whether it is of bf16 alone, and keeps a large device busy with the largest tiles.
    pub fn is_large(&self) -> bool {
        self.w.format == Format::Bf16 && is_large(self.m as usize, self.sizes().0 as usize)
    }

    /// For what multiplies two matrices and no more: a launch that writes the second product to C, with `before` added, and the
    /// first product, to be added to that. Without a second one, no launch and the product itself.
    pub fn apart(&self) -> (Option<Launch>, Self) {
        let Some(Second { a, k, b }) = self.second else { return (None, *self) };
        let (rows, columns) = match self.form {
            Form::Rows => (self.w.rows, k),
            Form::Columns => (k, self.w.columns),
        };
        let w = &Matrix { format: Format::Bf16, data: b, scales: Ptr::NULL, rows, columns };
        let first = gemm(Instructions::Mma, &Product { a, w, second: None, ..*self });
        (Some(first), Self { before: self.c.at, second: None, ..*self })
    }
}

/// Matrix instructions of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// `mma.sync`: compute capability 8.0 and later.
    Mma,
    /// `wgmma`: 9.0 alone, from the module [`crate::HOPPER_PTX`].
    Wgmma,
}

impl Instructions {
    /// What is fastest for a product on a device that has these.
    pub fn best_for(self, product: &Product<'_>) -> Self {
        if product.is_large() { self } else { Instructions::Mma }
    }
}

/// A product with these instructions; `wgmma` multiplies bf16 alone.
pub fn gemm(by: Instructions, product: &Product<'_>) -> Launch {
    use Instructions::{Mma, Wgmma};
    let &Product { c, before, m, form, a, w, second } = product;
    let entry = match (by, form, w.format) {
        (Mma, Form::Rows, Format::Bf16) => "gemm_rows_bf16",
        (Mma, Form::Rows, Format::Q8_0) => "gemm_rows_q8_0",
        (Mma, Form::Rows, Format::Q4_0) => "gemm_rows_q4_0",
        (Mma, Form::Rows, Format::Q4_1) => "gemm_rows_q4_1",
        (Mma, Form::Columns, Format::Bf16) => "gemm_columns_bf16",
        (Mma, Form::Columns, Format::Q8_0) => "gemm_columns_q8_0",
        (Mma, Form::Columns, Format::Q4_0) => "gemm_columns_q4_0",
        (Mma, Form::Columns, Format::Q4_1) => "gemm_columns_q4_1",
        (Wgmma, Form::Rows, Format::Bf16) => "wgmma_rows_bf16",
        (Wgmma, Form::Columns, Format::Bf16) => "wgmma_columns_bf16",
        (Wgmma, ..) => panic!("wgmma on a matrix in {:?}; it multiplies bf16 alone", w.format),
    };
    let (n, k) = product.sizes();
    let Second { a: a2, k: k2, b: b2 } = second.unwrap_or(Second { a: Ptr::NULL, k: 0, b: Ptr::NULL });
    let pitch2 = match form {
        Form::Rows => padded(k2),
        Form::Columns => padded(n),
    };
    let (grid, shared) = match by {
        Mma => ([n.div_ceil(GEMM_N), m.div_ceil(GEMM_M)], GEMM_SHARED),
        Wgmma => ([n.div_ceil(WGMMA_N), m.div_ceil(WGMMA_M)], WGMMA_SHARED),
    };
    launch!(entry, grid, shared, c.at, before, c.bf16, m, n, a, k, w.data, w.scales, w.pitch(), a2, k2, b2, pitch2)
}

/// How a matrix-vector product writes.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// y.
    pub y: Values,
    /// Elements from a row of y to the next.
    pub pitch: u32,
    /// What is added to, of y's kind and pitch: null, y or something else.
    pub before: Ptr,
}

/// What is added to a matrix-vector product: x₂ (an operand) [tokens, columns] · Wᵀ₂, W₂ [rows, columns] in f32.
#[derive(Clone, Copy, Debug)]
pub struct More {
    /// x₂.
    pub x: Ptr,
    /// W₂.
    pub w: Ptr,
    /// Columns of both.
    pub columns: u32,
}

/// y [tokens, rows] = before + x (an operand) · Wᵀ + what is more, with f32 sums. With `ids` (their address and number), the rows
/// are those.
pub fn matvec(output: Output, tokens: u32, x: Ptr, w: &Matrix, ids: Option<(Ptr, u32)>, more: Option<More>) -> Launch {
    let entry = match w.format {
        Format::Bf16 => "matvec_bf16",
        Format::Q8_0 => "matvec_q8_0",
        Format::Q4_0 => "matvec_q4_0",
        Format::Q4_1 => "matvec_q4_1",
    };
    let (ids, rows) = ids.unwrap_or((Ptr::NULL, w.rows));
    let More { x: x2, w: w2, columns: columns2 } = more.unwrap_or(More { x: Ptr::NULL, w: Ptr::NULL, columns: 0 });
    let grid = [rows.div_ceil(THREADS / 32), tokens.div_ceil(FEW_TOKENS)];
    let Output { y, pitch: y_pitch, before } = output;
    launch!(
        entry,
        grid,
        0,
        y.at,
        before,
        y.bf16,
        y_pitch,
        tokens,
        x,
        w.columns,
        w.data,
        w.scales,
        w.pitch(),
        rows,
        ids,
        x2,
        columns2,
        w2
    )
}

/// `out` = `w`, a matrix in blocks, as one in bf16.
pub fn decode(out: Ptr, w: &Matrix) -> Launch {
    let chunks =
        u32::try_from(u64::from(w.rows) * u64::from(w.columns) / 8).expect("a matrix of less than 2^35 values");
    launch!("decode", [chunks.div_ceil(THREADS), 1], 0, out, w.format.code(), w.data, w.scales, chunks)
}

/// `out` [rows, padded width] = `x` [rows, width] as an operand.
pub fn operand(out: Ptr, x: Values, rows: u32, width: u32) -> Launch {
    let chunks = u64::from(rows) * u64::from(padded(width) / 8);
    launch!("operand", [blocks(chunks), 1], 0, out, x.at, x.bf16, rows, width)
}
