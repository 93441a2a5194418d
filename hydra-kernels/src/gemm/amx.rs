//! 32 × 32 micro-kernel for AMX: TDPBF16PS multiplies a tile of A (16 rows, 32 along k) by one of B (16 pairs along k, 16 columns).
//!
//! Of the eight tile registers four are sums, two hold A and two B, so that each loaded tile is used twice. A strip of 32 rows of
//! A is read where it lies or is rounded and copied once, tile by tile, and passes over all panels of a group in one `asm!`
//! block: tile registers belong to nobody between blocks. Edges need no masks: the configuration says how many rows and columns
//! a tile has.
//!
//! The strip stays in L1 while B's panels come from L2: TILELOADDT1 says of B's tiles that they won't be read again soon. With
//! TILELOADD for both, each pass of a panel drove the strip out, and a product took a quarter longer.
//!
//! Two terms (a frozen product and its adapter's) are summed in the same registers where their strips fit together.

mod load;

use super::avx512bf16::narrow;
use super::{Store, Term, Values};
use crate::isa::AmxBf16;
use core::arch::asm;
use core::mem::MaybeUninit;
use half::bf16;

pub(super) const MR: usize = 32;
pub(super) const NR: usize = 32;
pub(super) const K_STEP: usize = 32;

/// Rows and columns of a tile of sums.
const TILE: usize = 16;

/// bf16 values of a tile of A.
const A_TILE: usize = TILE * K_STEP;

/// A block of k takes at most this many values: a strip of A (36 KiB) then stays in L1 while panels of B pass, and sums are
/// loaded and stored once in 18 steps. 384 and 768 were measured slower.
const K_BLOCK: usize = 576;

/// A second term's block that still joins the first's.
const K_JOINED: usize = 128;

/// Blocks of k that a strip passes through before the next strip: more of them save loads and stores of sums, but leave room for
/// fewer columns in L2, so that A is read more often.
const BLOCKS: usize = 3;

/// B's panels that stay in L2 (of 2 MiB on these machines) while strips of A pass.
const B_BYTES: usize = 1024 * 1024;

