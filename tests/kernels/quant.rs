//! Block formats against what PyPI's `gguf` decodes (blocks/make.py), plain formats against `half`.

use crate::support::{TestElement, isas};
use half::{bf16, f16};
use hydra_kernels::{Format, RowOrder, Weight, to_bf16};

macro_rules! fixture {
    ($format:expr, $name:literal) => {
        ($format, include_bytes!(concat!("blocks/", $name, ".bin")), include_bytes!(concat!("blocks/", $name, ".f32")))
    };
}

const FIXTURES: [(Format, &[u8], &[u8]); 12] = {
    const fn erase<'a, const A: usize, const B: usize>(
        (format, blocks, decoded): (Format, &'a [u8; A], &'a [u8; B]),
    ) -> (Format, &'a [u8], &'a [u8]) {
        (format, blocks, decoded)
    }
    [
        erase(fixture!(Format::Q4_0, "Q4_0")),
        erase(fixture!(Format::Q4_1, "Q4_1")),
        erase(fixture!(Format::Q5_0, "Q5_0")),
        erase(fixture!(Format::Q5_1, "Q5_1")),
        erase(fixture!(Format::Q8_0, "Q8_0")),
        erase(fixture!(Format::Q2K, "Q2_K")),
        erase(fixture!(Format::Q3K, "Q3_K")),
        erase(fixture!(Format::Q4K, "Q4_K")),
        erase(fixture!(Format::Q5K, "Q5_K")),
        erase(fixture!(Format::Q6K, "Q6_K")),
        erase(fixture!(Format::IQ4_NL, "IQ4_NL")),
        erase(fixture!(Format::IQ4_XS, "IQ4_XS")),
    ]
};

/// `count` blocks with moderate scales: the fixtures' in turn, or small numbers in plain formats.
pub fn blocks(format: Format, count: usize) -> Vec<u8> {
    if let Some((_, blocks, _)) = FIXTURES.iter().find(|fixture| fixture.0 == format) {
        return blocks.iter().copied().cycle().take(count * format.block_bytes()).collect();
    }
    let values = crate::support::values(count, 3);
    values
        .into_iter()
        .flat_map(|x| match format {
            Format::F32 => x.to_le_bytes().to_vec(),
            Format::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
            _ => bf16::from_f32(x).to_le_bytes().to_vec(),
        })
        .collect()
}

#[test]
fn blocks_decode_as_ggml_does() {
    for (format, blocks, decoded) in FIXTURES {
        let want: Vec<f32> = decoded.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let cols = want.len();
        assert_eq!(format.row_bytes(cols), Some(blocks.len()), "{}", format.name());
        // At an odd address, too.
        let shifted: Vec<u8> = [0].iter().chain(blocks).copied().collect();
        for data in [blocks, &shifted[1..]] {
            let weight = Weight::new(format, 1, cols, data, RowOrder::Natural).unwrap();
            for isa in isas() {
                for first in (0..cols).step_by(32) {
                    for len in [0, 1, 31, 32, 33, cols - first] {
                        let len = len.min(cols - first);
                        let mut got = vec![f32::NAN; len];
                        weight.decode_row(isa, 0, first, &mut got);
                        assert_eq!(got, want[first..first + len], "{} {isa:?}", format.name());
                    }
                }
            }
        }
    }
}

#[test]
fn plain_formats_decode_every_value() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = all.iter().flat_map(|x| x.to_le_bytes()).collect();
    for isa in isas() {
        for (format, widen) in [
            (Format::F16, (|x| f16::from_bits(x).to_f32()) as fn(u16) -> f32),
            (Format::Bf16, |x| bf16::from_bits(x).to_f32()),
        ] {
            let weight = Weight::new(format, 1, all.len(), &bytes, RowOrder::Natural).unwrap();
            let mut got = vec![0.0; all.len() - 3];
            weight.decode_row(isa, 0, 3, &mut got);
            for (&bits, got) in all[3..].iter().zip(got) {
                let want = widen(bits);
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(same, "{} {bits:#x}: expected {want}, found {got}", format.name());
            }
        }
    }
}

#[test]
fn narrowing_rounds_to_even() {
    let mut x: Vec<f32> = (0..=u16::MAX)
        .flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
        .collect();
    x.push(f32::MAX);
    for isa in bf16::isas() {
        let mut got = vec![bf16::ZERO; x.len()];
        to_bf16(isa, &mut got, &x).unwrap();
        for (&x, got) in x.iter().zip(got) {
            // VCVTNE2PS2BF16 takes subnormals for zeros.
            let flushed = x.is_subnormal() && matches!(isa.name(), "avx512bf16" | "amxbf16");
            let want = bf16::from_f32(if flushed { 0.0f32.copysign(x) } else { x });
            assert!(got.to_bits() == want.to_bits() || (x.is_nan() && got.is_nan()), "{isa:?} {x}: {got}");
        }
    }
}

#[test]
fn interleaved_rows() {
    // A head of six is stored as rows 0 3 1 4 2 5.
    let order = RowOrder::Interleaved { head_dim: 6 };
    let stored: Vec<usize> = (0..12).map(|row| order.stored_row(row)).collect();
    assert_eq!(stored, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
}
