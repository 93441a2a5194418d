//! What the benches share: the machine's peak, measured in the same run as what is held against it.

use hydra_kernels::{Bf16Isa, Isa};
use std::hint::black_box;
use std::time::Instant;

/// Seconds of the fastest of `tries`.
pub fn fastest<R>(tries: usize, mut op: impl FnMut() -> R) -> f64 {
    let times = (0..tries).map(|_| {
        let start = Instant::now();
        black_box(op());
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Floating-point operations a second of one core: (f32, bf16), zero where the instruction is missing.
pub fn peaks() -> (f64, f64) {
    // Many short tries: on a busy machine some of them run undisturbed.
    const ROUNDS: u64 = 200_000;
    const TRIES: usize = 500;
    const CHAINS: f64 = 12.0;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        /// A loop of `$instruction`s, twelve independent sums of `$one`s in registers: enough for four cycles on two ports. Written
        /// out, since a compiler may keep the sums of such a loop in memory.
        macro_rules! chains {
            ($name:ident, $features:literal, $instruction:literal, $class:ident, $one:expr) => {
                #[target_feature(enable = $features)]
                fn $name() {
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
        /// Products of tiles in registers, four independent sums, as many as a 2 × 2 kernel has.
        ///
        /// # Safety
        /// AMX with bf16, permitted to this process.
        unsafe fn tiles() {
            #[repr(C, align(64))]
            struct Config([u8; 64]);
            let mut config = Config([0; 64]);
            config.0[0] = 1; // palette
            for tile in 0..8 {
                config.0[16 + 2 * tile] = 64; // bytes a row
                config.0[48 + tile] = 16; // rows
            }
            // SAFETY: the caller vouches for AMX; the block reads the configuration and changes nothing but the named registers.
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
        let rounds = ROUNDS as f64;
        let f32_peak = if Isa::by_name("avx512").is_some() {
            // SAFETY: the kernels' detection found AVX-512.
            rounds * CHAINS * 16.0 * 2.0 / fastest(TRIES, || unsafe { fma512() })
        } else if Isa::by_name("avx2").is_some() {
            // SAFETY: the kernels' detection found AVX2 and FMA.
            rounds * CHAINS * 8.0 * 2.0 / fastest(TRIES, || unsafe { fma256() })
        } else {
            0.0
        };
        let bf16_peak = if Bf16Isa::by_name("amxbf16").is_some() {
            // SAFETY: the kernels' detection found AMX and asked for it.
            rounds / 4.0 * 4.0 * 16.0 * 16.0 * 32.0 * 2.0 / fastest(TRIES, || unsafe { tiles() })
        } else if Bf16Isa::by_name("avx512bf16").is_some() {
            // The instruction or the widened product, whichever is faster on this machine.
            // SAFETY: the kernels' detection found AVX-512 BF16.
            f32_peak.max(rounds * CHAINS * 16.0 * 4.0 / fastest(TRIES, || unsafe { pairs512() }))
        } else {
            f32_peak
        };
        (f32_peak, bf16_peak)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        (0.0, 0.0)
    }
}

/// Room for `len` values that begin at a cache line, as the engine's buffers do.
#[allow(dead_code)] // not every bench has operands of its own
pub fn aligned<T: Copy>(len: usize, value: T) -> OnLine<T> {
    OnLine { values: vec![value; len + 64], len }
}

/// See [`aligned`].
#[allow(dead_code)]
pub struct OnLine<T> {
    values: Vec<T>,
    len: usize,
}

#[allow(dead_code)]
impl<T> OnLine<T> {
    /// The values.
    pub fn on_line(&mut self) -> &mut [T] {
        let first = self.values.as_ptr().align_offset(64);
        &mut self.values[first..first + self.len]
    }
}
