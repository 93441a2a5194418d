//! 32 × 32 micro-kernel for AMX: TDPBF16PS multiplies a tile of A (16 rows, 32 along k) by one of B (16 pairs along k, 16 columns).
//!
//! Of the eight tile registers four are sums, two hold A and two B, so that each loaded tile is used twice. A strip of 32 rows of
//! A is read where it lies or is rounded and copied once, tile by tile, and passes over all panels of a group in one `asm!`
//! block (`tiles`): tile registers belong to nobody between blocks. Edges need no masks: the configuration says how many rows
//! and columns a tile has.
//!
//! The strip stays in L1 while B's panels come from L2: TILELOADDT1 says of B's tiles that they won't be read again soon. With
//! TILELOADD for both, each pass of a panel drove the strip out, and a product took a quarter longer. What comes from further
//! away is spread over the time of a strip: the next strip's rows are asked for two at a panel; a panel's sums are rounded and
//! stored two rows a step between the next panel's products, or, where they stay f32, their places are asked for before. Together
//! that is worth another third where A and C come from memory.
//!
//! Two terms (a frozen product and its adapter's) are summed in the same registers where their strips fit together.

mod load;
mod tiles;

use super::avx512bf16::narrow;
use super::convert::widen_rows;
use super::drive::Product;
use super::parts::{Block, Cut, Part, depth};
use super::{Accumulate, Values};
use crate::isa::{AmxBf16, Isa};
use core::mem::MaybeUninit;
use core::ptr::{null, null_mut};
use half::bf16;
use tiles::{Job, TileConfig};

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

/// B's panels that stay in L2 (of 2 MiB on these machines) while strips of A pass.
const B_BYTES: usize = 1024 * 1024;

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

/// The most columns whose sums wait in f32 while other blocks of k are added.
const ROUNDED_COLUMNS: usize = 1024;

/// With fewer columns of a deep product in L2, A would be read too often.
const ROUNDED_COLUMNS_LEAST: usize = 96;

/// A panel's sums, where they don't lie in C.
const PANEL_SUMS: usize = MR * NR;

/// Room for the sums of a strip that is stored as bf16.
#[repr(align(64))]
struct Room(MaybeUninit<[f32; MR * ROUNDED_COLUMNS]>);

/// A strip's sums: in C, or panel by panel in a room of their own.
struct Sums<'c> {
    data: &'c mut [f32],
    row_stride: usize,
    panel_stride: usize,
    /// There is room for two panels, which take turns: each is rounded while the next is multiplied.
    turns: bool,
}

impl Sums<'_> {
    /// Where the sums of panel `panel` begin.
    fn at(&self, panel: usize) -> usize {
        if self.turns { panel % 2 * self.panel_stride } else { panel * self.panel_stride }
    }
}

/// Where a strip's sums go as bf16.
struct Rounded<'c> {
    data: &'c mut [bf16],
    row_stride: usize,
}

/// C = or += Σ terms, in the order of terms and of k.
pub(super) fn drive(isa: AmxBf16, c: &mut [f32], product: &Product<'_, '_, bf16>) {
    let &Product { c_stride, m, n, mut store, terms } = product;
    let mut strip = Strip(MaybeUninit::uninit());
    // A block of k at a time through all of C: more columns of fewer rows of B in L2, so that A is read less often.
    for block in CUT.blocks(terms) {
        let one = core::iter::once(block);
        let group = group(depth(&block), n);
        for first in (0..n).step_by(group) {
            let columns = group.min(n - first);
            for i in (0..m).step_by(MR) {
                let data = &mut c[i * c_stride + first..];
                let sums = Sums { data, row_stride: c_stride, panel_stride: NR, turns: false };
                sweep(isa, sums, None, [i, first], [MR.min(m - i), columns], store, &mut strip, one.clone());
            }
        }
        store = Accumulate::Add;
    }
}

