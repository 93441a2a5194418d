//! The loops around AMX's micro-kernel: over blocks of k, groups of B's panels, and micro-panels of A.

use super::a_panel::{APanel, ATiles};
use super::args::Args;
use super::sizes::{A_TILE, BLOCKING, K_STEP, MR, NR, TILE};
use super::tiles;
use crate::gemm::bf16::widen_rows;
use crate::gemm::blocking::{KBlock, Pass, Product, depth};
use crate::gemm::view::{Accumulate, Values};
use crate::isa::{AmxBf16, Isa};
use crate::simd::round::round_slice;
use core::mem::MaybeUninit;
use half::bf16;

/// Bytes of the panels of B that stay in L2, of 2 MiB on these CPUs, while micro-panels of A pass over them.
const B_BYTES: usize = 1024 * 1024;

/// The most columns whose f32 sums are kept while further blocks of k are added, before they are rounded to bf16.
const SUMS_COLUMNS: usize = 1024;

/// The fewest columns for which that pays: with fewer of a deep product in L2, A would be read too often.
const SUMS_COLUMNS_LEAST: usize = 96;

/// The sums of one panel.
const PANEL_SUMS: usize = MR * NR;

/// Room for the sums of a micro-panel of A, before they are rounded.
#[repr(align(64))]
struct SumsRoom<const LEN: usize>([f32; LEN]);

/// The part of C that one micro-panel of A and a group of B's panels give.
#[derive(Clone, Copy)]
struct Region {
    i: usize,
    rows: usize,
    first: usize,
    columns: usize,
}

/// `count` panels of `width` columns each, from panel `first` of a region on.
#[derive(Clone, Copy)]
struct PanelRange {
    first: usize,
    count: usize,
    width: usize,
}

impl Region {
    /// The whole panels, and the last one if it is narrower.
    fn panels(&self) -> impl Iterator<Item = PanelRange> {
        let whole = self.columns / NR;
        let ranges = [
            PanelRange { first: 0, count: whole, width: NR },
            PanelRange { first: whole, count: 1, width: self.columns % NR },
        ];
        ranges.into_iter().filter(|range| range.count > 0 && range.width > 0)
    }
}

/// The f32 sums of a region.
struct Sums<'c> {
    data: &'c mut [f32],
    row_stride: usize,
    /// Elements between two panels: NR if the sums lie in C itself.
    panel_stride: usize,
    /// There is room for two panels only: one is rounded while the sums of the other are computed.
    alternate: bool,
}

impl Sums<'_> {
    /// The index of the first sum of panel `panel`.
    fn start(&self, panel: usize) -> usize {
        if self.alternate { panel % 2 * self.panel_stride } else { panel * self.panel_stride }
    }

    /// Tells the kernel where the sums of some panels are.
    fn describe(&mut self, args: &mut Args, rows: usize, panels: PanelRange) {
        let last = match self.alternate {
            true => (panels.count - 1).min(1) * self.panel_stride,
            false => self.start(panels.first + panels.count - 1),
        };
        assert!(self.data.len() >= last + (rows - 1) * self.row_stride + panels.width);
        let panel_bytes = (self.panel_stride * size_of::<f32>()) as isize;
        let start = self.start(panels.first);
        args.c = self.data[start..].as_mut_ptr();
        args.c_row_bytes = self.row_stride * size_of::<f32>();
        args.c_panel_bytes = if self.alternate { [panel_bytes, -panel_bytes] } else { [panel_bytes; 2] };
    }
}

/// The bf16 result of a region.
struct Rounded<'c> {
    data: &'c mut [bf16],
    row_stride: usize,
}

impl Rounded<'_> {
    /// Has the kernel round the sums of the first `panels` whole panels.
    fn describe(&mut self, args: &mut Args, rows: usize, panels: usize) {
        assert!(self.data.len() >= (rows - 1) * self.row_stride + panels * NR);
        args.rounded = self.data.as_mut_ptr().wrapping_sub(NR);
        args.rounded_row_bytes = self.row_stride * size_of::<bf16>();
    }
}

/// NC: the columns whose panels, `depth` rows deep, stay in L2. Groups are of equal size, since A is read once for
/// each.
fn nc(depth: usize, n: usize) -> usize {
    let most = (B_BYTES / (depth * size_of::<bf16>())).max(NR) / NR * NR;
    n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(NR)
}

