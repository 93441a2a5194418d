//! One strip of A against some panels of B: the `asm!` blocks and what they are told.

use super::{K_STEP, TILE};
use core::arch::asm;
use core::mem::offset_of;
use half::bf16;

/// Palette 1: rows and bytes a row of each of eight tiles.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Sums of `rows` × `cols`, at most 32 each: tiles 0 1 / 2 3, A in 4 and 5 (upper and lower rows), B in 6 and 7.
    pub(super) fn new(rows: usize, cols: usize) -> Self {
        let upper = [rows.min(TILE), rows.saturating_sub(TILE)];
        let left = [cols.min(TILE), cols.saturating_sub(TILE)];
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut set = |tile: usize, rows: usize, bytes: usize| {
            // A tile that isn't used is left out: both numbers zero.
            if rows > 0 && bytes > 0 {
                config.rows[tile] = rows as u8;
                config.row_bytes[tile] = bytes as u16;
            }
        };
        for i in 0..2 {
            set(2 * i, upper[i], 4 * left[0]);
            set(2 * i + 1, upper[i], 4 * left[1]);
            set(4 + i, upper[i], 2 * K_STEP);
            set(6 + i, K_STEP / 2, 4 * left[i]);
        }
        config
    }
}

/// What the `asm!` blocks read: one strip of A against some panels.
#[repr(C)]
pub(super) struct Job {
    pub(super) config: TileConfig,
    /// Sums: the first panel's, from a row to the next, from a panel to the next and from there to the one after.
    pub(super) c: *mut f32,
    pub(super) c_row_bytes: usize,
    pub(super) c_panel_bytes: [isize; 2],
    pub(super) panels: usize,
    pub(super) accumulate: usize,
    /// A's tiles of each part of k: the upper rows' and the lower rows'.
    pub(super) a: [[*const bf16; 2]; 2],
    /// From a row of a tile of A to the next.
    pub(super) a_row_bytes: [usize; 2],
    /// From a tile of A to the next along k.
    pub(super) a_step_bytes: [usize; 2],
    /// The next strip's rows and their distance, to be asked for, two at a panel; never read.
    pub(super) ahead: *const u8,
    pub(super) ahead_row_bytes: usize,
    pub(super) b: [*const bf16; 2],
    /// Steps of 32 along k; the second may be 0.
    pub(super) steps: [usize; 2],
    /// From a panel to the next.
    pub(super) b_panel_bytes: [usize; 2],
    /// Where the last panel's sums go as bf16, the next one's beside them: at first a panel before the first.
    pub(super) rounded: *mut bf16,
    /// 0 if sums stay as they are.
    pub(super) rounded_row_bytes: usize,
    /// Rows to be rounded.
    pub(super) rows: usize,
    /// The last panel's sums that are to be rounded, and their end; both null at first.
    pub(super) pending: *const f32,
    pub(super) pending_end: *const f32,
}

/// Multiplies as `job` says, its strip of `rows` rows, its panels of `width` columns.
///
/// # Safety
/// AMX, AVX-512 F and BF16; the job's pointers reach what its configuration, steps and panels say.
pub(super) unsafe fn run(job: &mut Job, rows: usize, width: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        match (rows > TILE, width > TILE) {
            (true, true) => multiply_2x2(job),
            (true, false) => multiply_2x1(job),
            (false, true) => multiply_1x2(job),
            (false, false) => multiply_1x1(job),
        }
    }
}

/// A row of 32 sums at R8 as bf16 to R10, and on to the next.
macro_rules! round_row {
    () => {
        "vmovups zmm16, [r8 + 64]\nvcvtne2ps2bf16 zmm16, zmm16, [r8]\nvmovups [r10], zmm16\nadd r8, r9\nadd r10, r13"
    };
}

