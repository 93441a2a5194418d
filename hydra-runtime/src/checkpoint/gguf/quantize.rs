//! Rows of f32 in GGUF's formats, with the values that ggml's reference quantizers choose (`ggml-quants.c`).

use half::{bf16, f16};
use hydra_kernels::quant::{Format, GROUP};

/// The formats that rows can be written in, the most precise first.
pub(crate) const WRITTEN: [Format; 7] =
    [Format::F32, Format::Bf16, Format::F16, Format::Q8_0, Format::Q5_0, Format::Q4_0, Format::Q4K];

/// The format of a matrix of `cols` columns where `asked` is wanted: that, or the next finer one whose blocks divide the row
/// (llama.cpp's choice, too): Q5_0 for Q4_K, and F16 for the blocks of 32.
pub(crate) fn fitting(asked: Format, cols: usize) -> Format {
    let whole = |format: &Format| cols.is_multiple_of(format.block_len());
    [asked, Format::Q5_0, Format::F16].into_iter().find(whole).unwrap_or(Format::F16)
}

/// Appends `row`, a whole number of `format`'s blocks, to `bytes`. A value that the format can't hold becomes infinite, or NaN; see
/// [`is_finite`].
///
/// # Panics
/// If `format` is not one of [`WRITTEN`].
pub(crate) fn encode_row(format: Format, row: &[f32], bytes: &mut Vec<u8>) {
    match format {
        Format::F32 => bytes.extend(row.iter().flat_map(|x| x.to_le_bytes())),
        Format::F16 => bytes.extend(row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes())),
        Format::Bf16 => bytes.extend(row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
        Format::Q8_0 => blocks(row, bytes, q8_0),
        Format::Q5_0 => blocks(row, bytes, q5_0),
        Format::Q4_0 => blocks(row, bytes, q4_0),
        Format::Q4K => blocks(row, bytes, q4_k),
        other => unreachable!("{} is not written", other.name()),
    }
}

/// Whether `format` can hold all of the row: plain floats round beyond their largest to infinity, and so do the scales of blocks,
/// which are f16.
pub(crate) fn is_finite(format: Format, row: &[f32]) -> bool {
    let largest = row.iter().fold(0.0f32, |max, x| if x.is_finite() { max.max(x.abs()) } else { f32::INFINITY });
    match format {
        Format::F32 => largest.is_finite(),
        Format::Bf16 => bf16::from_f32(largest).is_finite(),
        Format::F16 => f16::from_f32(largest).is_finite(),
        Format::Q8_0 => f16::from_f32(largest / 127.0).is_finite(),
        Format::Q5_0 => f16::from_f32(largest / 16.0).is_finite(),
        Format::Q4_0 => f16::from_f32(largest / 8.0).is_finite(),
        // Scale and minimum of a group are 63 times their unit.
        _ => f16::from_f32(largest / 63.0).is_finite(),
    }
}

fn blocks<const LEN: usize, const BYTES: usize>(
    row: &[f32],
    bytes: &mut Vec<u8>,
    block: fn(&[f32; LEN]) -> [u8; BYTES],
) {
    let (whole, rest) = row.as_chunks::<LEN>();
    debug_assert!(rest.is_empty(), "a row of whole blocks");
    whole.iter().for_each(|values| bytes.extend(block(values)));
}

/// 1 / x, and 0 for 0: the values of such a block are all 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The value of the largest magnitude, with its sign; the first of several.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max })
}

fn q8_0(values: &[f32; GROUP]) -> [u8; 34] {
    let d = largest(values).abs() / 127.0;
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (byte, &x) in block[2..].iter_mut().zip(values) {
        *byte = (x * inverse(d)).round() as i8 as u8;
    }
    block
}

/// The scale of blocks of whole numbers from −`half` to `half` − 1, and these numbers plus `half`: the largest value becomes −`half`.
fn symmetric(values: &[f32; GROUP], half: f32) -> (f16, [u8; GROUP]) {
    let d = largest(values) / -half;
    let q = values.map(|x| ((x * inverse(d) + half + 0.5) as u8).min(2 * half as u8 - 1));
    (f16::from_f32(d), q)
}

