//! A frozen matrix that owns the memory it lies in.

use crate::Result;
use bytes::Bytes;
use hydra_kernels::quant::{Format, RowOrder, Weight};

/// A frozen matrix in its storage format. It shares the mapped file or the memory it lies in and keeps that alive.
#[derive(Clone, Debug)]
pub struct StoredWeight {
    format: Format,
    rows: usize,
    cols: usize,
    order: RowOrder,
    data: Bytes,
}

impl StoredWeight {
    /// A matrix [rows, cols]. Fails as [`Weight::new`] does if `data` is not exactly such a matrix.
    pub fn new(format: Format, rows: usize, cols: usize, data: impl Into<Bytes>, order: RowOrder) -> Result<Self> {
        let data = data.into();
        Weight::new(format, rows, cols, &data, order)?;
        Ok(Self { format, rows, cols, order, data })
    }

    /// As the kernels read it.
    pub fn weight(&self) -> Weight<'_> {
        Weight::new(self.format, self.rows, self.cols, &self.data, self.order).expect("checked when it was made")
    }
}