/// C = or += Σ terms. Not inlined, so that calls with other instruction sets do not reserve its 44 KiB of stack.
#[inline(never)]
pub(in crate::gemm) fn multiply(isa: AmxBf16, c: &mut [f32], product: &Product<'_, '_, bf16>) {
    let &Product { c_stride, m, n, mut accumulate, terms } = product;
    let mut a = MaybeUninit::uninit();
    let a = APanel::of(&mut a);
    // One block of k at a time through all of C: more columns of fewer rows of B stay in L2, so A is read less often.
    for pass in BLOCKING.passes(terms) {
        let nc = nc(depth(&pass), n);
        for first in (0..n).step_by(nc) {
            for i in (0..m).step_by(MR) {
                let region = Region { i, rows: MR.min(m - i), first, columns: nc.min(n - first) };
                let data = &mut c[i * c_stride + first..];
                let sums = Sums { data, row_stride: c_stride, panel_stride: NR, alternate: false };
                multiply_pass(isa, a, &pass, region, accumulate, (sums, None));
            }
        }
        accumulate = Accumulate::Add;
    }
}

/// [`multiply`] into bf16. The sums of a micro-panel of A stay in f32 until the last pass.
///
/// Returns `false`, and does nothing, where k is so large that the panels of only a few columns would stay in L2.
pub(in crate::gemm) fn multiply_into_bf16(isa: AmxBf16, c: &mut [bf16], product: &Product<'_, '_, bf16>) -> bool {
    let &Product { n, accumulate, terms, .. } = product;
    let depth = BLOCKING.passes(terms).map(|pass| depth(&pass)).sum();
    // With one pass, sums are rounded as soon as they are complete: two panels' worth of room is enough.
    let alternate = accumulate == Accumulate::Overwrite && BLOCKING.passes(terms).nth(1).is_none();
    let nc = if alternate { nc(depth, n) } else { nc(depth, n).min(SUMS_COLUMNS) };
    if nc < SUMS_COLUMNS_LEAST.min(n) {
        return false;
    }
    if alternate {
        sum_and_round::<{ 2 * PANEL_SUMS }>(isa, c, product, nc, true);
    } else {
        sum_and_round::<{ MR * SUMS_COLUMNS }>(isa, c, product, nc, false);
    }
    true
}

/// [`multiply_into_bf16`] with room for `SUMS` f32 on the stack: two panels' sums, which `alternate`, or those of `nc`
/// columns. Not inlined, so that a call reserves only the room that it needs.
#[inline(never)]
fn sum_and_round<const SUMS: usize>(
    isa: AmxBf16,
    c: &mut [bf16],
    product: &Product<'_, '_, bf16>,
    nc: usize,
    alternate: bool,
) {
    let &Product { c_stride, m, n, accumulate, terms } = product;
    let mut a = MaybeUninit::uninit();
    let a = APanel::of(&mut a);
    let mut room = MaybeUninit::<SumsRoom<SUMS>>::uninit();
    let len = PANEL_SUMS * if alternate { 2 } else { nc.min(n).div_ceil(NR) };
    assert!(len <= SUMS);
    // SAFETY: `room` has space for SUMS values, and `len` of them are initialised before they are borrowed.
    let room = unsafe {
        let first = room.as_mut_ptr().cast::<f32>();
        first.write_bytes(0, len);
        core::slice::from_raw_parts_mut(first, len)
    };
    for first in (0..n).step_by(nc) {
        for i in (0..m).step_by(MR) {
            let region = Region { i, rows: MR.min(m - i), first, columns: nc.min(n - first) };
            let c = &mut c[i * c_stride + first..];
            if accumulate == Accumulate::Add {
                widen_region(isa, room, c, c_stride, region);
            }
            let mut accumulate = accumulate;
            let mut passes = BLOCKING.passes(terms).peekable();
            while let Some(pass) = passes.next() {
                let sums = Sums { data: &mut *room, row_stride: NR, panel_stride: PANEL_SUMS, alternate };
                let rounded = match passes.peek() {
                    Some(_) => None,
                    None => Some(Rounded { data: &mut *c, row_stride: c_stride }),
                };
                multiply_pass(isa, a, &pass, region, accumulate, (sums, rounded));
                accumulate = Accumulate::Add;
            }
        }
    }
}

/// The old C of a region as sums, panel by panel.
fn widen_region(isa: AmxBf16, sums: &mut [f32], c: &[bf16], c_stride: usize, Region { rows, columns, .. }: Region) {
    let isa = Isa::Avx512(isa.avx512bf16().avx512());
    for (sums, j) in sums.chunks_mut(PANEL_SUMS).zip((0..columns).step_by(NR)) {
        widen_rows(isa, &mut sums[..rows * NR], NR, &c[j..], c_stride, NR.min(columns - j));
    }
}

