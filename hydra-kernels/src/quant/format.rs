//! Storage formats of weights, and the order of their rows.

/// Columns that a block format decodes together.
pub const GROUP: usize = 32;

/// `$with!(name, bytes, groups, bits, minimum)` of a block format: the name that its functions have in the modules that
/// take blocks apart, the bytes and the groups of 32 columns of a block, the bits of an integer code (of the number that a
/// code stands for in IQ4_NL and IQ4_XS), and whether groups have a minimum.
macro_rules! by_block_format {
    ($format:expr, $with:ident) => {
        match $format {
            $crate::quant::Format::Q4_0 => $with!(q4_0, 18, 1, 4, false),
            $crate::quant::Format::Q4_1 => $with!(q4_1, 20, 1, 4, true),
            $crate::quant::Format::Q5_0 => $with!(q5_0, 22, 1, 5, false),
            $crate::quant::Format::Q5_1 => $with!(q5_1, 24, 1, 5, true),
            $crate::quant::Format::Q8_0 => $with!(q8_0, 34, 1, 8, false),
            $crate::quant::Format::Q2K => $with!(q2_k, 84, 8, 2, true),
            $crate::quant::Format::Q3K => $with!(q3_k, 110, 8, 3, false),
            $crate::quant::Format::Q4K => $with!(q4_k, 144, 8, 4, true),
            $crate::quant::Format::Q5K => $with!(q5_k, 176, 8, 5, true),
            $crate::quant::Format::Q6K => $with!(q6_k, 210, 8, 6, false),
            $crate::quant::Format::IQ4_NL => $with!(iq4_nl, 18, 1, 8, false),
            $crate::quant::Format::IQ4_XS => $with!(iq4_xs, 136, 8, 8, false),
            $crate::quant::Format::F32 | $crate::quant::Format::F16 | $crate::quant::Format::Bf16 => {
                unreachable!("expected a block format")
            }
        }
    };
}
pub(crate) use by_block_format;

/// How the elements of a weight are stored. The block formats are GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16, the upper half of an f32.
    Bf16,
    /// Blocks of 32: 4 bits each, one scale.
    Q4_0,
    /// Blocks of 32: 4 bits each, one scale and one minimum.
    Q4_1,
    /// Blocks of 32: 5 bits each, one scale.
    Q5_0,
    /// Blocks of 32: 5 bits each, one scale and one minimum.
    Q5_1,
    /// Blocks of 32: 8 bits each, one scale.
    Q8_0,
    /// Blocks of 256: 2 bits each, 4-bit scales and minima of 16 half groups.
    Q2K,
    /// Blocks of 256: 3 bits each, 6-bit scales of 16 half groups.
    Q3K,
    /// Blocks of 256: 4 bits each, 6-bit scales and minima of 8 groups.
    Q4K,
    /// Blocks of 256: 5 bits each, 6-bit scales and minima of 8 groups.
    Q5K,
    /// Blocks of 256: 6 bits each, 8-bit scales of 16 half groups.
    Q6K,
    /// Blocks of 32: 4 bits each, which stand for sixteen unevenly spaced numbers; one scale.
    IQ4_NL,
    /// Blocks of 256: 4 bits each, as in IQ4_NL; 6-bit scales of 8 groups.
    IQ4_XS,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 15] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::IQ4_NL,
        Format::IQ4_XS,
    ];

    /// Elements of a block; 1 for the plain formats.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 | Format::IQ4_NL => 32,
            Format::Q2K | Format::Q3K | Format::Q4K | Format::Q5K | Format::Q6K | Format::IQ4_XS => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q4_0 => 2 + 16,
            Format::Q4_1 => 4 + 16,
            Format::Q5_0 => 2 + 4 + 16,
            Format::Q5_1 => 4 + 4 + 16,
            Format::Q8_0 => 2 + 32,
            Format::Q2K => 16 + 64 + 4,
            Format::Q3K => 32 + 64 + 12 + 2,
            Format::Q4K => 4 + 12 + 128,
            Format::Q5K => 4 + 12 + 32 + 128,
            Format::Q6K => 128 + 64 + 16 + 2,
            Format::IQ4_NL => 2 + 16,
            Format::IQ4_XS => 2 + 2 + 4 + 128,
        }
    }

    /// The name that GGUF tools use.
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
            Format::Q2K => "Q2_K",
            Format::Q3K => "Q3_K",
            Format::Q4K => "Q4_K",
            Format::Q5K => "Q5_K",
            Format::Q6K => "Q6_K",
            Format::IQ4_NL => "IQ4_NL",
            Format::IQ4_XS => "IQ4_XS",
        }
    }

    /// Bytes of a row of `cols` elements; `None` if `cols` is not a whole number of blocks, or on overflow.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// A decoded segment may start at any multiple of this column.
    pub const fn first_col_multiple(self) -> usize {
        if self.block_len() == 1 { 1 } else { GROUP }
    }
}

/// The order of a weight's rows in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// Row i is stored as row i.
    Natural,
    /// llama.cpp's order for the q and k projections: within each head, row i of the first half is followed by row i of
    /// the second half, which puts rotary pairs side by side.
    Interleaved {
        /// Rows of a head, an even number.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that holds a logical row.
    ///
    /// # Panics
    /// If `head_dim` is less than 2.
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