/// [`drive`] into bf16. Returns `false`, and does nothing, where k is so long that few columns' panels would stay in L2 and A would
/// be read too often.
pub(super) fn drive_rounded(isa: AmxBf16, c: &mut [bf16], product: &Product<'_, '_, bf16>) -> bool {
    let &Product { c_stride, m, n, store, terms } = product;
    let depth = CUT.blocks(terms).map(|block| depth(&block)).sum();
    let turns = store == Accumulate::Overwrite && CUT.blocks(terms).nth(1).is_none();
    let group = if turns { group(depth, n) } else { group(depth, n).min(ROUNDED_COLUMNS) };
    if group < ROUNDED_COLUMNS_LEAST.min(n) {
        return false;
    }
    let mut strip = Strip(MaybeUninit::uninit());
    let mut room = Room(MaybeUninit::uninit());
    let len = PANEL_SUMS * if turns { 2 } else { group.min(n).div_ceil(NR) };
    // SAFETY: `len` floats are inside the room and, once zeroed, initialised.
    let room = unsafe {
        let room = room.0.as_mut_ptr().cast::<f32>();
        room.write_bytes(0, len);
        core::slice::from_raw_parts_mut(room, len)
    };
    for first in (0..n).step_by(group) {
        let columns = group.min(n - first);
        for i in (0..m).step_by(MR) {
            let (rows, c) = (MR.min(m - i), &mut c[i * c_stride + first..]);
            if store == Accumulate::Add {
                for (sums, j) in room.chunks_mut(PANEL_SUMS).zip((0..columns).step_by(NR)) {
                    let isa = isa.avx512bf16().avx512();
                    widen_rows(Isa::Avx512(isa), &mut sums[..rows * NR], NR, &c[j..], c_stride, NR.min(columns - j));
                }
            }
            let sums = Sums { data: room, row_stride: NR, panel_stride: PANEL_SUMS, turns };
            let out = Rounded { data: c, row_stride: c_stride };
            sweep(isa, sums, Some(out), [i, first], [rows, columns], store, &mut strip, CUT.blocks(terms));
        }
    }
    true
}

/// One strip against some columns' panels, block after block: its sums stay in cache. The last block's are rounded, if wanted.
#[allow(clippy::too_many_arguments)]
fn sweep<'t, 'a: 't>(
    isa: AmxBf16,
    mut sums: Sums<'_>,
    mut rounded: Option<Rounded<'_>>,
    [i, first]: [usize; 2],
    size: [usize; 2],
    mut store: Accumulate,
    strip: &mut Strip,
    blocks: impl Iterator<Item = Block<'t, 'a, bf16>>,
) {
    let mut blocks = blocks.peekable();
    while let Some(parts) = blocks.next() {
        let places = place(isa, strip, &parts, i, size[0]);
        let rounded = if blocks.peek().is_none() { rounded.take() } else { None };
        strip_times_panels(isa, &mut sums, rounded, size, [i, first], store, strip, &parts, places);
        store = Accumulate::Add;
    }
}

/// Columns whose panels, so many values deep, stay in L2: equal parts of `n`, since A is read once for each.
fn group(depth: usize, n: usize) -> usize {
    let most = (B_BYTES / (depth * size_of::<bf16>())).max(NR) / NR * NR;
    n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(NR)
}

/// Blocks whose strips stay in L1.
const CUT: Cut = Cut { step: K_STEP, most: K_BLOCK, joined: K_JOINED };

/// A part's rows of A from row `i` on, and their distance in bytes; nothing is read.
fn rows_from(part: &Part<'_, '_, bf16>, i: usize) -> (*const u8, usize) {
    let (a, at) = (part.a(), part.start(i));
    let distance = |size: usize| a.row_stride.wrapping_mul(size);
    match a.data {
        Values::F32(data) => (data.as_ptr().wrapping_add(at).cast(), distance(size_of::<f32>())),
        Values::Bf16(data) => (data.as_ptr().wrapping_add(at).cast(), distance(size_of::<bf16>())),
    }
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
fn place<'a>(isa: AmxBf16, strip: &mut Strip, parts: &Block<'_, 'a, bf16>, i: usize, rows: usize) -> [Place<'a>; 2] {
    let mut places = [Place::Strip(0); 2];
    let mut used = 0;
    for (part, place) in parts.iter().flatten().zip(&mut places) {
        if let Some(data) = in_place(part, i) {
            *place = Place::Operand { data, row_stride: part.a().row_stride };
            continue;
        }
        *place = Place::Strip(used);
        let at = used;
        used += part.depth * MR;
        assert!(used <= MR * (K_BLOCK + K_JOINED) && rows <= MR);
        // SAFETY: the token proves the features; there is room for the part's tiles.
        unsafe { load::part(isa, strip.at(at), part, i, rows) }
    }
    places
}

/// Whether tiles can be loaded from the operand itself, and as fast: bf16 in whole steps, each row's piece one cache line, and
/// rows that don't crowd into few sets of L1.
fn in_place<'a>(part: &Part<'_, 'a, bf16>, i: usize) -> Option<&'a [bf16]> {
    let a = part.a();
    let Values::Bf16(data) = a.data else { return None };
    let data = &data[i * a.row_stride + part.first..];
    let row_lines = a.row_stride / K_STEP;
    let lines = a.col_stride == 1
        && a.row_stride.is_multiple_of(K_STEP)
        && part.len.is_multiple_of(K_STEP)
        && data.as_ptr().addr().is_multiple_of(64);
    (lines && !row_lines.is_multiple_of(32)).then_some(data)
}

