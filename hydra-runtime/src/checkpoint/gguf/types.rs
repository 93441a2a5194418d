//! The numbers by which GGUF names tensor types.

use hydra_kernels::quant::Format;

/// The format of a type number, or the name of one that isn't supported.
pub(super) fn format(number: u32) -> Result<Format, String> {
    Ok(match number {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        10 => Format::Q2K,
        11 => Format::Q3K,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        20 => Format::IQ4_NL,
        23 => Format::IQ4_XS,
        30 => Format::Bf16,
        _ => return Err(name(number).map_or_else(|| format!("number {number}"), str::to_owned)),
    })
}

/// The type number of a format.
pub(super) fn number(format: Format) -> u32 {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q5_0 => 6,
        Format::Q5_1 => 7,
        Format::Q8_0 => 8,
        Format::Q2K => 10,
        Format::Q3K => 11,
        Format::Q4K => 12,
        Format::Q5K => 13,
        Format::Q6K => 14,
        Format::IQ4_NL => 20,
        Format::IQ4_XS => 23,
        Format::Bf16 => 30,
    }
}

/// The number by which `general.file_type` says what most tensors are (llama.cpp's `llama_ftype`).
pub(super) fn file_type(format: Format) -> usize {
    match format {
        Format::F32 => 0,
        Format::F16 => 1,
        Format::Q4_0 => 2,
        Format::Q4_1 => 3,
        Format::Q8_0 => 7,
        Format::Q5_0 => 8,
        Format::Q5_1 => 9,
        Format::Q2K => 10,
        Format::Q3K => 11,
        Format::Q4K => 14,
        Format::Q5K => 16,
        Format::Q6K => 18,
        Format::IQ4_NL => 25,
        Format::IQ4_XS => 30,
        Format::Bf16 => 32,
    }
}

fn name(number: u32) -> Option<&'static str> {
    Some(match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_formats_go_together() {
        assert!(Format::ALL.into_iter().all(|one| format(number(one)) == Ok(one)));
    }
}
