//! The sizes of one adapted linear layer, multiplied in one place.

use crate::error::{Error, product};

/// The sizes of a frozen W [d_out, d_in] and its adapter.
///
/// LoRA is `lora_heads: 1, router: false`; LoRA-Split (one LoRA per head) is `per_head_a: true, router: false`;
/// HydraLoRA is `per_head_a: false, router: true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HydraShape {
    /// Columns of x.
    pub d_in: usize,
    /// Columns of y.
    pub d_out: usize,
    /// Rank of each head.
    pub rank: usize,
    /// Number of heads (B matrices).
    pub lora_heads: usize,
    /// One A per head instead of one shared by all.
    pub per_head_a: bool,
    /// The stacked \[A; R\] ends with the router's `lora_heads` rows.
    pub router: bool,
}

impl HydraShape {
    /// A layer without an adapter: no head, rank 0. It is not [valid](Self::validate) as an adapter's shape.
    pub const fn frozen(d_in: usize, d_out: usize) -> Self {
        Self { d_in, d_out, rank: 0, lora_heads: 0, per_head_a: false, router: false }
    }

    /// Rows of A: `rank`, or `lora_heads · rank` with one A per head.
    pub const fn a_rows(&self) -> usize {
        if self.per_head_a { self.mixed_width() } else { self.rank }
    }

    /// Rows of the stacked \[A; R\].
    pub const fn stacked_rows(&self) -> usize {
        self.a_rows().saturating_add(if self.router { self.lora_heads } else { 0 })
    }

    /// Columns of the adapter's state, \[lora_down | gate\].
    pub const fn state_width(&self) -> usize {
        self.a_rows().saturating_add(self.lora_heads)
    }

    /// Columns of the mixed heads and of B: `lora_heads · rank`.
    pub const fn mixed_width(&self) -> usize {
        self.lora_heads.saturating_mul(self.rank)
    }

    /// An error if x or y has no column.
    pub(crate) fn check_columns(&self) -> Result<(), Error> {
        if self.d_in == 0 || self.d_out == 0 {
            return Err(Error::Shape("a layer has at least one column of x and one of y"));
        }
        Ok(())
    }

    /// An error if x or y has no column, if there is no head, if the rank is 0, or if a matrix of `tokens` rows or of
    /// parameters doesn't fit in the address space.
    pub fn validate(&self, tokens: usize) -> Result<(), Error> {
        self.check_columns()?;
        if self.lora_heads == 0 || self.rank == 0 {
            return Err(Error::Shape("an adapter has at least one head and rank 1"));
        }
        let widest = self.d_in.max(self.d_out).max(self.state_width()).max(self.mixed_width());
        let bytes = product(product(widest, tokens.max(widest))?, size_of::<f32>())?;
        if bytes > isize::MAX as usize { Err(Error::Overflow) } else { Ok(()) }
    }
}