/// Palette 1: rows and bytes a row of each of eight tiles.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Sums of `rows` × `cols`, at most 32 each: tiles 0 1 / 2 3, A in 4 and 5 (upper and lower rows), B in 6 and 7.
    fn new(rows: usize, cols: usize) -> Self {
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
struct Job {
    config: TileConfig,
    c: *mut f32,
    c_row_bytes: usize,
    panels: usize,
    accumulate: usize,
    /// A's tiles of each part of k: the upper rows' and the lower rows'.
    a: [[*const bf16; 2]; 2],
    /// From a row of a tile of A to the next.
    a_row_bytes: [usize; 2],
    /// From a tile of A to the next along k.
    a_step_bytes: [usize; 2],
    b: [*const bf16; 2],
    /// Steps of 32 along k; the second may be 0.
    steps: [usize; 2],
    /// From a panel to the next.
    b_panel_bytes: [usize; 2],
}

/// A part of k that a strip holds: rows `first .. first + len` of a term's B.
#[derive(Clone, Copy)]
struct Part<'t, 'a> {
    term: &'t Term<'a, bf16>,
    first: usize,
    len: usize,
}

impl Part<'_, '_> {
    /// Its length in whole steps, in values.
    fn depth(&self) -> usize {
        self.len.next_multiple_of(K_STEP)
    }

    /// The panel that begins at column `j`, from this part's first row on.
    fn panel(&self, j: usize) -> &[bf16] {
        let padded = self.term.b.k.next_multiple_of(K_STEP);
        &self.term.b.data[j * padded + self.first * NR..]
    }
}

/// A's tiles. Written by [`place`] before it is read.
#[repr(align(64))]
struct Strip(MaybeUninit<[bf16; MR * (K_BLOCK + K_JOINED)]>);

impl Strip {
    /// Where the tiles of values `at ..` begin.
    fn at(&mut self, at: usize) -> *mut bf16 {
        assert!(at <= MR * (K_BLOCK + K_JOINED));
        self.0.as_mut_ptr().cast::<bf16>().wrapping_add(at)
    }
}

/// The most and the fewest columns whose sums wait in f32 to be rounded.
const ROUNDED_COLUMNS: usize = 1024;
const ROUNDED_COLUMNS_LEAST: usize = 96;

/// Sums of a strip that is stored as bf16.
#[repr(align(64))]
struct Sums(MaybeUninit<[f32; MR * ROUNDED_COLUMNS]>);

/// C = or += Σ terms, in the order of terms and of k.
pub(super) fn drive(
    isa: AmxBf16,
    c: &mut [f32],
    c_stride: usize,
    m: usize,
    n: usize,
    store: Store,
    terms: &[Term<'_, bf16>],
) {
    let mut strip = Strip(MaybeUninit::uninit());
    let mut store = store;
    let mut done = 0;
    loop {
        let blocks = blocks(terms).skip(done).take(BLOCKS);
        let depth = depth(blocks.clone());
        if depth == 0 {
            return;
        }
        let group = group(depth);
        for first in (0..n).step_by(group) {
            let columns = group.min(n - first);
            for i in (0..m).step_by(MR) {
                let (c, rows) = (&mut c[i * c_stride + first..], MR.min(m - i));
                sweep(isa, c, c_stride, [i, first], [rows, columns], store, &mut strip, blocks.clone());
            }
        }
        store = Store::Accumulate;
        done += BLOCKS;
    }
}

/// [`drive`] into bf16, overwritten. Returns `false`, and does nothing, where k is so long that few columns' panels would stay
/// in L2 and A would be read too often.
pub(super) fn drive_rounded(
    isa: AmxBf16,
    c: &mut [bf16],
    c_stride: usize,
    m: usize,
    n: usize,
    terms: &[Term<'_, bf16>],
) -> bool {
    let depth = depth(blocks(terms));
    let group = group(depth.max(1)).min(ROUNDED_COLUMNS);
    if depth == 0 || group < ROUNDED_COLUMNS_LEAST.min(n) {
        return false;
    }
    let mut strip = Strip(MaybeUninit::uninit());
    let mut sums = Sums(MaybeUninit::uninit());
    let len = MR * group.min(n);
    // SAFETY: `len` floats are inside `Sums` and, once zeroed, initialised.
    let sums = unsafe {
        let sums = sums.0.as_mut_ptr().cast::<f32>();
        sums.write_bytes(0, len);
        core::slice::from_raw_parts_mut(sums, len)
    };
    for first in (0..n).step_by(group) {
        let columns = group.min(n - first);
        for i in (0..m).step_by(MR) {
            let rows = MR.min(m - i);
            let blocks = blocks(terms);
            sweep(isa, sums, columns, [i, first], [rows, columns], Store::Overwrite, &mut strip, blocks);
            for (row, sums) in sums.chunks_exact(columns).enumerate().take(rows) {
                narrow(isa.avx512bf16(), &mut c[(i + row) * c_stride + first..][..columns], sums);
            }
        }
    }
    true
}

/// One strip against some columns' panels, block after block: its sums stay in cache.
#[allow(clippy::too_many_arguments)]
fn sweep<'t, 'a: 't>(
    isa: AmxBf16,
    c: &mut [f32],
    c_stride: usize,
    [i, first]: [usize; 2],
    [rows, columns]: [usize; 2],
    mut store: Store,
    strip: &mut Strip,
    blocks: impl Iterator<Item = Block<'t, 'a>>,
) {
    for parts in blocks {
        let places = place(isa, strip, &parts, i, rows);
        strip_times_panels(isa, c, c_stride, rows, first, columns, store, strip, &parts, places);
        store = Store::Accumulate;
    }
}

/// Columns whose panels, so many values deep, stay in L2.
fn group(depth: usize) -> usize {
    (B_BYTES / (depth * size_of::<bf16>())).max(NR) / NR * NR
}

fn depth<'t, 'a: 't>(blocks: impl Iterator<Item = Block<'t, 'a>>) -> usize {
    blocks.flatten().flatten().map(|part| part.depth()).sum()
}

/// One or two parts that are summed in the same registers.
type Block<'t, 'a> = [Option<Part<'t, 'a>>; 2];

/// All terms, block by block.
fn blocks<'t, 'a>(terms: &'t [Term<'a, bf16>]) -> impl Iterator<Item = Block<'t, 'a>> + Clone {
    let mut parts = terms.iter().filter(|term| term.b.k > 0).flat_map(cut).peekable();
    core::iter::from_fn(move || {
        let part = parts.next()?;
        Some([Some(part), parts.next_if(|next| next.depth() <= K_JOINED)])
    })
}

