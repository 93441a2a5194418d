//! Instruction sets as values: whoever holds [`Isa::Avx512`] holds the proof that this machine runs it.
//!
//! Detection is CPUID and XCR0 (does the OS save the registers?), in `core`, cached in an atomic.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{AmxBf16, Avx2, Avx512, Avx512Bf16};

/// Instruction sets for f32 arithmetic, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every machine of this architecture has.
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Isa {
        Isa::available().last().unwrap_or(Isa::Portable)
    }

    /// All that this machine has, worst first.
    pub fn available() -> impl Iterator<Item = Isa> {
        #[cfg(target_arch = "x86_64")]
        let found = [Some(Isa::Portable), Avx2::detect().map(Isa::Avx2), Avx512::detect().map(Isa::Avx512)];
        #[cfg(not(target_arch = "x86_64"))]
        let found = [Some(Isa::Portable)];
        found.into_iter().flatten()
    }

    /// "portable", "avx2" or "avx512".
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
        }
    }

    /// The instruction set of that name, if this machine has it.
    pub fn by_name(name: &str) -> Option<Isa> {
        Isa::available().find(|isa| isa.name() == name)
    }

    /// Runs `op` compiled with this instruction set, so that its plain loops vectorise.
    ///
    /// Only what is inlined into `op` is compiled so: write `isa.vectorize(#[inline(always)] || ..)` and call
    /// nothing in it but `#[inline(always)]` functions.
    #[inline(always)]
    pub fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        match self {
            Isa::Portable => op(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(isa) => isa.vectorize(op),
        }
    }
}

/// Instruction sets for products of bf16 matrices (accumulated in f32), worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Isa {
    /// What every machine of this architecture has; widens to f32.
    Portable,
    /// Widens to f32, then AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// Widens to f32, then AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512's own product of bf16 pairs (VDPBF16PS: flushes subnormals to zero).
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    /// AMX's product of tiles (TDPBF16PS: flushes subnormals to zero).
    #[cfg(target_arch = "x86_64")]
    AmxBf16(AmxBf16),
}

impl Bf16Isa {
    /// The best that this machine has.
    pub fn detect() -> Bf16Isa {
        Bf16Isa::available().last().unwrap_or(Bf16Isa::Portable)
    }

    /// All that this machine has, worst first. AVX-512's own products of bf16 come before the widened ones on Intel's CPUs, where
    /// they are half as fast.
    pub fn available() -> impl Iterator<Item = Bf16Isa> {
        #[cfg(target_arch = "x86_64")]
        let found = {
            let pairs = Avx512Bf16::detect();
            let mut avx512 = [Avx512::detect().map(Bf16Isa::Avx512), pairs.map(Bf16Isa::Avx512Bf16)];
            if pairs.is_some_and(|isa| !isa.pays()) {
                avx512.reverse();
            }
            let [worse, better] = avx512;
            let avx2 = Avx2::detect().map(Bf16Isa::Avx2);
            [Some(Bf16Isa::Portable), avx2, worse, better, AmxBf16::detect().map(Bf16Isa::AmxBf16)]
        };
        #[cfg(not(target_arch = "x86_64"))]
        let found = [Some(Bf16Isa::Portable)];
        found.into_iter().flatten()
    }

    /// "portable", "avx2", "avx512", "avx512bf16" or "amxbf16".
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
        }
    }

    /// [`Isa::vectorize`] with [`Bf16Isa::widened`].
    #[inline(always)]
    pub fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        self.widened().vectorize(op)
    }
}
