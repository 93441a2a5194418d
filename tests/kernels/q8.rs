//! Products of activations in eight bits: against an f64 sum over the decoded row, and to the bit between instruction
//! sets, numbers of rows and ways to cut them.

use crate::support::{assert_within, bits, cases, tolerance, values};
use hydra_kernels::q8::{Block, blocks, product, product_scratch, quantize, serves};
use hydra_kernels::{Error, Format, Isa, Q8Isa, RowOrder, Weight, Workspace};
use proptest::prelude::*;
use std::ops::Range;

/// Every instruction set of the machine. Panics if the one that `HYDRA_REQUIRE_ISA` names is not among all of them.
fn isas() -> Vec<Q8Isa> {
    crate::support::isas();
    Q8Isa::available().collect()
}

fn quantized(cols: usize, x: &[f32]) -> Vec<Block> {
    let tokens = x.len().checked_div(cols).unwrap_or(0);
    let mut out = vec![Block::ZERO; tokens * blocks(cols)];
    quantize(Isa::Portable, &mut out, cols, x).unwrap();
    out
}

/// In exactly as much memory as is asked for, filled with NaN.
fn multiply(isa: Q8Isa, weight: Weight<'_>, rows: Range<usize>, x: &[Block], tokens: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; tokens * rows.len()];
    let mut memory = vec![f32::NAN; product_scratch(weight.cols()).0];
    product(isa, &mut y, weight, rows, x, &mut Workspace::new(&mut memory)).unwrap();
    y
}

fn formats() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|&format| serves(format))
}

/// Blocks of the given bytes, with f16 scales of 1 and minima of −1/2.
fn blocks_of(format: Format, count: usize, mut byte: impl FnMut() -> u8) -> Vec<u8> {
    let (scale, minimum): (&[usize], &[usize]) = match format {
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => (&[0], &[2]),
        Format::Q2K => (&[80], &[82]),
        Format::Q3K => (&[108], &[]),
        Format::Q6K => (&[208], &[]),
        _ => (&[0], &[]),
    };
    let mut bytes: Vec<u8> = (0..count * format.block_bytes()).map(|_| byte()).collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        scale.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&[0x00, 0x3c]));
        minimum.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&[0x00, 0xb8]));
    }
    bytes
}

/// The integers and the scale of a group.
fn group_of(x: &[f32]) -> (Vec<f64>, f64) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    if largest == 0.0 {
        return (vec![0.0; x.len()], 0.0);
    }
    let q = x.iter().map(|x| f64::from((x * (127.0 / largest)).round_ties_even())).collect();
    (q, f64::from(largest / 127.0))
}

/// Checks y [tokens, rows] against Σ d · q · w in f64.
fn check(weight: Weight<'_>, x: &[f32], y: &[f32]) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut w = vec![0.0; cols];
    for row in 0..rows {
        weight.decode_row(Isa::Portable, row, 0, &mut w);
        for (token, x) in x.chunks(cols).enumerate() {
            let (mut want, mut size) = (0.0, 0.0);
            for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                let (q, d) = group_of(x);
                want += d * q.iter().zip(w).map(|(q, &w)| q * f64::from(w)).sum::<f64>();
                // Codes times their scale, and the minimum, may be larger than the weights: 4 bounds it in the blocks here.
                let largest = w.iter().fold(0.0f64, |largest, &w| largest.max(f64::from(w).abs()));
                size += 4.0 * d * largest * q.iter().map(|q| q.abs()).sum::<f64>();
            }
            let what = || format!("{:?} row {row}, token {token}, {cols} columns", weight.format());
            assert_within(what, y[token * rows + row], want, tolerance::product(cols / 32) * size);
        }
    }
}

/// Tokens and rows at the tile's limits; row orders; the same bits on every instruction set, and however rows are cut.
#[test]
fn every_format_at_boundary_sizes() {
    for format in formats() {
        let block = format.block_len();
        for (rows, cols) in [(1, block), (15, 3 * block), (17, 9 * block), (64, 2 * block), (70, 8 * block)] {
            // At an odd address.
            let mut data = vec![0u8];
            data.extend(crate::quant::blocks(format, rows * cols / block));
            let weight = Weight::new(format, rows, cols, &data[1..], RowOrder::Natural).unwrap();
            for tokens in [1, 2, 3, 4, 5, 15, 16, 17, 33] {
                let x = values(tokens * cols, 21);
                let blocks = quantized(cols, &x);
                let wanted = multiply(Q8Isa::Portable, weight, 0..rows, &blocks, tokens);
                check(weight, &x, &wanted);
                for isa in isas() {
                    let what = || format!("{format:?} {isa:?} {rows}x{cols}, {tokens} tokens");
                    let y = multiply(isa, weight, 0..rows, &blocks, tokens);
                    assert_eq!(bits(&y), bits(&wanted), "{}", what());
                    let cut = rows / 3;
                    let (first, last) = (0..cut, cut..rows);
                    let pieces = [first, last].map(|rows| multiply(isa, weight, rows, &blocks, tokens));
                    for token in 0..tokens {
                        let got = [&pieces[0][token * cut..][..cut], &pieces[1][token * (rows - cut)..][..rows - cut]];
                        assert_eq!(bits(&got.concat()), bits(&wanted[token * rows..][..rows]), "{}, cut", what());
                        let alone = &blocks[token * blocks.len() / tokens..][..blocks.len() / tokens];
                        let alone = multiply(isa, weight, 0..rows, alone, 1);
                        assert_eq!(bits(&alone), bits(&wanted[token * rows..][..rows]), "{}, alone", what());
                    }
                }
            }
        }
    }
}