/// One `asm!` block: configure; for each panel sums from zero or from C, both parts of k and, two rows a step, the last panel's
/// sums rounded, sums to C; round the last panel's; release.
///
/// `$zero`, `$load`, `$store` handle the sums; `$step` is one step along k with A's tiles at RSI and R15 and B's at RDX.
macro_rules! multiply {
    ($name:ident, zero: $zero:expr, load: $load:expr, step: $step:expr, store: $store:expr) => {
        /// # Safety
        /// AMX; the job's pointers reach what its configuration, steps and panels say.
        unsafe fn $name(job: &mut Job) {
            // SAFETY: the caller's contract. Only the registers and flags named below are changed, and C.
            unsafe {
                asm!(
                    "ldtilecfg [rdi]",
                    "mov r9, [rdi + {c_row_bytes}]",
                    "mov r12d, 128",
                    "2:",
                    "mov r8, [rdi + {c}]",
                    // RAX: the lower tiles' rows of C.
                    "mov rax, r9",
                    "shl rax, 4",
                    "add rax, r8",
                    "cmp qword ptr [rdi + {accumulate}], 0",
                    "je 3f",
                    $load,
                    "jmp 4f",
                    "3:",
                    $zero,
                    "4:",
                    // R10, R13 from row to row: where the last panel's bf16 go, or the next panel's sums. R8: the last panel's sums.
                    "mov r10, [rdi + {rounded}]",
                    "mov r13, [rdi + {rounded_row_bytes}]",
                    "test r13, r13",
                    "lea rax, [r8 + 128]",
                    "cmovz r10, rax",
                    "cmovz r13, r9",
                    "mov r8, [rdi + {pending}]",
                    "mov rsi, [rdi + {a}]",
                    "mov r15, [rdi + {a} + 8]",
                    "mov r11, [rdi + {a_row_bytes}]",
                    "mov rdx, [rdi + {b}]",
                    "mov rcx, [rdi + {steps}]",
                    "mov rax, [rdi + {ahead}]",
                    "mov r14, [rdi + {ahead_row_bytes}]",
                    "5:",
                    $step,
                    "prefetcht1 [rax]",
                    "prefetcht1 [rax + r14*1]",
                    "add rax, 64",
                    "add rsi, [rdi + {a_step_bytes}]",
                    "add r15, [rdi + {a_step_bytes}]",
                    "add rdx, 2048",
                    "cmp r8, [rdi + {pending_end}]",
                    "je 51f",
                    round_row!(),
                    "cmp r8, [rdi + {pending_end}]",
                    "je 52f",
                    round_row!(),
                    "jmp 52f",
                    "51:",
                    "prefetchw [r10]",
                    "prefetchw [r10 + r13]",
                    "lea r10, [r10 + r13*2]",
                    "52:",
                    "dec rcx",
                    "jnz 5b",
                    "lea rcx, [r14 + r14]",
                    "add [rdi + {ahead}], rcx",
                    "mov rsi, [rdi + {a} + 16]",
                    "mov r15, [rdi + {a} + 24]",
                    "mov r11, [rdi + {a_row_bytes} + 8]",
                    "mov rdx, [rdi + {b} + 8]",
                    "mov rcx, [rdi + {steps} + 8]",
                    "test rcx, rcx",
                    "jz 7f",
                    "6:",
                    $step,
                    "add rsi, [rdi + {a_step_bytes} + 8]",
                    "add r15, [rdi + {a_step_bytes} + 8]",
                    "add rdx, 2048",
                    "dec rcx",
                    "jnz 6b",
                    "7:",
                    // Rows that are left, where k has few steps.
                    "cmp r8, [rdi + {pending_end}]",
                    "je 8f",
                    round_row!(),
                    "jmp 7b",
                    "8:",
                    "mov r8, [rdi + {c}]",
                    "mov rax, r9",
                    "shl rax, 4",
                    "add rax, r8",
                    $store,
                    "cmp qword ptr [rdi + {rounded_row_bytes}], 0",
                    "je 9f",
                    "mov [rdi + {pending}], r8",
                    "mov rax, [rdi + {rows}]",
                    "imul rax, r9",
                    "add rax, r8",
                    "mov [rdi + {pending_end}], rax",
                    "add qword ptr [rdi + {rounded}], 64",
                    "9:",
                    "mov rax, [rdi + {c_panel_bytes}]",
                    "mov rcx, [rdi + {c_panel_bytes} + 8]",
                    "add r8, rax",
                    "mov [rdi + {c}], r8",
                    "mov [rdi + {c_panel_bytes}], rcx",
                    "mov [rdi + {c_panel_bytes} + 8], rax",
                    "mov rax, [rdi + {b_panel_bytes}]",
                    "mov rcx, [rdi + {b_panel_bytes} + 8]",
                    "add [rdi + {b}], rax",
                    "add [rdi + {b} + 8], rcx",
                    "dec qword ptr [rdi + {panels}]",
                    "jnz 2b",
                    // The last panel's rows.
                    "mov r8, [rdi + {pending}]",
                    "mov r10, [rdi + {rounded}]",
                    "mov r13, [rdi + {rounded_row_bytes}]",
                    "21:",
                    "cmp r8, [rdi + {pending_end}]",
                    "je 22f",
                    round_row!(),
                    "jmp 21b",
                    "22:",
                    "tilerelease",
                    c = const offset_of!(Job, c),
                    c_row_bytes = const offset_of!(Job, c_row_bytes),
                    panels = const offset_of!(Job, panels),
                    accumulate = const offset_of!(Job, accumulate),
                    a = const offset_of!(Job, a),
                    a_row_bytes = const offset_of!(Job, a_row_bytes),
                    a_step_bytes = const offset_of!(Job, a_step_bytes),
                    b = const offset_of!(Job, b),
                    steps = const offset_of!(Job, steps),
                    b_panel_bytes = const offset_of!(Job, b_panel_bytes),
                    ahead = const offset_of!(Job, ahead),
                    ahead_row_bytes = const offset_of!(Job, ahead_row_bytes),
                    rounded = const offset_of!(Job, rounded),
                    rounded_row_bytes = const offset_of!(Job, rounded_row_bytes),
                    pending = const offset_of!(Job, pending),
                    pending_end = const offset_of!(Job, pending_end),
                    rows = const offset_of!(Job, rows),
                    c_panel_bytes = const offset_of!(Job, c_panel_bytes),
                    in("rdi") core::ptr::from_mut(job),
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, out("zmm16") _,
                    options(nostack),
                );
            }
        }
    };
}