/// Equal blocks of at most [`K_BLOCK`], whole steps but for the last.
fn cut<'t, 'a>(term: &'t Term<'a, bf16>) -> impl Iterator<Item = Part<'t, 'a>> + Clone {
    let k = term.b.k;
    let block = k.div_ceil(k.div_ceil(K_BLOCK)).next_multiple_of(K_STEP);
    (0..k).step_by(block).map(move |first| Part { term, first, len: block.min(k - first) })
}

/// Where a part of A is.
#[derive(Clone, Copy)]
enum Place<'a> {
    /// In the strip, from this value on, tile by tile: step by step the upper rows' and the lower rows'.
    Strip(usize),
    /// Where it lies: tiles can be loaded from it.
    Operand { data: &'a [bf16], row_stride: usize },
}

/// Rows `i .. i + rows` of A's parts, rounded to bf16 and copied to the strip if they have to be.
fn place<'a>(isa: AmxBf16, strip: &mut Strip, parts: &Block<'_, 'a>, i: usize, rows: usize) -> [Place<'a>; 2] {
    let mut places = [Place::Strip(0); 2];
    let mut used = 0;
    for (part, place) in parts.iter().flatten().zip(&mut places) {
        if let Some(data) = in_place(part, i) {
            *place = Place::Operand { data, row_stride: part.term.a.row_stride };
            continue;
        }
        *place = Place::Strip(used);
        let at = used;
        used += part.depth() * MR;
        assert!(used <= MR * (K_BLOCK + K_JOINED) && rows <= MR);
        // SAFETY: the token proves the features; there is room for the part's tiles.
        unsafe { load::part(isa, strip.at(at), part, i, rows) }
    }
    places
}

/// Whether tiles can be loaded from the operand itself, and as fast: bf16 in whole steps, each row's piece one cache line, and
/// rows that don't crowd into few sets of L1.
fn in_place<'a>(part: &Part<'_, 'a>, i: usize) -> Option<&'a [bf16]> {
    let a = part.term.a;
    let Values::Bf16(data) = a.data else { return None };
    let data = &data[i * a.row_stride + part.first..];
    let row_lines = a.row_stride / K_STEP;
    let lines = a.col_stride == 1
        && a.row_stride.is_multiple_of(K_STEP)
        && part.len.is_multiple_of(K_STEP)
        && data.as_ptr().addr().is_multiple_of(64);
    (lines && !row_lines.is_multiple_of(32)).then_some(data)
}

