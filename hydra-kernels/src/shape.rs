//! The sizes of one adapted linear layer, multiplied in one place.

use crate::error::Error;

/// A frozen `W` [d_out, d_in] with its adapter, applied to `tokens` rows.
///
/// LoRA is `heads: 1, router: false`; LoRA-Split (one LoRA per head) is `per_head_a: true, router: false`;
/// HydraLoRA is `per_head_a: false, router: true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HydraShape {
    /// Rows of x.
    pub tokens: usize,
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
    /// The stacked A ends with the router's `lora_heads` rows.
    pub router: bool,
}

impl HydraShape {
    /// Rows of A: `rank`, or `heads · rank` with one A per head.
    pub const fn a_rows(&self) -> usize {
        if self.per_head_a { self.mixed() } else { self.rank }
    }

    /// Rows of the stacked `[A; R]`.
    pub const fn stacked_rows(&self) -> usize {
        self.a_rows().saturating_add(if self.router { self.lora_heads } else { 0 })
    }

    /// Columns of the saved state `[down | gate]`.
    pub const fn state_width(&self) -> usize {
        self.a_rows().saturating_add(self.lora_heads)
    }

    /// Columns of B: `heads · rank`.
    pub const fn mixed(&self) -> usize {
        self.lora_heads.saturating_mul(self.rank)
    }

    /// Refuses no heads, rank 0 and any shape one of whose matrices doesn't fit in the address space.
    pub fn validate(&self) -> Result<(), Error> {
        if self.lora_heads == 0 || self.rank == 0 {
            return Err(Error::Shape("an adapter has at least one head and rank 1"));
        }
        let widest = self.d_in.max(self.d_out).max(self.state_width()).max(self.mixed());
        let tallest = self.tokens.max(widest);
        let bytes = widest.checked_mul(tallest).and_then(|n| n.checked_mul(size_of::<f32>()));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(Error::Overflow);
        }
        Ok(())
    }
}