multiply!(
    multiply_2x2,
    zero: "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3",
    load: "tileloadd tmm0, [r8 + r9*1]\ntileloadd tmm1, [r8 + r9*1 + 64]\n\
           tileloadd tmm2, [rax + r9*1]\ntileloadd tmm3, [rax + r9*1 + 64]",
    step: "tileloaddt1 tmm6, [rdx + r12*1]\ntileloadd tmm4, [rsi + r11*1]\n\
           tileloaddt1 tmm7, [rdx + r12*1 + 64]\ntdpbf16ps tmm0, tmm4, tmm6\n\
           tileloadd tmm5, [r15 + r11*1]\ntdpbf16ps tmm1, tmm4, tmm7\n\
           tdpbf16ps tmm2, tmm5, tmm6\ntdpbf16ps tmm3, tmm5, tmm7",
    store: "tilestored [r8 + r9*1], tmm0\ntilestored [r8 + r9*1 + 64], tmm1\n\
            tilestored [rax + r9*1], tmm2\ntilestored [rax + r9*1 + 64], tmm3"
);

multiply!(
    multiply_2x1,
    zero: "tilezero tmm0\ntilezero tmm2",
    load: "tileloadd tmm0, [r8 + r9*1]\ntileloadd tmm2, [rax + r9*1]",
    step: "tileloaddt1 tmm6, [rdx + r12*1]\ntileloadd tmm4, [rsi + r11*1]\ntdpbf16ps tmm0, tmm4, tmm6\ntileloadd tmm5, [r15 + r11*1]\n\
           tdpbf16ps tmm2, tmm5, tmm6",
    store: "tilestored [r8 + r9*1], tmm0\ntilestored [rax + r9*1], tmm2"
);

multiply!(
    multiply_1x2,
    zero: "tilezero tmm0\ntilezero tmm1",
    load: "tileloadd tmm0, [r8 + r9*1]\ntileloadd tmm1, [r8 + r9*1 + 64]",
    step: "tileloadd tmm4, [rsi + r11*1]\ntileloaddt1 tmm6, [rdx + r12*1]\ntdpbf16ps tmm0, tmm4, tmm6\ntileloaddt1 tmm7, [rdx + r12*1 + 64]\n\
           tdpbf16ps tmm1, tmm4, tmm7",
    store: "tilestored [r8 + r9*1], tmm0\ntilestored [r8 + r9*1 + 64], tmm1"
);

multiply!(
    multiply_1x1,
    zero: "tilezero tmm0",
    load: "tileloadd tmm0, [r8 + r9*1]",
    step: "tileloadd tmm4, [rsi + r11*1]\ntileloaddt1 tmm6, [rdx + r12*1]\ntdpbf16ps tmm0, tmm4, tmm6",
    store: "tilestored [r8 + r9*1], tmm0"
);