/// One strip of `rows` rows against the panels of `columns` columns from `first` on, the last of which may be narrower.
#[allow(clippy::too_many_arguments)]
fn strip_times_panels(
    isa: AmxBf16,
    sums: &mut Sums<'_>,
    mut rounded: Option<Rounded<'_>>,
    [rows, columns]: [usize; 2],
    [i, first]: [usize; 2],
    store: Accumulate,
    strip: &mut Strip,
    parts: &Block<'_, '_, bf16>,
    places: [Place<'_>; 2],
) {
    assert!((1..=MR).contains(&rows) && columns > 0);
    let whole = columns / NR;
    for (done, panels, width) in [(0, whole, NR), (whole, 1, columns % NR)] {
        if width == 0 || panels == 0 {
            continue;
        }
        let last = if sums.turns { (panels - 1).min(1) * sums.panel_stride } else { sums.at(done + panels - 1) };
        assert!(sums.data.len() >= last + (rows - 1) * sums.row_stride + width);
        let first_sums = sums.at(done);
        let panel_bytes = (sums.panel_stride * size_of::<f32>()) as isize;
        let mut job = Job {
            config: TileConfig::new(rows, width),
            c: sums.data[first_sums..].as_mut_ptr(),
            c_row_bytes: sums.row_stride * size_of::<f32>(),
            c_panel_bytes: if sums.turns { [panel_bytes, -panel_bytes] } else { [panel_bytes; 2] },
            panels,
            accumulate: usize::from(store == Accumulate::Add),
            a: [[strip.at(0).cast_const(); 2]; 2],
            a_row_bytes: [0; 2],
            a_step_bytes: [0; 2],
            ahead: strip.at(0).cast_const().cast(),
            ahead_row_bytes: 0,
            b: [strip.at(0).cast_const(); 2],
            steps: [0; 2],
            b_panel_bytes: [0; 2],
            rounded: null_mut(),
            rounded_row_bytes: 0,
            rows,
            pending: null(),
            pending_end: null(),
        };
        if let Some(out) = &mut rounded
            && width == NR
        {
            assert!(out.data.len() >= (rows - 1) * out.row_stride + panels * NR);
            job.rounded = out.data.as_mut_ptr().wrapping_sub(NR);
            job.rounded_row_bytes = out.row_stride * size_of::<bf16>();
        }
        if let Some(part) = &parts[0] {
            (job.ahead, job.ahead_row_bytes) = rows_from(part, i + MR);
        }
        for (q, part) in parts.iter().enumerate() {
            let Some(part) = part else { continue };
            let panel = part.panel_stride(NR);
            let from = part.panel(first + done * NR, NR);
            assert!(from.len() >= (panels - 1) * panel + part.depth * NR);
            match places[q] {
                Place::Strip(at) => {
                    job.a[q] = [strip.at(at), strip.at(at + A_TILE)];
                    job.a_row_bytes[q] = K_STEP * size_of::<bf16>();
                    job.a_step_bytes[q] = MR * K_STEP * size_of::<bf16>();
                }
                Place::Operand { data, row_stride } => {
                    assert!(data.len() >= (rows - 1) * row_stride + part.depth);
                    // Without lower rows their tile is neither configured nor loaded.
                    let lower = data.as_ptr().wrapping_add(TILE.wrapping_mul(row_stride));
                    job.a[q] = [data.as_ptr(), lower];
                    job.a_row_bytes[q] = row_stride.wrapping_mul(size_of::<bf16>());
                    job.a_step_bytes[q] = K_STEP * size_of::<bf16>();
                }
            }
            job.b[q] = from.as_ptr();
            job.steps[q] = part.depth / K_STEP;
            job.b_panel_bytes[q] = panel * size_of::<bf16>();
        }
        // SAFETY: the token proves AMX; the asserts are the bounds of the sums, of what is rounded, of A's tiles (`place` has filled
        // both rows of tiles) and of B's panels, and the configuration's rows and columns are the job's.
        unsafe { tiles::run(&mut job, rows, width) }
        if let Some(out) = &mut rounded
            && width < NR
        {
            let sums = sums.data[first_sums..].chunks(sums.row_stride);
            let out = out.data[done * NR..].chunks_mut(out.row_stride);
            sums.zip(out)
                .take(rows)
                .for_each(|(sums, out)| narrow(isa.avx512bf16(), &mut out[..width], &sums[..width]));
        }
    }
}