/// Column i in the low half of byte i, and column 16 + i in its high half.
fn pack_nibbles(q: &[u8; GROUP]) -> [u8; 16] {
    std::array::from_fn(|i| q[i] & 15 | (q[16 + i] & 15) << 4)
}

fn q4_0(values: &[f32; GROUP]) -> [u8; 18] {
    let (d, q) = symmetric(values, 8.0);
    let mut block = [0; 18];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..].copy_from_slice(&pack_nibbles(&q));
    block
}

fn q5_0(values: &[f32; GROUP]) -> [u8; 22] {
    let (d, q) = symmetric(values, 16.0);
    let fifth = q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4) << i);
    let mut block = [0; 22];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..6].copy_from_slice(&fifth.to_le_bytes());
    block[6..].copy_from_slice(&pack_nibbles(&q));
    block
}

/// Blocks of 256, whose 8 groups have a scale and a minimum each, in 6 bits.
fn q4_k(values: &[f32; 256]) -> [u8; 144] {
    let (groups, _) = values.as_chunks::<GROUP>();
    let fits: [Fit; 8] = std::array::from_fn(|g| Fit::of(&groups[g]));
    let [max_scale, max_min] =
        [|fit: &Fit| fit.scale, |fit: &Fit| fit.min].map(|of| fits.iter().map(of).fold(0.0, f32::max));
    let (d, dmin) = (f16::from_f32(max_scale / 63.0), f16::from_f32(max_min / 63.0));
    let six_bits = |x: f32, max: f32| (x * 63.0 * inverse(max)).round_ties_even().clamp(0.0, 63.0) as u8;
    let scales = fits.each_ref().map(|fit| six_bits(fit.scale, max_scale));
    let mins = fits.each_ref().map(|fit| six_bits(fit.min, max_min));
    let mut block = [0; 144];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&dmin.to_le_bytes());
    block[4..16].copy_from_slice(&pack_scales(&scales, &mins));
    for (g, values) in groups.iter().enumerate() {
        let (scale, min) = (d.to_f32() * f32::from(scales[g]), dmin.to_f32() * f32::from(mins[g]));
        for (byte, x) in block[16 + g / 2 * GROUP..][..GROUP].iter_mut().zip(values) {
            // Without a scale, llama.cpp keeps what the fit found; all are decoded as −min.
            let q = ((x + min) * inverse(scale)).round_ties_even().clamp(0.0, 15.0) as u8;
            *byte |= q << (g % 2 * 4);
        }
    }
    block
}

/// The layout that `scale_and_min` of hydra-kernels reads.
fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for g in 0..4 {
        packed[g] = scales[g] | scales[g + 4] >> 4 << 6;
        packed[g + 4] = mins[g] | mins[g + 4] >> 4 << 6;
        packed[g + 8] = scales[g + 4] & 15 | (mins[g + 4] & 15) << 4;
    }
    packed
}

/// x ≈ scale · q − min with q from 0 to 15 and min ≥ 0, by weighted least squares (`make_qkx2_quants`).
struct Fit {
    scale: f32,
    min: f32,
}