#[test]
fn rows_in_another_order() {
    for format in formats() {
        let (rows, cols) = (36, 2 * format.block_len());
        let data = crate::quant::blocks(format, rows * cols / format.block_len());
        let weight = Weight::new(format, rows, cols, &data, RowOrder::Interleaved { head_dim: 6 }).unwrap();
        let x = values(2 * cols, 22);
        for isa in isas() {
            let y = multiply(isa, weight, 0..rows, &quantized(cols, &x), 2);
            check(weight, &x, &y);
        }
    }
}

/// The largest codes with the largest activations: no sum of 16 bits may saturate. All results are exact.
#[test]
fn extreme_values() {
    for format in formats() {
        let (rows, cols) = (16, 3 * format.block_len());
        for byte in [0x00, 0x7f, 0x80, 0x81, 0xff] {
            let data = blocks_of(format, rows * cols / format.block_len(), || byte);
            let weight = Weight::new(format, rows, cols, &data, RowOrder::Natural).unwrap();
            let signs: [fn(usize) -> f32; 4] = [
                |_| 127.0,
                |_| -127.0,
                |i| if i % 2 == 0 { 127.0 } else { -127.0 },
                |i| if i % 8 < 4 { 127.0 } else { -127.0 },
            ];
            let x: Vec<f32> = signs.iter().flat_map(|sign| (0..cols).map(sign)).collect();
            for isa in isas() {
                let y = multiply(isa, weight, 0..rows, &quantized(cols, &x), signs.len());
                check(weight, &x, &y);
                for (token, y) in y.chunks(rows).enumerate() {
                    let alone = quantized(cols, &x[token * cols..][..cols]);
                    assert_eq!(multiply(isa, weight, 0..rows, &alone, 1), y, "{format:?} {isa:?} {byte}");
                }
            }
        }
    }
}

/// An x with a single 127 selects a weight.
#[test]
fn single_weights_are_the_decoded_ones() {
    let have_minima = [Format::Q4_1, Format::Q5_1, Format::Q2K, Format::Q4K, Format::Q5K];
    for format in formats().filter(|format| !have_minima.contains(format)) {
        let cols = 3 * format.block_len();
        let data = crate::quant::blocks(format, cols / format.block_len());
        let weight = Weight::new(format, 1, cols, &data, RowOrder::Natural).unwrap();
        let mut want = vec![0.0; cols];
        weight.decode_row(Isa::Portable, 0, 0, &mut want);
        for isa in isas() {
            for (column, &want) in want.iter().enumerate() {
                let mut x = vec![0.0; cols];
                x[column] = 127.0;
                let y = multiply(isa, weight, 0..1, &quantized(cols, &x), 1);
                assert_eq!(y, [127.0 * want], "{format:?} {isa:?} column {column}");
            }
        }
    }
}

/// A row with a NaN or an infinity gives NaN; the other rows are not touched. Tiny values count as zeros.
#[test]
fn values_that_are_not_finite() {
    for format in formats() {
        let (rows, cols) = (17, 2 * format.block_len());
        let data = crate::quant::blocks(format, rows * cols / format.block_len());
        let weight = Weight::new(format, rows, cols, &data, RowOrder::Natural).unwrap();
        let clean = values(3 * cols, 23);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[cols + 5] = bad;
            for isa in isas() {
                let want = multiply(isa, weight, 0..rows, &quantized(cols, &clean), 3);
                let got = multiply(isa, weight, 0..rows, &quantized(cols, &x), 3);
                assert!(got[rows..2 * rows].iter().all(|y| y.is_nan()), "{format:?} {isa:?} {bad}");
                for token in [0, 2] {
                    let range = token * rows..(token + 1) * rows;
                    assert_eq!(bits(&got[range.clone()]), bits(&want[range]), "{format:?} {isa:?} {bad}");
                }
                let alone = quantized(cols, &x[cols..2 * cols]);
                assert!(multiply(isa, weight, 0..rows, &alone, 1).iter().all(|y| y.is_nan()));
            }
        }
        for x in [0.0, -0.0, f32::MIN_POSITIVE, 1e-40, -1e-31] {
            for isa in isas() {
                for tokens in [1, 2] {
                    let x = quantized(cols, &vec![x; tokens * cols]);
                    let y = multiply(isa, weight, 0..rows, &x, tokens);
                    assert!(y.iter().all(|&y| y == 0.0), "{format:?} {isa:?}: {y:?}");
                }
            }
        }
    }
}

