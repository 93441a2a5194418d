//! A weight matrix over stored bytes: checked once, then decoded row by row.

use super::format::{Format, RowOrder};
use super::scalar;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
use super::simd;
use crate::error::{Error, exact, product};
use crate::isa::Isa;

/// A frozen matrix [rows, cols] in its stored format, borrowed at any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    /// From one row to the next, in bytes.
    stride: usize,
    /// It ends with the last row.
    data: &'a [u8],
    order: RowOrder,
}

impl<'a> Weight<'a> {
    /// A matrix over its stored bytes.
    ///
    /// Returns an error unless `data` is exactly the matrix, rows are whole blocks, and interleaved heads divide the
    /// rows.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8], order: RowOrder) -> Result<Self, Error> {
        if !cols.is_multiple_of(format.block_len()) {
            return Err(Error::Block { operand: "weight columns", block: format.block_len(), got: cols });
        }
        let row_bytes = format.row_bytes(cols).ok_or(Error::Overflow)?;
        exact("weight bytes", product(rows, row_bytes)?, data.len())?;
        if let RowOrder::Interleaved { head_dim } = order {
            if head_dim == 0 || !head_dim.is_multiple_of(2) {
                return Err(Error::Shape("an interleaved head needs an even, positive number of rows"));
            }
            if !rows.is_multiple_of(head_dim) {
                return Err(Error::Block { operand: "weight rows", block: head_dim, got: rows });
            }
        }
        Ok(Weight { format, rows, cols, row_bytes, stride: row_bytes, data, order })
    }

    /// A row-major f32 matrix.
    pub fn from_f32(rows: usize, cols: usize, data: &'a [f32]) -> Result<Self, Error> {
        exact("weight", product(rows, cols)?, data.len())?;
        Weight::new(Format::F32, rows, cols, bytemuck::cast_slice(data), RowOrder::Natural)
    }

    /// Rows `first .. first + rows` as a weight of their own.
    ///
    /// Returns an error if the rows do not exist or are interleaved.
    pub fn slice_rows(&self, first: usize, rows: usize) -> Result<Self, Error> {
        if self.order != RowOrder::Natural {
            return Err(Error::Shape("interleaved rows cannot be sliced"));
        }
        let end = first.saturating_add(rows);
        if end > self.rows {
            return Err(Error::Range { operand: "rows", limit: self.rows, got: end });
        }
        let data = match rows {
            0 => &[],
            _ => &self.data[first * self.stride..(end - 1) * self.stride + self.row_bytes],
        };
        Ok(Self { rows, data, ..*self })
    }

    /// Columns `first .. first + cols` as a weight of their own.
    ///
    /// Returns an error if the columns do not exist or are not whole blocks.
    pub fn slice_columns(&self, first: usize, cols: usize) -> Result<Self, Error> {
        let end = first.saturating_add(cols);
        if end > self.cols {
            return Err(Error::Range { operand: "columns", limit: self.cols, got: end });
        }
        let bytes = |columns| {
            let block = Error::Block { operand: "columns", block: self.format.block_len(), got: columns };
            self.format.row_bytes(columns).filter(|_| columns.is_multiple_of(self.format.block_len())).ok_or(block)
        };
        let (offset, row_bytes) = (bytes(first)?, bytes(cols)?);
        let data = match self.rows {
            0 => &[],
            rows => &self.data[offset..(rows - 1) * self.stride + offset + row_bytes],
        };
        Ok(Self { cols, row_bytes, data, ..*self })
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Decodes the segment of row `row` that starts at column `first_col` into `out`.
    ///
    /// # Panics
    /// If the segment is not inside the matrix, or starts off a multiple of 32 in a block format.
    pub fn decode_row(&self, isa: Isa, row: usize, first_col: usize, out: &mut [f32]) {
        let this = *self;
        isa.vectorize(
            #[inline(always)]
            || this.decode_with(isa, row, first_col, out),
        );
    }

    /// [`Self::decode_row`], to be inlined into a caller that is vectorized with `isa`.
    #[inline(always)]
    pub(crate) fn decode_with(&self, isa: Isa, row: usize, first_col: usize, out: &mut [f32]) {
        assert!(row < self.rows && first_col <= self.cols && out.len() <= self.cols - first_col);
        let done = match isa {
            Isa::Portable => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => simd::decode(isa, self.format, self.stored(row), first_col, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => simd::decode(isa, self.format, self.stored(row), first_col, out),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(isa) => simd::decode(isa, self.format, self.stored(row), first_col, out),
        };
        if !done {
            self.decode(row, first_col, out);
        }
    }

    /// [`Self::decode_row`] in plain Rust, to be inlined into a caller that is vectorized with any instruction set.
    #[inline(always)]
    pub(crate) fn decode(&self, row: usize, first_col: usize, out: &mut [f32]) {
        assert!(row < self.rows && first_col <= self.cols && out.len() <= self.cols - first_col);
        assert!(first_col.is_multiple_of(self.format.first_col_multiple()));
        scalar::decode(self.format, self.stored(row), first_col, out);
    }

    /// The stored bytes of a logical row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn stored(&self, row: usize) -> &'a [u8] {
        let start = self.order.stored_row(row) * self.stride;
        &self.data[start..start + self.row_bytes]
    }
}