/// One micro-panel of A against a group of B's panels; rounds the sums if there is a place for that.
fn multiply_pass(
    isa: AmxBf16,
    a: &mut APanel,
    pass: &Pass<'_, '_, bf16>,
    region: Region,
    accumulate: Accumulate,
    (mut sums, mut rounded): (Sums<'_>, Option<Rounded<'_>>),
) {
    let Region { i, rows, first, columns } = region;
    assert!((1..=MR).contains(&rows) && columns > 0);
    let a_tiles = a.pack(isa, pass, i, rows);
    for panels in region.panels() {
        let mut args = Args::new(rows, panels.width, panels.count, accumulate, a.tiles(0));
        sums.describe(&mut args, rows, panels);
        if let Some(rounded) = &mut rounded
            && panels.width == NR
        {
            rounded.describe(&mut args, rows, panels.count);
        }
        if let Some(block) = &pass[0] {
            (args.ahead, args.ahead_row_bytes) = rows_from(block, i + MR);
        }
        for (q, (block, a_tiles)) in pass.iter().zip(a_tiles).enumerate() {
            let Some(block) = block else { continue };
            describe_a(&mut args, q, a, a_tiles, rows, block.depth);
            describe_b(&mut args, q, block, first + panels.first * NR, panels.count);
        }
        // SAFETY: the token proves AMX and AVX-512 BF16. The `describe` functions asserted that the arguments reach
        // only the sums, the rounded C, tiles of A that `pack` provided and panels of B; `Args::new` configured the
        // tiles for the same rows and width.
        unsafe { tiles::run(&mut args, rows, panels.width) }
        if let Some(rounded) = &mut rounded
            && panels.width < NR
        {
            let sums = sums.data[sums.start(panels.first)..].chunks(sums.row_stride);
            let out = rounded.data[panels.first * NR..].chunks_mut(rounded.row_stride);
            sums.zip(out).take(rows).for_each(|(sums, out)| {
                round_slice(isa.avx512bf16(), &mut out[..panels.width], &sums[..panels.width]);
            });
        }
    }
}

/// Tells the kernel where block `q`'s tiles of A are.
fn describe_a(args: &mut Args, q: usize, panel: &APanel, tiles: ATiles<'_>, rows: usize, depth: usize) {
    match tiles {
        ATiles::Packed(at) => {
            args.a[q] = [panel.tiles(at), panel.tiles(at + A_TILE)];
            args.a_row_bytes[q] = K_STEP * size_of::<bf16>();
            args.a_step_bytes[q] = MR * K_STEP * size_of::<bf16>();
        }
        ATiles::InPlace { data, row_stride } => {
            assert!(data.len() >= (rows - 1) * row_stride + depth);
            // With 16 rows or fewer, the lower tile is neither configured nor loaded.
            let lower = data.as_ptr().wrapping_add(TILE.wrapping_mul(row_stride));
            args.a[q] = [data.as_ptr(), lower];
            args.a_row_bytes[q] = row_stride.wrapping_mul(size_of::<bf16>());
            args.a_step_bytes[q] = K_STEP * size_of::<bf16>();
        }
    }
}

/// Tells the kernel where block `q`'s panels of B are: `panels` of them, from column `j` on.
fn describe_b(args: &mut Args, q: usize, block: &KBlock<'_, '_, bf16>, j: usize, panels: usize) {
    let stride = block.panel_stride(NR);
    let b = block.panel(j, NR);
    assert!(b.len() >= (panels - 1) * stride + block.depth * NR);
    args.b[q] = b.as_ptr();
    args.steps[q] = block.depth / K_STEP;
    args.b_panel_bytes[q] = stride * size_of::<bf16>();
}

/// A block's rows of A from row `i` on, and the distance between them in bytes: for prefetches, so they need not exist.
fn rows_from(block: &KBlock<'_, '_, bf16>, i: usize) -> (*const u8, usize) {
    let (a, at) = (block.a(), block.start(i));
    let row_bytes = |size: usize| a.row_stride.wrapping_mul(size);
    match a.data {
        Values::F32(data) => (data.as_ptr().wrapping_add(at).cast(), row_bytes(size_of::<f32>())),
        Values::Bf16(data) => (data.as_ptr().wrapping_add(at).cast(), row_bytes(size_of::<bf16>())),
    }
}