/// One strip against the panels of `columns` columns from `first` on, the last of which may be narrower.
#[allow(clippy::too_many_arguments)]
fn strip_times_panels(
    _isa: AmxBf16,
    c: &mut [f32],
    c_stride: usize,
    rows: usize,
    first: usize,
    columns: usize,
    store: Store,
    strip: &mut Strip,
    parts: &Block<'_, '_>,
    places: [Place<'_>; 2],
) {
    assert!((1..=MR).contains(&rows) && columns > 0);
    assert!(c.len() >= (rows - 1) * c_stride + columns);
    let whole = columns / NR * NR;
    for (at, width, panels) in [(0, NR, whole / NR), (whole, columns - whole, 1)] {
        if width == 0 || panels == 0 {
            continue;
        }
        let mut job = Job {
            config: TileConfig::new(rows, width),
            c: c[at..].as_mut_ptr(),
            c_row_bytes: c_stride * size_of::<f32>(),
            panels,
            accumulate: usize::from(store == Store::Accumulate),
            a: [[strip.at(0).cast_const(); 2]; 2],
            a_row_bytes: [0; 2],
            a_step_bytes: [0; 2],
            b: [strip.at(0).cast_const(); 2],
            steps: [0; 2],
            b_panel_bytes: [0; 2],
        };
        for (q, part) in parts.iter().enumerate() {
            let Some(part) = part else { continue };
            let panel = part.term.b.k.next_multiple_of(K_STEP) * NR;
            let from = part.panel(first + at);
            assert!(from.len() >= (panels - 1) * panel + part.depth() * NR);
            match places[q] {
                Place::Strip(at) => {
                    job.a[q] = [strip.at(at), strip.at(at + A_TILE)];
                    job.a_row_bytes[q] = K_STEP * size_of::<bf16>();
                    job.a_step_bytes[q] = MR * K_STEP * size_of::<bf16>();
                }
                Place::Operand { data, row_stride } => {
                    assert!(data.len() >= (rows - 1) * row_stride + part.depth());
                    // Without lower rows their tile is neither configured nor loaded.
                    let lower = data.as_ptr().wrapping_add(TILE * row_stride);
                    job.a[q] = [data.as_ptr(), lower];
                    job.a_row_bytes[q] = row_stride * size_of::<bf16>();
                    job.a_step_bytes[q] = K_STEP * size_of::<bf16>();
                }
            }
            job.b[q] = from.as_ptr();
            job.steps[q] = part.depth() / K_STEP;
            job.b_panel_bytes[q] = panel * size_of::<bf16>();
        }
        // SAFETY: the token proves AMX; the asserts are the bounds of C, of A's tiles (`place` has filled both rows of tiles) and of B's panels,
        // and the configuration's rows and columns are the job's.
        unsafe {
            match (rows > TILE, width > TILE) {
                (true, true) => multiply_2x2(&job),
                (true, false) => multiply_2x1(&job),
                (false, true) => multiply_1x2(&job),
                (false, false) => multiply_1x1(&job),
            }
        }
    }
}

/// One `asm!` block: configure; for each panel sums from zero or from C, both parts of k, sums to C; release.
///
/// `$zero`, `$load`, `$store` handle the sums; `$step` is one step along k with A's tiles at RSI and R15 and B's at RDX.
macro_rules! multiply {
    ($name:ident, zero: $zero:expr, load: $load:expr, step: $step:expr, store: $store:expr) => {
        /// # Safety
        /// AMX; the job's pointers reach what its configuration, steps and panels say.
        unsafe fn $name(job: &Job) {
            // SAFETY: the caller's contract. Only the registers and flags named below are changed, and C.
            unsafe {
                asm!(
                    "ldtilecfg [rdi]",
                    "mov r8, [rdi + {c}]",
                    "mov r9, [rdi + {c_row_bytes}]",
                    "mov r10, [rdi + {panels}]",
                    "mov r12d, 128",
                    "mov r13, [rdi + {b}]",
                    "mov r14, [rdi + {b} + 8]",
                    "2:",
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
                    "mov rsi, [rdi + {a}]",
                    "mov r15, [rdi + {a} + 8]",
                    "mov r11, [rdi + {a_row_bytes}]",
                    "mov rdx, r13",
                    "mov rcx, [rdi + {steps}]",
                    "5:",
                    $step,
                    "add rsi, [rdi + {a_step_bytes}]",
                    "add r15, [rdi + {a_step_bytes}]",
                    "add rdx, 2048",
                    "dec rcx",
                    "jnz 5b",
                    "mov rsi, [rdi + {a} + 16]",
                    "mov r15, [rdi + {a} + 24]",
                    "mov r11, [rdi + {a_row_bytes} + 8]",
                    "mov rdx, r14",
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
                    $store,
                    "add r8, 128",
                    "add r13, [rdi + {b_panel_bytes}]",
                    "add r14, [rdi + {b_panel_bytes} + 8]",
                    "dec r10",
                    "jnz 2b",
                    "tilerelease",
                    c = const core::mem::offset_of!(Job, c),
                    c_row_bytes = const core::mem::offset_of!(Job, c_row_bytes),
                    panels = const core::mem::offset_of!(Job, panels),
                    accumulate = const core::mem::offset_of!(Job, accumulate),
                    a = const core::mem::offset_of!(Job, a),
                    a_row_bytes = const core::mem::offset_of!(Job, a_row_bytes),
                    a_step_bytes = const core::mem::offset_of!(Job, a_step_bytes),
                    b = const core::mem::offset_of!(Job, b),
                    steps = const core::mem::offset_of!(Job, steps),
                    b_panel_bytes = const core::mem::offset_of!(Job, b_panel_bytes),
                    in("rdi") job,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
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
