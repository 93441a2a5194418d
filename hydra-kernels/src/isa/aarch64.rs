//! Tokens that prove an instruction set: they exist only if the target includes the instructions or the CPU has them.

use core::sync::atomic::{AtomicU8, Ordering};

/// Proof of NEON (Advanced SIMD), which is part of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    /// The proof. `None` on big-endian targets, whose order of lanes the kernels do not know.
    pub fn detect() -> Option<Self> {
        cfg!(target_endian = "little").then_some(Neon(()))
    }

    /// See [`crate::Isa::vectorize`]. The whole target is compiled with NEON.
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        super::baseline(op)
    }
}

/// Proof of NEON's bf16 products (FEAT_BF16; and of [`Neon`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonBf16(Neon);

impl NeonBf16 {
    /// The proof, if the target includes these instructions or Linux reports them. Other systems are not asked.
    pub fn detect() -> Option<Self> {
        const AT_HWCAP2: usize = 26;
        const HWCAP2_BF16: usize = 1 << 14;
        static FOUND: AtomicU8 = AtomicU8::new(0);
        let found = || cfg!(target_feature = "bf16") || linux_reports(AT_HWCAP2, HWCAP2_BF16);
        Neon::detect().filter(|_| once(&FOUND, found)).map(NeonBf16)
    }

    /// The proof of the instruction set that this one contains.
    pub fn neon(self) -> Neon {
        self.0
    }
}

/// Proof of NEON's products of bytes (FEAT_DotProd; and of [`Neon`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonDotProd(Neon);

impl NeonDotProd {
    /// The proof, if the target includes these instructions or Linux reports them. Other systems are not asked.
    pub fn detect() -> Option<Self> {
        const AT_HWCAP: usize = 16;
        const HWCAP_ASIMDDP: usize = 1 << 20;
        static FOUND: AtomicU8 = AtomicU8::new(0);
        let found = || cfg!(target_feature = "dotprod") || linux_reports(AT_HWCAP, HWCAP_ASIMDDP);
        Neon::detect().filter(|_| once(&FOUND, found)).map(NeonDotProd)
    }

    /// The proof of the instruction set that this one contains.
    pub fn neon(self) -> Neon {
        self.0
    }

    /// See [`crate::Isa::vectorize`].
    #[inline(always)]
    pub(crate) fn vectorize<R>(self, op: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "neon,dotprod")]
        fn run<R>(op: impl FnOnce() -> R) -> R {
            op()
        }
        // SAFETY: `self` exists only if the CPU has these features.
        unsafe { run(op) }
    }
}

/// What `probe` finds, which is asked only once: `found` keeps it, and is 0 before. All threads find the same, so races
/// are harmless.
fn once(found: &AtomicU8, probe: impl FnOnce() -> bool) -> bool {
    const NO: u8 = 1;
    const YES: u8 = 2;
    let mut answer = found.load(Ordering::Relaxed);
    if answer == 0 {
        answer = if probe() { YES } else { NO };
        found.store(answer, Ordering::Relaxed);
    }
    answer == YES
}

/// Whether an entry of the kernel's auxiliary vector has a bit. `false` if /proc can't be read.
///
/// Reading ID_AA64ISAR0_EL1 and its like would need no file, but is an illegal instruction on kernels before 4.11.
#[cfg(target_os = "linux")]
fn linux_reports(entry: usize, bit: usize) -> bool {
    let mut vector = [[0usize; 2]; 64];
    let entries = read_auxiliary_vector(&mut vector);
    vector[..entries].iter().any(|&[key, value]| key == entry && value & bit != 0)
}

#[cfg(not(target_os = "linux"))]
fn linux_reports(_entry: usize, _bit: usize) -> bool {
    false
}

/// Reads the pairs of key and value in /proc/self/auxv. Returns how many there are.
#[cfg(target_os = "linux")]
fn read_auxiliary_vector(vector: &mut [[usize; 2]; 64]) -> usize {
    const OPENAT: usize = 56;
    const CLOSE: usize = 57;
    const READ: usize = 63;
    const AT_FDCWD: usize = -100isize as usize;
    const O_CLOEXEC: usize = 0o2_000_000;
    let path = c"/proc/self/auxv".as_ptr() as usize;
    // SAFETY: openat reads a path that ends with a zero byte; it opens a file for reading.
    let file = unsafe { system_call(OPENAT, [AT_FDCWD, path, O_CLOEXEC, 0]) };
    let Ok(file) = usize::try_from(file) else { return 0 };
    // SAFETY: read writes at most the size of `vector`, which is borrowed mutably, at its address; any bytes are
    // integers.
    let bytes = unsafe { system_call(READ, [file, vector.as_mut_ptr() as usize, size_of_val(vector), 0]) };
    // SAFETY: `file` was opened above and nobody else knows it.
    unsafe { system_call(CLOSE, [file, 0, 0, 0]) };
    usize::try_from(bytes).unwrap_or(0) / size_of::<[usize; 2]>()
}

/// Linux's system call `number`; a negative result is an error.
///
/// # Safety
/// The call's own contract.
#[cfg(target_os = "linux")]
unsafe fn system_call(number: usize, arguments: [usize; 4]) -> isize {
    let status;
    // SAFETY: SVC changes only x0 and memory as the call is defined to, which is this function's contract.
    unsafe {
        core::arch::asm!(
            "svc #0",
            in("x8") number,
            inlateout("x0") arguments[0] => status,
            in("x1") arguments[1],
            in("x2") arguments[2],
            in("x3") arguments[3],
            options(nostack),
        );
    }
    status
}
