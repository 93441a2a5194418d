//! Frozen weights in the format in which they came: plain f32, f16, bf16, and GGUF's block formats.
//!
//! Every block format decodes in groups of [`GROUP`] = 32 columns, `w = d·q − m` with a scale and a minimum per
//! group (or half a group), so [`Weight::decode_row`] may start at any multiple of 32. Decoding is exact: each element
//! is the f32 that ggml's own dequantisation gives, but for the sign of a zero.

mod blocks;

#[cfg(target_arch = "x86_64")]
pub(crate) use blocks::f16_to_f32;

use crate::error::{Error, exact, product};
use crate::isa::Isa;

/// Columns that are decoded together.
pub const GROUP: usize = 32;

/// How the elements of a weight are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Format {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 × 4 bits, a scale.
    Q4_0,
    /// 32 × 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 × 5 bits, a scale.
    Q5_0,
    /// 32 × 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 × 8 bits, a scale.
    Q8_0,
    /// 256 × 4 bits; 6-bit scales and minima of 8 groups.
    Q4K,
    /// 256 × 5 bits; 6-bit scales and minima of 8 groups.
    Q5K,
    /// 256 × 6 bits; 8-bit scales of 16 half groups.
    Q6K,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 11] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
    ];

    /// Elements in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q4K | Format::Q5K | Format::Q6K => 256,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q4_0 => 2 + 16,
            Format::Q4_1 => 4 + 16,
            Format::Q5_0 => 2 + 4 + 16,
            Format::Q5_1 => 4 + 4 + 16,
            Format::Q8_0 => 2 + 32,
            Format::Q4K => 4 + 12 + 128,
            Format::Q5K => 4 + 12 + 32 + 128,
            Format::Q6K => 128 + 64 + 16 + 2,
        }
    }

    /// The name that GGUF tools print.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::Bf16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q8_0 => "Q8_0",
            Format::Q4K => "Q4_K",
            Format::Q5K => "Q5_K",
            Format::Q6K => "Q6_K",
        }
    }

    /// Bytes of a row of `cols` elements; `None` if `cols` isn't a whole number of blocks, or on overflow.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Where a decoded segment may begin: any multiple of this.
    pub const fn first_col_multiple(self) -> usize {
        if self.block_len() == 1 { 1 } else { GROUP }
    }
}

/// How a weight's logical rows lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// One after the other.
    Natural,
    /// llama.cpp's order for q and k: within each head, row i of the first half is followed by row i of the second
    /// (rotary pairs side by side).
    Interleaved {
        /// Rows of a head; even.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where the logical row lies.
    ///
    /// # Panics
    /// If `head_dim` is 0.
    #[inline(always)]
    pub const fn stored_row(self, logical: usize) -> usize {
        match self {
            RowOrder::Natural => logical,
            RowOrder::Interleaved { head_dim } => {
                let within = logical % head_dim;
                let half = head_dim / 2;
                logical - within + (within % half) * 2 + within / half
            }
        }
    }
}

/// A matrix [rows, cols] that is read where it lies, at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
    order: RowOrder,
}

impl<'a> Weight<'a> {
    /// Checks that `data` is exactly the matrix, that rows are whole blocks and that interleaved heads divide them.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8], order: RowOrder) -> Result<Self, Error> {
        if !cols.is_multiple_of(format.block_len()) {
            return Err(Error::Block { operand: "weight columns", block: format.block_len(), got: cols });
        }
        let row_bytes = format.row_bytes(cols).ok_or(Error::Overflow)?;
        exact("weight bytes", product(rows, row_bytes)?, data.len())?;
        if let RowOrder::Interleaved { head_dim } = order {
            if head_dim == 0 || !head_dim.is_multiple_of(2) {
                return Err(Error::Shape("interleaved heads have an even number of rows"));
            }
            if !rows.is_multiple_of(head_dim) {
                return Err(Error::Block { operand: "weight rows", block: head_dim, got: rows });
            }
        }
        Ok(Weight { format, rows, cols, row_bytes, data, order })
    }

    /// A row-major f32 matrix.
    pub fn from_f32(rows: usize, cols: usize, data: &'a [f32]) -> Result<Self, Error> {
        exact("weight", product(rows, cols)?, data.len())?;
        Weight::new(Format::F32, rows, cols, bytemuck::cast_slice(data), RowOrder::Natural)
    }

    /// Rows `first .. first + rows` as a weight of their own, for work by blocks of rows. Refuses rows that are stored in
    /// another order.
    pub fn slice_rows(&self, first: usize, rows: usize) -> Result<Self, Error> {
        if self.order != RowOrder::Natural {
            return Err(Error::Shape("rows in another order can't be sliced"));
        }
        let end = first.saturating_add(rows);
        if end > self.rows {
            return Err(Error::Range { operand: "rows", limit: self.rows, got: end });
        }
        let data = &self.data[first * self.row_bytes..end * self.row_bytes];
        Ok(Self { rows, data, ..*self })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Writes `W[row, first_col ..][.. out.len()]` to `out`.
    ///
    /// # Panics
    /// If the segment is not inside the row, or begins off a multiple of 32 in a block format.
    pub fn decode_row(&self, isa: Isa, row: usize, first_col: usize, out: &mut [f32]) {
        let this = *self;
        isa.vectorize(
            #[inline(always)]
            || this.decode_with(isa, row, first_col, out),
        );
    }

    /// [`Self::decode_row`], to be inlined into a caller that is vectorised with `isa`.
    #[inline(always)]
    pub(crate) fn decode_with(&self, isa: Isa, row: usize, first_col: usize, out: &mut [f32]) {
        assert!(row < self.rows && first_col <= self.cols && out.len() <= self.cols - first_col);
        let done = match isa {
            Isa::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => crate::matvec::blocks::decode(isa, self.format, self.stored(row), first_col, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => crate::matvec::blocks::decode(isa, self.format, self.stored(row), first_col, out),
        };
        if !done {
            self.decode(row, first_col, out);
        }
    }

    /// [`Self::decode_row`] for any instruction set, to be inlined into a vectorised caller.
    #[inline(always)]
    pub(crate) fn decode(&self, row: usize, first_col: usize, out: &mut [f32]) {
        assert!(row < self.rows && first_col <= self.cols && out.len() <= self.cols - first_col);
        assert!(first_col.is_multiple_of(self.format.first_col_multiple()));
        blocks::decode(self.format, self.stored(row), first_col, out);
    }

    /// The bytes of a logical row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn stored(&self, row: usize) -> &'a [u8] {
        let start = self.order.stored_row(row) * self.row_bytes;
        &self.data[start..start + self.row_bytes]
    }
}
