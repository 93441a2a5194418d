//! The transcendental functions that `core` lacks, for f32.
//!
//! `exp` and what is built on it are plain branch-free arithmetic, `#[inline(always)]`, so that a loop over them
//! vectorises inside [`crate::Isa::vectorize`], with the same bits on every instruction set.
//!
//! | function | largest error seen over the range |
//! |---|---|
//! | [`exp`] | 2 ulp, and 1 unit of the least subnormal below 2⁻¹²⁶ |
//! | [`ln`] | 2 ulp (4·10⁻⁷ absolute near 1) |
//! | [`sqrt`] | correctly rounded on x86-64, 1 ulp elsewhere |
//! | [`rsqrt`] | 1 ulp more than `sqrt` |

/// eˣ. 0 below −104, ∞ above 88.73, NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Beyond these the result is 0 or ∞ anyway; `min` and `max` would lose a NaN.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -105.0 { -105.0 } else { clamped };
    // n = round(x / ln 2): adding 1.5·2²³ leaves the integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    let shifted = clamped * core::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, the first exact when multiplied by n (|n| < 2⁸).
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // 2ⁿ as two normal factors, so that the last multiplication rounds into the subnormals or overflows to ∞.
    let n = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n.wrapping_add(127)) << 23) as u32);
    e * power(half) * power(n.wrapping_sub(half))
}

/// eˣ where the result will be rounded to bf16: half the work of [`exp`]. Relative error 2·10⁻⁵ at most (in x, 10⁻⁷ of
/// its size); 0 below −87.3, where eˣ is subnormal; x above 88 is taken for 88; NaN for NaN.
#[inline(always)]
pub fn exp_coarse(x: f32) -> f32 {
    let t = x * core::f32::consts::LOG2_E;
    // A masked score's probability is 0. The least normal number would have subnormal gradients, whose products are slow.
    let normal = t >= -126.0;
    let t = if t < -126.0 { -126.0 } else { t };
    let t = if t > 127.0 { 127.0 } else { t };
    const MAGIC: f32 = 12_582_912.0;
    let shifted = t + MAGIC;
    let f = t - (shifted - MAGIC);
    // 2ᶠ for |f| ≤ ½, by the polynomial of least relative error.
    let p = 9.570_101e-3_f32;
    let p = p * f + 0.055_917_86;
    let p = p * f + 0.240_247_45;
    let p = p * f + 0.693_121_8;
    let p = p * f + 0.999_999_3;
    // The integer is in the low bits of `shifted`; into the exponent with it.
    let e = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    // 0 of what was below −126; NaN of NaN, which the sum of bits may have made a number.
    if normal { e } else { t + 126.0 }
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x); 0 at −∞.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    // −∞ / ∞ would be NaN; for NaN the denominator is.
    x.max(-1000.0) / (1.0 + exp(-x))
}

/// The derivative of [`silu`].
#[inline(always)]
pub fn silu_derivative(x: f32) -> f32 {
    // Beyond ±1000 the slope is 0 or 1; ±∞ times the vanished factor would be NaN.
    let x = x.clamp(-1000.0, 1000.0);
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// Natural logarithm. −∞ at 0, NaN below.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x == f32::INFINITY {
        return x;
    }
    // Subnormals scaled by 2²⁵.
    let (x, bias) = if x < f32::MIN_POSITIVE { (x * 33_554_432.0, 25) } else { (x, 0) };
    // x = 2ᵉ · m with m in [√½, √2), and ln m = 2 artanh(s), s = (m − 1) / (m + 1).
    let shifted = x.to_bits().wrapping_add(0x3f80_0000 - 0x3f35_04f3);
    let e = (shifted >> 23) as i32 - 127 - bias;
    let m = f32::from_bits((shifted & 0x007f_ffff) + 0x3f35_04f3);
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let odd = w * (0.399_999_9 + w * 0.242_790_79);
    let even = z * (0.666_666_6 + w * 0.284_987_87);
    let half_square = 0.5 * f * f;
    let e = e as f32;
    s * (half_square + (odd + even)) + e * 9.058_001e-6 - half_square + f + e * 0.693_138_1
}

/// Square root. NaN below 0.
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_mm_cvtss_f32, _mm_set_ss, _mm_sqrt_ss};
        // SAFETY: SSE is part of the x86-64 baseline.
        unsafe { _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        if x.is_nan() || x < 0.0 {
            return f32::NAN;
        }
        if x == 0.0 || x == f32::INFINITY {
            return x;
        }
        // Newton's iteration in f64 from a guess with half the exponent: 5 rounds square 4 % down to f64's last bit.
        let x = f64::from(x);
        let mut root = f64::from_bits((x.to_bits() >> 1) + 0x1ff7_a3bf_0000_0000);
        for _ in 0..5 {
            root = 0.5 * (root + x / root);
        }
        root as f32
    }
}

/// 1 / √x.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    1.0 / sqrt(x)
}
