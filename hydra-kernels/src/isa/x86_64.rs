//! Tokens that prove an instruction set: they exist only if the CPU has the instructions and the OS saves their
//! registers, and the crate is built with the feature of that name.
//!
//! Without its feature a token is a type without values. The variants of [`crate::Isa`] and the code behind them stay
//! in the source, so that features change no interface, but the compiler leaves that code out.

use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use core::convert::Infallible;
use core::sync::atomic::{AtomicU8, Ordering};

/// The fields of tokens: nothing, or the type without values.
#[cfg(feature = "amx")]
type AmxField = ();
#[cfg(not(feature = "amx"))]
type AmxField = Infallible;
#[cfg(feature = "avx2")]
type Avx2Field = ();
#[cfg(not(feature = "avx2"))]
type Avx2Field = Infallible;
#[cfg(feature = "avx512")]
type Avx512Field = ();
#[cfg(not(feature = "avx512"))]
type Avx512Field = Infallible;

/// The value of a token's field, if there is one.
trait Field: Sized {
    const VALUE: Option<Self>;
}

impl Field for () {
    const VALUE: Option<Self> = Some(());
}

impl Field for Infallible {
    const VALUE: Option<Self> = None;
}

/// The probe has run. The other bits are what it found.
const KNOWN: u8 = 1;
const AVX2: u8 = 2;
const AVX512: u8 = 4;
const AVX512_BF16: u8 = 8;
const AMX_BF16: u8 = 16;
/// In a cycle, VDPBF16PS does no more products than FMA.
const SLOW_VDPBF16PS: u8 = 32;
const AVX_VNNI: u8 = 64;
const AVX512_VNNI: u8 = 128;

/// What [`probe`] found, or 0 before the first call. All threads find the same, so races are harmless.
static FOUND: AtomicU8 = AtomicU8::new(0);

fn found(level: u8) -> bool {
    let mut levels = FOUND.load(Ordering::Relaxed);
    if levels == 0 {
        levels = probe();
        FOUND.store(levels, Ordering::Relaxed);
    }
    levels & level != 0
}

fn probe() -> u8 {
    const fn all(register: u32, bits: &[u32]) -> bool {
        let mut i = 0;
        while i < bits.len() {
            if register >> bits[i] & 1 == 0 {
                return false;
            }
            i += 1;
        }
        true
    }
    let vendor = __cpuid(0);
    if vendor.eax < 7 {
        return KNOWN;
    }
    let one = __cpuid(1).ecx;
    // FMA, XSAVE, OSXSAVE, AVX, F16C
    if !all(one, &[12, 26, 27, 28, 29]) {
        return KNOWN;
    }
    // SAFETY: CPUID has just shown XSAVE and OSXSAVE, bits 26 and 27.
    let xcr0 = unsafe { xcr0() };
    let seven = __cpuid_count(7, 0);
    // The OS saves XMM and YMM; AVX2
    if xcr0 & 0x06 != 0x06 || !all(seven.ebx, &[5]) {
        return KNOWN;
    }
    let one = if seven.eax >= 1 { __cpuid_count(7, 1).eax } else { 0 };
    let avx2 = KNOWN | AVX2 | if all(one, &[4]) { AVX_VNNI } else { 0 };
    // The OS saves mask registers and ZMM; AVX-512 F, DQ, BW, VL
    if xcr0 & 0xe6 != 0xe6 || !all(seven.ebx, &[16, 17, 30, 31]) {
        return avx2;
    }
    let avx512 = avx2 | AVX512 | if all(seven.ecx, &[11]) { AVX512_VNNI } else { 0 };
    if !all(one, &[5]) {
        return avx512;
    }
    // AMX-BF16, AMX-TILE; the OS saves tile configuration and data. Leaves 0x1D and 0x1E, which some virtual machines
    // hide, are not needed: the sizes of palette 1 are architectural.
    let amx = cfg!(feature = "amx") && all(seven.edx, &[22, 24]) && xcr0 & 0x6_0000 == 0x6_0000 && tiles_permitted();
    // Intel's CPUs do one VDPBF16PS in two cycles, and four FMAs in the same time: measured 123 and 246 GFLOP/s.
    let intel = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) == [*b"Genu", *b"ineI", *b"ntel"];
    avx512 | AVX512_BF16 | if amx { AMX_BF16 } else { 0 } | if intel { SLOW_VDPBF16PS } else { 0 }
}

