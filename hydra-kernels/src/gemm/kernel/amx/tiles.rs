//! The micro-kernel: `asm!` blocks that multiply one micro-panel of A by some panels of B.

use super::args::Args;
use super::sizes::TILE;
use core::arch::asm;
use core::mem::offset_of;

/// Multiplies a micro-panel of `rows` rows by panels of `width` columns, as `args` says.
///
/// # Safety
/// The CPU has AMX and AVX-512 F and BF16, and the process may use tiles. `args` was made for `rows` and `width`, and
/// has at least one panel and one step in its first block. Its pointers reach all tiles of A, panels of B and sums that
/// its sizes ask for, and its rounded rows if there are any; `c`'s and `rounded`'s can be written, and nothing else
/// refers to them.
pub(super) unsafe fn run(args: &mut Args, rows: usize, width: usize) {
    // SAFETY: the four blocks differ in which tiles they use; by this function's contract those that `rows` and `width`
    // need are configured, and the pointers reach them.
    unsafe {
        match (rows > TILE, width > TILE) {
            (true, true) => multiply_2x2(args),
            (true, false) => multiply_2x1(args),
            (false, true) => multiply_1x2(args),
            (false, false) => multiply_1x1(args),
        }
    }
}

/// Rounds a row of 32 sums at R8 to bf16 at R10, and moves both to the next row.
macro_rules! round_row {
    () => {
        "vmovups zmm16, [r8 + 64]\nvcvtne2ps2bf16 zmm16, zmm16, [r8]\nvmovups [r10], zmm16\nadd r8, r9\nadd r10, r13"
    };
}

/// One `asm!` block. It configures the tiles; for each panel it takes the sums from zero or from C, multiplies both
/// blocks of k while it rounds the last panel's sums, two rows at each step, and stores the sums to C; then it rounds
/// the sums of the last panel and releases the tiles.
///
/// `$zero`, `$load` and `$store` handle the sums; `$step` is one step along k, with A's tiles at RSI and R15, B's at
/// RDX.
macro_rules! multiply {
    ($name:ident, zero: $zero:expr, load: $load:expr, step: $step:expr, store: $store:expr) => {
        /// # Safety
        /// As for [`run`], with rows and columns for which these tiles are configured.
        unsafe fn $name(args: &mut Args) {
            // SAFETY: `run`'s contract covers every address below. The block writes only `args`, the sums and the
            // rounded rows, and changes only the registers that it names and the flags.
            unsafe {
                asm!(
                    "ldtilecfg [rdi]",
                    "mov r9, [rdi + {c_row_bytes}]",
                    "mov r12d, 128",
                    "2:",
                    "mov r8, [rdi + {c}]",
                    // RAX: C of the lower tiles.
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
                    // R10, and R13 between its rows: where the last panel's bf16 go, or the next panel's sums. R8: the
                    // last panel's sums.
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
                    // The rows that are left, if k has few steps.
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
                    // The rows of the last panel.
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
                    c = const offset_of!(Args, c),
                    c_row_bytes = const offset_of!(Args, c_row_bytes),
                    panels = const offset_of!(Args, panels),
                    accumulate = const offset_of!(Args, accumulate),
                    a = const offset_of!(Args, a),
                    a_row_bytes = const offset_of!(Args, a_row_bytes),
                    a_step_bytes = const offset_of!(Args, a_step_bytes),
                    b = const offset_of!(Args, b),
                    steps = const offset_of!(Args, steps),
                    b_panel_bytes = const offset_of!(Args, b_panel_bytes),
                    ahead = const offset_of!(Args, ahead),
                    ahead_row_bytes = const offset_of!(Args, ahead_row_bytes),
                    rounded = const offset_of!(Args, rounded),
                    rounded_row_bytes = const offset_of!(Args, rounded_row_bytes),
                    pending = const offset_of!(Args, pending),
                    pending_end = const offset_of!(Args, pending_end),
                    rows = const offset_of!(Args, rows),
                    c_panel_bytes = const offset_of!(Args, c_panel_bytes),
                    in("rdi") core::ptr::from_mut(args),
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
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
    step: "tileloaddt1 tmm6, [rdx + r12*1]\ntileloadd tmm4, [rsi + r11*1]\ntdpbf16ps tmm0, tmm4, tmm6\n\
           tileloadd tmm5, [r15 + r11*1]\ntdpbf16ps tmm2, tmm5, tmm6",
    store: "tilestored [r8 + r9*1], tmm0\ntilestored [rax + r9*1], tmm2"
);

multiply!(
    multiply_1x2,
    zero: "tilezero tmm0\ntilezero tmm1",
    load: "tileloadd tmm0, [r8 + r9*1]\ntileloadd tmm1, [r8 + r9*1 + 64]",
    step: "tileloadd tmm4, [rsi + r11*1]\ntileloaddt1 tmm6, [rdx + r12*1]\ntdpbf16ps tmm0, tmm4, tmm6\n\
           tileloaddt1 tmm7, [rdx + r12*1 + 64]\ntdpbf16ps tmm1, tmm4, tmm7",
    store: "tilestored [r8 + r9*1], tmm0\ntilestored [r8 + r9*1 + 64], tmm1"
);

multiply!(
    multiply_1x1,
    zero: "tilezero tmm0",
    load: "tileloadd tmm0, [r8 + r9*1]",
    step: "tileloadd tmm4, [rsi + r11*1]\ntileloaddt1 tmm6, [rdx + r12*1]\ntdpbf16ps tmm0, tmm4, tmm6",
    store: "tilestored [r8 + r9*1], tmm0"
);
