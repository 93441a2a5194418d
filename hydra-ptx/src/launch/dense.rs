//! Products with a frozen matrix.

use super::*;
use crate::kernels::dense::*;

/// Which side of W is summed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// C [m, rows] = A Wᵀ: the forward pass.
    Rows,
    /// C [m, columns] = A W: the backward pass.
    Columns,
}

/// Whether a matrix [rows, columns] has enough of the largest tiles to keep a large device busy.
pub fn is_large(rows: usize, columns: usize) -> bool {
    rows.div_ceil(WGMMA_M as usize) * columns.div_ceil(WGMMA_N as usize) >= WGMMA_MIN_TILES as usize
}

/// A product that is added to another one: A₂ [m, k] times B₂, [n, k] or [k, n] depending on the form. Where B₂ lies
/// below W, its rows are padded with zeros to a multiple of 8 ([`Matrix::below`]).
#[derive(Clone, Copy, Debug)]
pub struct SecondProduct {
    /// A₂.
    pub a: Operand,
    /// B₂.
    pub b: Operand,
}

/// C [m, n] = addend + A · W + A₂ · B₂, with the operand A [m, k] and a frozen matrix W.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// C.
    pub c: Values,
    /// Elements from a row of C to the next.
    pub c_pitch: u32,
    /// What is added to the products: null, C itself, or a matrix like C.
    pub addend: Ptr,
    /// Which side of W is summed over.
    pub form: Form,
    /// A.
    pub a: Operand,
    /// W.
    pub w: &'a Matrix,
    /// A₂ · B₂.
    pub second: Option<SecondProduct>,
}

impl Product<'_> {
    /// Rows of C.
    pub fn m(&self) -> u32 {
        self.a.rows
    }

    /// n, the columns of C, and k.
    pub fn sizes(&self) -> (u32, u32) {
        match self.form {
            Form::Rows => (self.w.rows, self.w.columns),
            Form::Columns => (self.w.columns, self.w.rows),
        }
    }

    /// Whether C has no elements.
    pub fn is_empty(&self) -> bool {
        self.m() == 0 || self.sizes().0 == 0
    }

    /// Whether W is bf16, and C has enough of the largest tiles to keep a large device busy.
    pub fn is_large(&self) -> bool {
        self.w.format == Format::Bf16 && is_large(self.m() as usize, self.sizes().0 as usize)
    }

    /// The product as one of two matrices, if A₂ lies behind the rows of A, and B₂ behind W: behind its rows
    /// ([`Form::Rows`]) or below it ([`Form::Columns`]). Then k is a multiple of 8, which is faster, because what pads
    /// the operands is zero.
    fn joined(&self, second: SecondProduct) -> Option<Matrix> {
        let (w, all) = (self.w, padded(self.a.columns) + padded(second.a.columns));
        let (b, joined) = match self.form {
            Form::Rows => (w.behind(second.b.columns), Matrix { columns: all, ..*w }),
            Form::Columns => (w.below(second.b.rows), Matrix { rows: all, ..*w }),
        };
        let lie_so = self.a.behind(second.a.columns) == Some(second.a) && b == Some(second.b);
        lie_so.then_some(joined)
    }

    /// The product for a library that multiplies two matrices, `multiply`: the two products as one where they lie so,
    /// else a launch that writes addend + A₂ · B₂ to C, and the product A · W that is added to it.
    pub fn apart<T>(&self, multiply: impl FnOnce(Option<Launch>, Product<'_>) -> T) -> T {
        let Some(second) = self.second else { return multiply(None, *self) };
        if let Some(w) = &self.joined(second) {
            let columns = padded(self.a.columns) + padded(second.a.columns);
            return multiply(None, Product { a: Operand { columns, ..self.a }, w, second: None, ..*self });
        }
        let w = &Matrix::bf16(second.b);
        let first = gemm(Instructions::Mma, &Product { a: second.a, w, second: None, ..*self });
        multiply(Some(first), Self { addend: self.c.at, second: None, ..*self })
    }
}

/// A device's matrix instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// `mma.sync`: compute capability 8.0 and later.
    Mma,
    /// `wgmma`: 9.0 alone, from the module [`crate::HOPPER_PTX`].
    Wgmma,
}

impl Instructions {
    /// The fastest instructions for a product on a device that has these.
    pub fn best_for(self, product: &Product<'_>) -> Self {
        if product.is_large() { self } else { Instructions::Mma }
    }
}

/// The kernel for a form and a format.
fn gemm_entry(by: Instructions, form: Form, format: Format) -> &'static str {
    use Instructions::{Mma, Wgmma};
    match (by, form, format) {
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
        (Wgmma, ..) => panic!("wgmma on a matrix in {format:?}; it multiplies bf16 alone"),
    }
}

