//! How values and weights are stored.

use crate::error::{Result, invalid};
use half::bf16;
use hydra_runtime::hydra_kernels::{Format, Scratch};

/// How values are stored. The numbers are those of ggml_type.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_type {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// Blocks of 32 values of 4 bits, with a scale.
    Q4_0 = 2,
    /// Blocks of 32 values of 4 bits, with a scale and a minimum.
    Q4_1 = 3,
    /// Blocks of 32 values of 5 bits, with a scale.
    Q5_0 = 6,
    /// Blocks of 32 values of 5 bits, with a scale and a minimum.
    Q5_1 = 7,
    /// Blocks of 32 values of 8 bits, with a scale.
    Q8_0 = 8,
    /// Blocks of 256 values of 2 bits.
    Q2_K = 10,
    /// Blocks of 256 values of 3 bits.
    Q3_K = 11,
    /// Blocks of 256 values of 4 bits.
    Q4_K = 12,
    /// Blocks of 256 values of 5 bits.
    Q5_K = 13,
    /// Blocks of 256 values of 6 bits.
    Q6_K = 14,
    /// Blocks of 32 values of 4 bits on an uneven scale, with a scale.
    IQ4_NL = 20,
    /// Blocks of 256 values of 4 bits on an uneven scale.
    IQ4_XS = 23,
    /// bfloat16.
    Bf16 = 30,
}

pub(super) const FORMATS: [(hydra_type, Format); 15] = [
    (hydra_type::F32, Format::F32),
    (hydra_type::F16, Format::F16),
    (hydra_type::Q4_0, Format::Q4_0),
    (hydra_type::Q4_1, Format::Q4_1),
    (hydra_type::Q5_0, Format::Q5_0),
    (hydra_type::Q5_1, Format::Q5_1),
    (hydra_type::Q8_0, Format::Q8_0),
    (hydra_type::Q2_K, Format::Q2K),
    (hydra_type::Q3_K, Format::Q3K),
    (hydra_type::Q4_K, Format::Q4K),
    (hydra_type::Q5_K, Format::Q5K),
    (hydra_type::Q6_K, Format::Q6K),
    (hydra_type::IQ4_NL, Format::IQ4_NL),
    (hydra_type::IQ4_XS, Format::IQ4_XS),
    (hydra_type::Bf16, Format::Bf16),
];

pub(super) fn format(number: i32) -> Result<Format> {
    let found = FORMATS.iter().find(|(name, _)| *name as i32 == number);
    found.map(|&(_, format)| format).ok_or_else(|| invalid(format!("weight_type: {number} is no hydra_type")))
}

/// f32 or bf16.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Plain {
    F32,
    Bf16,
}

pub(super) fn plain(what: &str, number: i32) -> Result<Plain> {
    match number {
        n if n == hydra_type::F32 as i32 => Ok(Plain::F32),
        n if n == hydra_type::Bf16 as i32 => Ok(Plain::Bf16),
        n => Err(invalid(format!("{what}: expected HYDRA_TYPE_F32 or HYDRA_TYPE_BF16, found {n}"))),
    }
}

pub(super) fn bytes(plain: Plain) -> usize {
    match plain {
        Plain::F32 => 4,
        Plain::Bf16 => 2,
    }
}

/// Floats of a thread's part of a matrix of `rows` rows.
pub(super) fn part_scratch(plain: Plain, rows: usize, columns: usize) -> Scratch {
    match plain {
        Plain::F32 => Scratch::lines::<f32>(rows.saturating_mul(columns)),
        Plain::Bf16 => Scratch::lines::<bf16>(rows.saturating_mul(columns)),
    }
}

/// Calls `$pass::<E, T>(isa, ..)` with the types of a layer's products and of its values.
macro_rules! with_types {
    ($pass:ident, $layer:expr, $args:expr, $thread:expr) => {
        match (plain("product_type", $layer.product_type)?, plain("element", $args.element)?) {
            (Plain::F32, Plain::F32) => $pass::<f32, f32>(Isa::detect(), $layer, $args, $thread),
            (Plain::F32, Plain::Bf16) => $pass::<f32, bf16>(Isa::detect(), $layer, $args, $thread),
            (Plain::Bf16, Plain::F32) => $pass::<bf16, f32>(Bf16Isa::detect(), $layer, $args, $thread),
            (Plain::Bf16, Plain::Bf16) => $pass::<bf16, bf16>(Bf16Isa::detect(), $layer, $args, $thread),
        }
    };
}