impl Fit {
    fn of(values: &[f32; GROUP]) -> Self {
        const MOST: f32 = 15.0;
        let rms = (values.iter().map(|x| x * x).sum::<f32>() / GROUP as f32).sqrt();
        let weights = values.map(|x| rms + x.abs());
        let least = values.iter().copied().fold(0.0, f32::min);
        let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if most <= least {
            return Self { scale: 0.0, min: -least };
        }
        let round = |inverse: f32| values.map(|x| (inverse * (x - least)).round_ties_even().clamp(0.0, MOST));
        let weighted = |of: &dyn Fn(usize) -> f32| (0..GROUP).map(|i| weights[i] * of(i)).sum::<f32>();
        let error = |q: &[f32; GROUP], scale: f32, min: f32| weighted(&|i| (scale * q[i] + min - values[i]).powi(2));
        let (sum_w, sum_x) = (weighted(&|_| 1.0), weighted(&|i| values[i]));
        let (mut scale, mut min) = ((most - least) / MOST, least);
        let mut best = error(&round(MOST / (most - least)), scale, min);
        // Other roundings, each with the scale and minimum that suit it best.
        for step in 0..=20 {
            let q = round((-1.0 + 0.1 * step as f32 + MOST) / (most - least));
            let (sum_q, sum_qq, sum_qx) =
                (weighted(&|i| q[i]), weighted(&|i| q[i] * q[i]), weighted(&|i| q[i] * values[i]));
            let determinant = sum_w * sum_qq - sum_q * sum_q;
            if determinant <= 0.0 {
                continue;
            }
            let mut this_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
            let mut this_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
            if this_min > 0.0 {
                (this_scale, this_min) = (sum_qx / sum_qq, 0.0);
            }
            let this_error = error(&q, this_scale, this_min);
            if this_error < best {
                (scale, min, best) = (this_scale, this_min, this_error);
            }
        }
        Self { scale, min: -min }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_kernels::isa::Isa;
    use hydra_kernels::quant::{RowOrder, Weight};
    use hydra_kernels::random::SplitMix64;

    /// Values of several magnitudes, a block of zeros, one of a single value.
    fn row() -> Vec<f32> {
        let mut random = SplitMix64::new(3);
        let mut row: Vec<f32> = (0..1024)
            .map(|i| ((random.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * [0.01, 1.0, 30.0][i / 256 % 3])
            .collect();
        row[256..512].fill(0.0);
        row[512..544].fill(-2.5);
        row
    }

    fn decoded(format: Format, row: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        encode_row(format, row, &mut bytes);
        let weight = Weight::new(format, 1, row.len(), &bytes, RowOrder::Natural).unwrap();
        let mut out = vec![0.0; row.len()];
        weight.decode_row(Isa::detect(), 0, 0, &mut out);
        out
    }

    #[test]
    fn what_is_written_is_read_back_within_half_a_step() {
        let row = row();
        for (format, levels) in [(Format::Q8_0, 127.0), (Format::Q5_0, 15.0), (Format::Q4_0, 7.0), (Format::Q4K, 7.0)] {
            let got = decoded(format, &row);
            for (block, (got, want)) in got.chunks(GROUP).zip(row.chunks(GROUP)).enumerate() {
                let step = want.iter().fold(0.0f32, |max, x| max.max(x.abs())) / levels;
                let error = got.iter().zip(want).fold(0.0f32, |max, (a, b)| max.max((a - b).abs()));
                assert!(error <= step * 1.01, "{} block {block}: {error}, a step is {step}", format.name());
            }
        }
        assert_eq!(decoded(Format::F32, &row), row);
    }

    #[test]
    fn what_was_decoded_from_plain_blocks_is_written_again_as_it_was() {
        for format in [Format::Q8_0, Format::Q5_0, Format::Q4_0, Format::F16, Format::Bf16] {
            let once = decoded(format, &row());
            assert_eq!(decoded(format, &once), once, "{}", format.name());
        }
    }

    #[test]
    fn blocks_that_dont_divide_a_row_give_way() {
        assert_eq!(
            [256, 576, 72, 31].map(|cols| fitting(Format::Q4K, cols)),
            [Format::Q4K, Format::Q5_0, Format::F16, Format::F16]
        );
        assert_eq!([576, 72].map(|cols| fitting(Format::Q8_0, cols)), [Format::Q8_0, Format::F16]);
        assert_eq!(fitting(Format::Bf16, 31), Format::Bf16);
    }

    #[test]
    fn what_overflows_is_seen() {
        for (format, most) in [(Format::F16, 65504.0), (Format::Q8_0, 127.0 * 65504.0), (Format::Q4_0, 8.0 * 65504.0)] {
            assert!(is_finite(format, &[most]), "{}", format.name());
            assert!(!is_finite(format, &[-most * 1.01]), "{}", format.name());
        }
        assert!(WRITTEN.iter().all(|&format| !is_finite(format, &[f32::NAN])));
    }
}