/// Linux lets a process use tile registers, in all its threads, once it has asked by
/// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
#[cfg(target_os = "linux")]
fn tiles_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let status: isize;
    // SAFETY: this system call accesses no memory of the process, and a kernel without it returns an error. SYSCALL
    // changes only RAX, RCX and R11.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

/// Other systems: unknown, so AMX is not used.
#[cfg(not(target_os = "linux"))]
fn tiles_permitted() -> bool {
    false
}

/// The register that says which state the OS saves.
#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: this function enables XSAVE, whose XGETBV can always read XCR0.
    unsafe { _xgetbv(0) }
}

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(Avx2Field);

impl Avx2 {
    /// The proof, if this machine has these instructions.
    pub fn detect() -> Option<Self> {
        Avx2Field::VALUE.filter(|_| found(AVX2)).map(Avx2)
    }

    /// See [`crate::Isa::vectorize`].
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run<R>(op: impl FnOnce() -> R) -> R {
            op()
        }
        // SAFETY: `self` exists only if the CPU has these features and the OS saves their registers.
        unsafe { run(op) }
    }
}

/// Proof of AVX-512 F, BW, DQ and VL (and of AVX2, FMA and F16C).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(Avx512Field);

impl Avx512 {
    /// The proof, if this machine has these instructions.
    pub fn detect() -> Option<Self> {
        Avx512Field::VALUE.filter(|_| found(AVX512)).map(Avx512)
    }

    /// See [`crate::Isa::vectorize`].
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn run<R>(op: impl FnOnce() -> R) -> R {
            op()
        }
        // SAFETY: `self` exists only if the CPU has these features and the OS saves their registers.
        unsafe { run(op) }
    }
}

/// Proof of AVX-VNNI, integer products of bytes in 256 bits (and of [`Avx2`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(Avx2);

impl AvxVnni {
    /// The proof, if this machine has these instructions.
    pub fn detect() -> Option<Self> {
        Avx2::detect().filter(|_| found(AVX_VNNI)).map(AvxVnni)
    }

    /// The proof of the instruction set that this one contains.
    pub fn avx2(self) -> Avx2 {
        self.0
    }

    /// See [`crate::Isa::vectorize`].
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn run<R>(op: impl FnOnce() -> R) -> R {
            op()
        }
        // SAFETY: `self` exists only if the CPU has these features and the OS saves their registers.
        unsafe { run(op) }
    }
}

/// Proof of AVX-512 VNNI, integer products of bytes (and of [`Avx512`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Vnni(Avx512);

impl Avx512Vnni {
    /// The proof, if this machine has these instructions.
    pub fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| found(AVX512_VNNI)).map(Avx512Vnni)
    }

    /// The proof of the instruction set that this one contains.
    pub fn avx512(self) -> Avx512 {
        self.0
    }

    /// See [`crate::Isa::vectorize`].
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn run<R>(op: impl FnOnce() -> R) -> R {
            op()
        }
        // SAFETY: `self` exists only if the CPU has these features and the OS saves their registers.
        unsafe { run(op) }
    }
}

/// Proof of AVX-512 BF16 (and of [`Avx512`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    /// The proof, if this machine has these instructions.
    pub fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| found(AVX512_BF16)).map(Avx512Bf16)
    }

    /// Whether VDPBF16PS does more products in a cycle than FMA: on AMD's CPUs, not on Intel's.
    pub(crate) fn faster_than_fma(self) -> bool {
        !found(SLOW_VDPBF16PS)
    }

    /// The proof of the instruction sets that this one contains.
    pub fn avx512(self) -> Avx512 {
        self.0
    }
}

/// Proof of AMX with bf16 products (and of [`Avx512Bf16`]), and that the process may use its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmxBf16(Avx512Bf16, AmxField);

impl AmxBf16 {
    /// The proof, if this machine has these instructions. On Linux, the first detection of any instruction set asks the
    /// kernel for the tiles.
    pub fn detect() -> Option<Self> {
        let avx512bf16 = Avx512Bf16::detect().filter(|_| found(AMX_BF16))?;
        AmxField::VALUE.map(|field| AmxBf16(avx512bf16, field))
    }

    /// The proof without detection. Only with the feature `amx`.
    ///
    /// # Safety
    /// This machine has what [`Avx512Bf16`] proves, and each thread of this process can execute the instructions of
    /// AMX-TILE and AMX-BF16.
    #[cfg(feature = "amx")]
    pub const unsafe fn new_unchecked() -> Self {
        AmxBf16(Avx512Bf16(Avx512(())), ())
    }

    /// The proof of the instruction sets that this one contains.
    pub fn avx512bf16(self) -> Avx512Bf16 {
        self.0
    }
}
