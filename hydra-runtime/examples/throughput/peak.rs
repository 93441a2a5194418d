//! Products in registers: what one core of this machine can do at best, measured.

#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_variables))] // elsewhere no rate is known

use hydra_kernels::{Bf16Isa, Isa, Q8Isa};
use std::hint::black_box;
use std::time::Instant;

/// Seconds of each of `tries`, shortest first.
fn times<R>(tries: usize, mut op: impl FnMut() -> R) -> Vec<f64> {
    let time = |_| {
        let start = Instant::now();
        black_box(op());
        start.elapsed().as_secs_f64()
    };
    let mut times: Vec<f64> = (0..tries).map(time).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Seconds of the fastest of `tries`.
pub fn fastest<R>(tries: usize, op: impl FnMut() -> R) -> f64 {
    times(tries, op)[0]
}

/// Which of several times counts; the shortest comes first.
pub type Pick = fn(&[f64]) -> f64;

/// Floating-point operations a second of one core with f32; 0 where this isn't known.
pub fn f32_peak(isa: Isa, pick: Pick) -> f64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves AVX-512.
        Isa::Avx512(_) => rate(2 * 16, pick, || unsafe { x86_64::fma512() }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves AVX2 and FMA.
        Isa::Avx2(_) => rate(2 * 8, pick, || unsafe { x86_64::fma256() }),
        _ => 0.0,
    }
}

/// [`f32_peak`] for products of bf16.
pub fn bf16_peak(isa: Bf16Isa, pick: Pick) -> f64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // A quarter of the rounds, each of four products of tiles instead of twelve instructions.
        // SAFETY: the token proves AMX, and that the system permits it.
        Bf16Isa::AmxBf16(_) => rate(2 * 16 * 16 * 32, pick, || unsafe { x86_64::tiles() }) / 12.0,
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves AVX-512 BF16.
        Bf16Isa::Avx512Bf16(_) => rate(2 * 32, pick, || unsafe { x86_64::pairs512() }),
        _ => f32_peak(isa.widened(), pick),
    }
}

/// [`f32_peak`] for products of bytes.
#[allow(dead_code)] // for the benches that share this file
pub fn q8_peak(isa: Q8Isa, pick: Pick) -> f64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves AVX-512 VNNI.
        Q8Isa::Avx512Vnni(_) => rate(2 * 64, pick, || unsafe { x86_64::bytes512() }),
        _ => 0.0,
    }
}

/// Rounds of twelve instructions in one try.
const ROUNDS: u64 = 200_000;

/// Operations a second of a function that takes [`ROUNDS`] of twelve instructions of `operations` each.
fn rate(operations: u64, pick: Pick, op: impl FnMut()) -> f64 {
    // Many short tries: on a busy machine some of them run undisturbed.
    (12 * ROUNDS * operations) as f64 / pick(&times(500, op))
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::ROUNDS;
    use std::arch::x86_64::*;

    /// A loop of `$instruction`s, twelve independent sums of `$one`s in registers: enough for four cycles on two
    /// ports. Written out, since a compiler may keep the sums of such a loop in memory.
    macro_rules! chains {
        ($name:ident, $features:literal, $instruction:literal, $class:ident, $one:expr) => {
            #[target_feature(enable = $features)]
            pub fn $name() {
                let one = $one;
                // SAFETY: the block reads and writes nothing but its operands.
                unsafe {
                    std::arch::asm!(
                        "2:",
                        concat!($instruction, " {s0}, {x}, {x}"), concat!($instruction, " {s1}, {x}, {x}"),
                        concat!($instruction, " {s2}, {x}, {x}"), concat!($instruction, " {s3}, {x}, {x}"),
                        concat!($instruction, " {s4}, {x}, {x}"), concat!($instruction, " {s5}, {x}, {x}"),
                        concat!($instruction, " {s6}, {x}, {x}"), concat!($instruction, " {s7}, {x}, {x}"),
                        concat!($instruction, " {s8}, {x}, {x}"), concat!($instruction, " {s9}, {x}, {x}"),
                        concat!($instruction, " {s10}, {x}, {x}"), concat!($instruction, " {s11}, {x}, {x}"),
                        "dec {rounds}",
                        "jnz 2b",
                        rounds = inout(reg) ROUNDS => _, x = in($class) one,
                        s0 = inout($class) one => _, s1 = inout($class) one => _, s2 = inout($class) one => _,
                        s3 = inout($class) one => _, s4 = inout($class) one => _, s5 = inout($class) one => _,
                        s6 = inout($class) one => _, s7 = inout($class) one => _, s8 = inout($class) one => _,
                        s9 = inout($class) one => _, s10 = inout($class) one => _, s11 = inout($class) one => _,
                        options(nostack, nomem),
                    );
                }
            }
        };
    }
    chains!(fma512, "avx512f", "vfmadd231ps", zmm_reg, _mm512_set1_ps(0.999));
    chains!(fma256, "avx2,fma", "vfmadd231ps", ymm_reg, _mm256_set1_ps(0.999));
    chains!(pairs512, "avx512f,avx512bf16", "vdpbf16ps", zmm_reg, _mm512_set1_ps(0.999));
    chains!(bytes512, "avx512f,avx512vnni", "vpdpbusd", zmm_reg, _mm512_set1_epi8(1));

    /// Products of tiles in registers, four independent sums, as many as a 2 × 2 kernel has.
    ///
    /// # Safety
    /// AMX with bf16, permitted to this process.
    pub unsafe fn tiles() {
        #[repr(C, align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1; // palette
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64; // bytes a row
            config.0[48 + tile] = 16; // rows
        }
        // SAFETY: the caller vouches for AMX; the block reads the configuration and changes only the named registers.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &config,
                rounds = inout(reg) ROUNDS / 4 => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
