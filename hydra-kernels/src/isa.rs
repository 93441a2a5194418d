//! Instruction sets as values: an [`Isa::Avx512`] is the proof that this machine runs AVX-512.
//!
//! On x86-64, detection asks CPUID what the CPU has and XCR0 which registers the OS saves; on AArch64, it asks Linux for
//! its auxiliary vector. It needs only `core`, and an atomic caches the answer.

#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod aarch64;
mod q8;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
pub use aarch64::{Neon, NeonBf16, NeonDotProd};
pub use q8::Q8Isa;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{AmxBf16, Avx2, Avx512, Avx512Bf16, Avx512Vnni, AvxVnni};

/// Instruction sets for f32 arithmetic, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// The baseline of the architecture.
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// NEON.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    Neon(Neon),
}

impl Isa {
    /// The fastest that this machine has.
    pub fn detect() -> Isa {
        Isa::available().last().unwrap_or(Isa::Portable)
    }

    /// All that this machine has, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        #[cfg(target_arch = "x86_64")]
        let found = [Some(Isa::Portable), Avx2::detect().map(Isa::Avx2), Avx512::detect().map(Isa::Avx512)];
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        let found = [Some(Isa::Portable), Neon::detect().map(Isa::Neon)];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon"))))]
        let found = [Some(Isa::Portable)];
        found.into_iter().flatten()
    }

    /// "portable", "avx2", "avx512" or "neon".
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(_) => "neon",
        }
    }

    /// The instruction set of that name, if this machine has it.
    pub fn by_name(name: &str) -> Option<Isa> {
        Isa::available().find(|isa| isa.name() == name)
    }

    /// Runs `op` compiled with this instruction set, so that its plain loops vectorize.
    ///
    /// Only code that is inlined into `op` is compiled with it: write `isa.vectorize(#[inline(always)] || ..)`, and
    /// call only `#[inline(always)]` functions inside.
    #[inline(always)]
    pub fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        match self {
            Isa::Portable => baseline(op),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon(isa) => isa.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.vectorize(op),
        }
    }
}

/// Runs `op` with the target's own instructions, in a function of its own: without optimization, a caller that inlined
/// the code for several instruction sets would reserve stack for all of them.
pub(crate) fn baseline<R>(op: impl FnOnce() -> R) -> R {
    op()
}

/// Instruction sets for products of bf16 matrices, summed in f32; slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Isa {
    /// The baseline of the architecture; widens to f32.
    Portable,
    /// Widens to f32, then AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// Widens to f32, then AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512 BF16, which multiplies pairs of bf16 (VDPBF16PS) and flushes subnormals to zero.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// AMX, which multiplies tiles of bf16 (TDPBF16PS) and flushes subnormals to zero.
    #[cfg(target_arch = "x86_64")]
    AmxBf16(AmxBf16),
    /// Widens to f32, then NEON.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    Neon(Neon),
    /// NEON's bf16 products, which multiply 2 × 4 by 4 × 2 values (BFMMLA) and flush subnormals to zero.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    NeonBf16(NeonBf16),
}

impl Bf16Isa {
    /// The fastest that this machine has.
    pub fn detect() -> Bf16Isa {
        Bf16Isa::available().last().unwrap_or(Bf16Isa::Portable)
    }

    /// All that this machine has, slowest first. On Intel's CPUs, where AVX-512 BF16 is half as fast as widening to
    /// f32, it comes before [`Bf16Isa::Avx512`].
    pub fn available() -> impl Iterator<Item = Bf16Isa> {
        #[cfg(target_arch = "x86_64")]
        let found = {
            let pairs = Avx512Bf16::detect();
            let mut avx512 = [Avx512::detect().map(Bf16Isa::Avx512), pairs.map(Bf16Isa::Avx512Bf16)];
            if pairs.is_some_and(|isa| !isa.faster_than_fma()) {
                avx512.reverse();
            }
            let [slower, faster] = avx512;
            let avx2 = Avx2::detect().map(Bf16Isa::Avx2);
            [Some(Bf16Isa::Portable), avx2, slower, faster, AmxBf16::detect().map(Bf16Isa::AmxBf16)]
        };
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        let found =
            [Some(Bf16Isa::Portable), Neon::detect().map(Bf16Isa::Neon), NeonBf16::detect().map(Bf16Isa::NeonBf16)];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon"))))]
        let found = [Some(Bf16Isa::Portable)];
        found.into_iter().flatten()
    }

    /// "portable", "avx2", "avx512", "avx512bf16", "amxbf16", "neon" or "neonbf16".
    pub fn name(self) -> &'static str {
        match self {
            Bf16Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(_) => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(_) => "amxbf16",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::Neon(_) => "neon",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::NeonBf16(_) => "neonbf16",
        }
    }

    /// The instruction set of that name, if this machine has it.
    pub fn by_name(name: &str) -> Option<Bf16Isa> {
        Bf16Isa::available().find(|isa| isa.name() == name)
    }

    /// The f32 instruction set that this one contains.
    pub fn widened(self) -> Isa {
        match self {
            Bf16Isa::Portable => Isa::Portable,
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx2(isa) => Isa::Avx2(isa),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512(isa) => Isa::Avx512(isa),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::Avx512Bf16(isa) => Isa::Avx512(isa.avx512()),
            #[cfg(target_arch = "x86_64")]
            Bf16Isa::AmxBf16(isa) => Isa::Avx512(isa.avx512bf16().avx512()),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::Neon(isa) => Isa::Neon(isa),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Bf16Isa::NeonBf16(isa) => Isa::Neon(isa.neon()),
        }
    }

    /// [`Isa::vectorize`] with [`Bf16Isa::widened`].
    #[inline(always)]
    pub fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        self.widened().vectorize(op)
    }
}
