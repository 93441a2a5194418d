//! Instruction sets for products of bytes.

use super::Isa;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
use super::NeonDotProd;
#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512Vnni, AvxVnni};

/// Instruction sets for integer products of eight-bit activations with quantized weights ([`crate::q8`]), slowest
/// first. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Q8Isa {
    /// The baseline of the architecture.
    Portable,
    /// AVX2: VPMADDUBSW.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-VNNI: VPDPBUSD in 256 bits.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    /// AVX-512 VNNI: VPDPBUSD in 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
    /// NEON's products of bytes: SDOT.
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    NeonDotProd(NeonDotProd),
}

impl Q8Isa {
    /// The fastest that this machine has.
    pub fn detect() -> Q8Isa {
        Q8Isa::available().last().unwrap_or(Q8Isa::Portable)
    }

    /// All that this machine has, slowest first.
    pub fn available() -> impl Iterator<Item = Q8Isa> {
        #[cfg(target_arch = "x86_64")]
        let found = [
            Some(Q8Isa::Portable),
            Avx2::detect().map(Q8Isa::Avx2),
            AvxVnni::detect().map(Q8Isa::AvxVnni),
            Avx512Vnni::detect().map(Q8Isa::Avx512Vnni),
        ];
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        let found = [Some(Q8Isa::Portable), NeonDotProd::detect().map(Q8Isa::NeonDotProd)];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon"))))]
        let found = [Some(Q8Isa::Portable)];
        found.into_iter().flatten()
    }

    /// "portable", "avx2", "avxvnni", "avx512vnni" or "neondotprod".
    pub fn name(self) -> &'static str {
        match self {
            Q8Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Q8Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Q8Isa::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Q8Isa::Avx512Vnni(_) => "avx512vnni",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Q8Isa::NeonDotProd(_) => "neondotprod",
        }
    }

    /// The instruction set of that name, if this machine has it.
    pub fn by_name(name: &str) -> Option<Q8Isa> {
        Q8Isa::available().find(|isa| isa.name() == name)
    }

    /// The f32 instruction set that this one contains.
    pub fn widened(self) -> Isa {
        match self {
            Q8Isa::Portable => Isa::Portable,
            #[cfg(target_arch = "x86_64")]
            Q8Isa::Avx2(isa) => Isa::Avx2(isa),
            #[cfg(target_arch = "x86_64")]
            Q8Isa::AvxVnni(isa) => Isa::Avx2(isa.avx2()),
            #[cfg(target_arch = "x86_64")]
            Q8Isa::Avx512Vnni(isa) => Isa::Avx512(isa.avx512()),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Q8Isa::NeonDotProd(isa) => Isa::Neon(isa.neon()),
        }
    }
}