#[test]
fn quantizing_has_the_same_bits_everywhere() {
    let cols = 32 * 13;
    let mut x = values(3 * cols, 24);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= [1e-35, 1.0, 3e38][i / 32 % 3];
    }
    x[77] = f32::NAN;
    let want = quantized(cols, &x);
    for isa in crate::support::isas() {
        let mut got = vec![Block::ZERO; want.len()];
        quantize(isa, &mut got, cols, &x).unwrap();
        let bytes = |blocks: &[Block]| bytemuck::cast_slice::<Block, u8>(blocks).to_vec();
        assert!(bytes(&got) == bytes(&want), "{isa:?}");
    }
}

proptest! {
    #![proptest_config(cases(64))]

    /// Random codes and activations of any size: to the bit on every instruction set, and close to f64.
    #[test]
    fn random_shapes(
        format in prop::sample::select(formats().collect::<Vec<_>>()),
        rows in 1..40usize,
        blocks in 1..12usize,
        tokens in 1..20usize,
        seed in any::<u64>(),
    ) {
        let cols = blocks * format.block_len();
        let mut random = hydra_kernels::random::SplitMix64::new(seed);
        let data = blocks_of(format, rows * blocks, || random.next_u64() as u8);
        let weight = Weight::new(format, rows, cols, &data, RowOrder::Natural).unwrap();
        let x: Vec<f32> = (0..tokens * cols).map(|_| (4.0 * random.uniform() - 2.0) as f32).collect();
        let quantized = quantized(cols, &x);
        let want = multiply(Q8Isa::Portable, weight, 0..rows, &quantized, tokens);
        check(weight, &x, &want);
        for isa in isas() {
            let got = multiply(isa, weight, 0..rows, &quantized, tokens);
            prop_assert_eq!(bits(&got), bits(&want), "{:?} {:?} {}x{}, {} tokens", format, isa, rows, cols, tokens);
        }
    }
}

#[test]
fn errors_write_nothing() {
    let data = crate::quant::blocks(Format::Q4_1, 8);
    let weight = Weight::new(Format::Q4_1, 4, 64, &data, RowOrder::Natural).unwrap();
    let plain = [0.5; 4 * 64];
    let plain = Weight::from_f32(4, 64, &plain).unwrap();
    let x = quantized(64, &values(2 * 64, 25));
    let enough = product_scratch(64).0;
    for isa in isas() {
        let mut y = [7.0; 6];
        let mut run = |weight, rows, x: &[Block], memory: usize| {
            product(isa, &mut y, weight, rows, x, &mut Workspace::new(&mut vec![0.0; memory]))
        };
        assert!(matches!(run(plain, 0..3, &x, enough), Err(Error::Shape(_))));
        assert!(matches!(run(weight, 2..5, &x, enough), Err(Error::Range { operand: "rows", limit: 4, got: 5 })));
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 3..0;
        assert!(run(weight, reversed, &x, enough).is_err());
        assert!(matches!(run(weight, 0..2, &x, enough), Err(Error::Length { operand: "y", want: 4, got: 6 })));
        assert!(matches!(run(weight, 0..3, &x[1..], enough), Err(Error::Length { operand: "y", .. })));
        assert!(matches!(run(weight, 0..3, &x, enough - 1), Err(Error::Workspace { .. })));
        assert_eq!(y, [7.0; 6]);
    }
    let mut out = [Block::ZERO; 2];
    assert!(matches!(quantize(Isa::Portable, &mut out, 33, &[1.0; 66]), Err(Error::Block { block: 32, got: 33, .. })));
    assert!(matches!(quantize(Isa::Portable, &mut out, 32, &[1.0; 96]), Err(Error::Length { want: 3, got: 2, .. })));
    assert!(matches!(quantize(Isa::Portable, &mut out, 32, &[1.0; 65]), Err(Error::Length { operand: "x", .. })));
    assert!(out == [Block::ZERO; 2]);
}
