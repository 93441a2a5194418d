//! Rows of a column-major matrix with AVX-512: sixteen at a time, transposed in registers.

use super::round::round;
use core::arch::x86_64::*;
use half::bf16;

/// Transposes 16 × 16 words of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // First words, then pairs of words, between neighbouring rows in each quarter of a register; then quarters.
    let words: [__m512i; 16] = core::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
        _ => _mm512_unpackhi_epi32(rows[i - 1], rows[i]),
    });
    // words[4g + {0, 1}]: columns {0, 1}, {2, 3} of rows 4g, 4g + 1; words[4g + {2, 3}]: of rows 4g + 2, 4g + 3.
    let pairs: [__m512i; 16] = core::array::from_fn(|i| {
        let (group, column) = (i / 4 * 4, i % 4);
        let (upper, lower) = (words[group + column / 2], words[group + 2 + column / 2]);
        if column % 2 == 0 { _mm512_unpacklo_epi64(upper, lower) } else { _mm512_unpackhi_epi64(upper, lower) }
    });
    // pairs[4g + c], quarter h: column 4h + c of rows 4g .. 4g + 4.
    core::array::from_fn(|column| {
        let (h, c) = (column / 4, column % 4);
        let quarter = |a, b| match h {
            0 => _mm512_shuffle_i32x4::<0b00_00_00_00>(a, b),
            1 => _mm512_shuffle_i32x4::<0b01_01_01_01>(a, b),
            2 => _mm512_shuffle_i32x4::<0b10_10_10_10>(a, b),
            _ => _mm512_shuffle_i32x4::<0b11_11_11_11>(a, b),
        };
        let (first, second) = (quarter(pairs[c], pairs[4 + c]), quarter(pairs[8 + c], pairs[12 + c]));
        // [a a b b], [c c d d] → [a b c d]
        _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second)
    })
}

/// An element type whose columns can be loaded into sixteen 32-bit lanes.
pub(crate) trait Column: Copy {
    /// Lane i holds `even[i]` and `odd[i]` as a pair of bf16; lanes that a mask excludes hold zeros.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW, VL and BF16; the elements that the masks admit can be read.
    unsafe fn pairs(even: (*const Self, u16), odd: (*const Self, u16)) -> __m512i;

    /// Lane i holds `column[i]` as f32; lanes that the mask excludes hold zeros.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, BW and VL; the elements that the mask admits can be read.
    unsafe fn floats(column: (*const Self, u16)) -> __m512;
}

impl Column for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pairs(even: (*const f32, u16), odd: (*const f32, u16)) -> __m512i {
        // Word i of the first half beside word i of the second.
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut lane = 0;
            while lane < 32 {
                order[lane] = (lane / 2 + lane % 2 * 16) as u16;
                lane += 1;
            }
            order
        };
        // SAFETY: `floats` reads what the masks admit, which is this function's contract; ORDER is the 64 bytes that
        // are loaded.
        unsafe {
            _mm512_permutexvar_epi16(
                _mm512_loadu_si512(ORDER.as_ptr().cast()),
                round(f32::floats(even), f32::floats(odd)),
            )
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn floats((column, mask): (*const f32, u16)) -> __m512 {
        // SAFETY: only what the mask admits is read, which is this function's contract.
        unsafe { _mm512_maskz_loadu_ps(mask, column) }
    }
}

impl Column for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pairs(even: (*const bf16, u16), odd: (*const bf16, u16)) -> __m512i {
        // SAFETY: only what the masks admit is read, which is this function's contract.
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even.1, even.0.cast()));
            let odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd.1, odd.0.cast()));
            _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn floats((column, mask): (*const bf16, u16)) -> __m512 {
        // SAFETY: only what the mask admits is read, which is this function's contract.
        let column = unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, column.cast())) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(column))
    }
}

/// A column-major matrix [rows, k] read by rows: value `q` of row `row` is `data[q · stride + row]`.
#[derive(Clone, Copy)]
pub(crate) struct Transposed<'a, E> {
    data: &'a [E],
    stride: usize,
    rows: usize,
    k: usize,
}

impl<'a, E: Column> Transposed<'a, E> {
    /// `rows` rows of `k` values, whose columns are `stride` elements apart.
    ///
    /// # Panics
    /// If `data` is shorter.
    pub(crate) fn new(data: &'a [E], stride: usize, rows: usize, k: usize) -> Self {
        assert!(k == 0 || rows == 0 || data.len() >= (k - 1) * stride + rows);
        Transposed { data, stride, rows, k }
    }

    /// The number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The values of a row.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Where value `q` of row `row` lies, and a mask of the sixteen rows from there on that exist.
    ///
    /// What the mask admits is inside `data` by the assert in `new`. With an empty mask the pointer may be any.
    #[inline(always)]
    fn column(&self, row: usize, q: usize) -> (*const E, u16) {
        let rows = self.rows.saturating_sub(row).min(16);
        let mask = if q < self.k { (1u32 << rows) - 1 } else { 0 };
        (self.data.as_ptr().wrapping_add(q.wrapping_mul(self.stride).wrapping_add(row)), mask as u16)
    }

    /// Values `q .. q + 32` of rows `row .. row + 16` as bf16, zeros where there are none.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(crate) fn pairs(&self, row: usize, q: usize) -> [__m512i; 16] {
        let mut pairs = [_mm512_setzero_si512(); 16];
        for (p, pair) in pairs.iter_mut().enumerate() {
            // SAFETY: `column`'s masks admit only elements of `data`; this function enables the features.
            *pair = unsafe { E::pairs(self.column(row, q + 2 * p), self.column(row, q + 2 * p + 1)) };
        }
        transpose(pairs)
    }

    /// Values `q .. q + 16` of rows `row .. row + 16` as f32, zeros where there are none.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(crate) fn floats(&self, row: usize, q: usize) -> [__m512i; 16] {
        let mut floats = [_mm512_setzero_si512(); 16];
        for (p, float) in floats.iter_mut().enumerate() {
            // SAFETY: `column`'s mask admits only elements of `data`; this function enables the features.
            *float = _mm512_castps_si512(unsafe { E::floats(self.column(row, q + p)) });
        }
        transpose(floats)
    }
}