/// A product with these instructions; `wgmma` multiplies bf16 alone.
pub fn gemm(by: Instructions, product: &Product<'_>) -> Launch {
    use Instructions::{Mma, Wgmma};
    let &Product { c, c_pitch, addend, form, a, w, second } = product;
    let entry = gemm_entry(by, form, w.format);
    let ((n, k), m) = (product.sizes(), a.rows);
    let no_second = SecondProduct { a: Operand::NONE, b: Operand::NONE };
    let SecondProduct { a: a2, b: b2 } = second.unwrap_or(no_second);
    let (grid, shared) = match by {
        Mma => ([n.div_ceil(GEMM_N), m.div_ceil(GEMM_M)], GEMM_SHARED),
        Wgmma => ([n.div_ceil(WGMMA_N), m.div_ceil(WGMMA_M)], WGMMA_SHARED),
    };
    let params = ProductParams {
        c: c.at,
        c_pitch,
        addend,
        bf16: c.bf16.into(),
        m,
        n,
        a: a.at,
        a_pitch: a.pitch,
        k,
        w: w.data,
        scales: w.scales,
        pitch: w.pitch,
        a2: a2.at,
        a2_pitch: a2.pitch,
        k2: a2.columns,
        b2: b2.at,
        b2_pitch: b2.pitch,
    };
    Launch::new(entry, grid, shared, params.args())
}

/// What a matrix-vector product writes.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// y.
    pub y: Values,
    /// Elements from a row of y to the next.
    pub pitch: u32,
    /// What is added to the products: null, y itself, or a matrix like y.
    pub addend: Ptr,
}

/// The rows of a frozen matrix that a matrix-vector product uses.
#[derive(Clone, Copy, Debug)]
pub enum MatrixRows {
    /// All rows, in order.
    All,
    /// These ones.
    Ids {
        /// Their numbers, `[count]`.
        at: Ptr,
        /// How many there are.
        count: u32,
    },
}

/// A product that is added to a matrix-vector product: the operand x₂ [tokens, columns] times W₂ᵀ, W₂ [rows, columns]
/// in f32.
#[derive(Clone, Copy, Debug)]
pub struct SecondMatvec {
    /// x₂.
    pub x: Operand,
    /// W₂.
    pub w: Ptr,
}

/// The most tokens of a [`matvec`].
pub const MOST_MATVEC_TOKENS: u32 = MOST_BLOCKS_Y * MATVEC_TOKENS;

/// y [tokens, rows] = addend + x Wᵀ + x₂ W₂ᵀ for at most [`MOST_MATVEC_TOKENS`] and the operand x [tokens, columns], with f32 sums.
pub fn matvec(output: Output, x: Operand, w: &Matrix, rows: MatrixRows, second: Option<SecondMatvec>) -> Launch {
    let entry = match w.format {
        Format::Bf16 => "matvec_bf16",
        Format::Q8_0 => "matvec_q8_0",
        Format::Q4_0 => "matvec_q4_0",
        Format::Q4_1 => "matvec_q4_1",
    };
    let Output { y: Values { at: y, bf16 }, pitch: y_pitch, addend } = output;
    let Operand { at: x, rows: tokens, columns, pitch: x_pitch } = x;
    let (ids, rows) = match rows {
        MatrixRows::All => (Ptr::NULL, w.rows),
        MatrixRows::Ids { at, count } => (at, count),
    };
    let no_second = SecondMatvec { x: Operand::NONE, w: Ptr::NULL };
    let SecondMatvec { x: x2, w: w2 } = second.unwrap_or(no_second);
    let params = MatvecParams {
        y,
        addend,
        bf16: bf16.into(),
        y_pitch,
        tokens,
        x,
        x_pitch,
        columns,
        w: w.data,
        scales: w.scales,
        pitch: w.pitch,
        rows,
        ids,
        x2: x2.at,
        x2_pitch: x2.pitch,
        columns2: x2.columns,
        w2,
    };
    Launch::new(entry, [rows.div_ceil(THREADS / 32), tokens.div_ceil(MATVEC_TOKENS)], 0, params.args())
}

/// `out` = the quantised matrix `w`, of the same size.
pub fn decode(out: Operand, w: &Matrix) -> Launch {
    let values = u64::from(w.rows) * u64::from(w.columns);
    let chunks = u32::try_from(values / 8).expect("a matrix of less than 2^35 values");
    let Operand { at: out, pitch, columns, .. } = out;
    let params = DecodeParams { out, pitch, format: w.format.code(), w: w.data, scales: w.scales, columns, chunks };
    Launch::new("decode", [chunks.div_ceil(THREADS), 1], 0, params.args())
}

/// `out` = `x` [x_rows, columns] as an operand; its further rows are zero.
pub fn operand(out: Operand, x: Values, x_rows: u32) -> Launch {
    let Operand { at: out, rows, columns: width, pitch } = out;
    let chunks = u64::from(rows) * u64::from(padded(width) / 8);
    let params = OperandParams { out, pitch, x: x.at, bf16: x.bf16.into(), rows, x_rows, width };
    Launch::new("operand", [blocks(chunks), 1], 0, params.args())
}
