//! Products of activations in eight bits with weights in block formats, summed in integers.
//!
//! A row of x is quantized in groups of 32 columns ([`quantize`]): x ≈ d·q with q = round(x / d) from −127 to 127 and
//! d = max |x| / 127, as in GGUF's Q8_1, but with d in f32. Weights are read as they are stored. A group of them is w =
//! a·(c − o) or w = a·c + b, with integer codes c and the format's offset o, or the group's scale a and minimum b. With
//! s = Σ q, a row of W and a row of x give
//!
//! ```text
//! v = a · (Σ c·q − o·s)    or    v = a · Σ c·q + b·s        for each group (Q3_K, Q6_K: for each half group)
//! lane[group mod 8] += d · v                                in the order of the groups
//! y = the sum of the eight lanes
//! ```
//!
//! In IQ4_NL and IQ4_XS, c − o is the number that a code stands for. In Q2_K each half group has a scale and a minimum, of
//! four bits times those of its block: c has the scale in it, and m₀·s₀ + m₁·s₁ takes the place of s.
//!
//! The sums in the brackets, and Q2_K's of minima, are exact. v and the additions to a lane are rounded once, as fused
//! multiply-adds. So a result has the same bits on every instruction set, for one row or for many, and whichever rows are
//! computed beside it.
//!
//! A row of x that has a NaN or an infinity gives NaN. Groups whose largest magnitude is below 2⁻¹⁰⁰ count as zeros.
//!
//! ```
//! use hydra_kernels::q8::{Block, blocks, product, product_scratch, quantize};
//! use hydra_kernels::{Format, Q8Isa, RowOrder, Weight, Workspace};
//!
//! // One row of W, 32 columns: scale 1 (as f16), and the codes 3 and −2 at the columns 0 and 31.
//! let mut block = [0u8; 34];
//! (block[1], block[2], block[33]) = (0x3c, 3, -2i8 as u8);
//! let weight = Weight::new(Format::Q8_0, 1, 32, &block, RowOrder::Natural)?;
//!
//! let (isa, mut x) = (Q8Isa::detect(), [0.0; 32]);
//! (x[0], x[31]) = (127.0, 10.0);
//! let (mut rows, mut y, mut memory) = ([Block::ZERO; blocks(32)], [0.0], [0.0; product_scratch(32).0]);
//! quantize(isa.widened(), &mut rows, 32, &x)?;
//! product(isa, &mut y, weight, 0..1, &rows, &mut Workspace::new(&mut memory))?;
//! assert_eq!(y, [3.0 * 127.0 - 2.0 * 10.0]);
//! # Ok::<(), hydra_kernels::Error>(())
//! ```

mod activations;
#[cfg(target_arch = "x86_64")]
mod groups256;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod neon;
mod panel;
#[cfg(target_arch = "x86_64")]
mod panel256;
mod portable;
#[cfg(target_arch = "x86_64")]
mod quantize256;
#[cfg(target_arch = "x86_64")]
mod row256;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod row_neon;
#[cfg(target_arch = "x86_64")]
mod tile256;
#[cfg(target_arch = "x86_64")]
mod tile512;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod tile_neon;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::{Block, blocks, quantize};
pub use panel::{NR as PANEL_ROWS, PanelGroup};

use crate::error::{Error, at_least, exact, extent, product as times};
use crate::isa::{Isa, Q8Isa};
use crate::quant::{Format, GROUP, Weight, by_block_format};
use crate::workspace::{Scratch, Workspace};
use core::array::from_fn;
use core::ops::Range;
use panel::NR;

/// Lanes that the groups of a row are added to in turn.
const LANES: usize = 8;

/// Rows of x in a tile: its sums, 8 KiB, and its rows stay in L1.
pub const TOKENS: usize = 16;

/// Panels of W that are unpacked at a time: they stay in L2, and a row of x is read once for all of them.
const PANELS: usize = 4;

/// The lanes of a tile: `[lane][row of x][row of W]`.
type Sums = [[[f32; NR]; TOKENS]; LANES];

/// Whether weights of this format can be multiplied: the block formats.
pub const fn serves(format: Format) -> bool {
    format.block_len() > 1
}

/// Memory that [`product`] needs for a weight of `cols` columns.
pub const fn product_scratch(cols: usize) -> Scratch {
    Scratch::lines::<PanelGroup>(panel_groups(PANELS * NR, cols))
}

/// `y` [tokens, rows] = x Wᵀ for the rows `rows` of W; `x` [tokens, [`blocks`]`(cols)`].
///
/// A few rows of x are multiplied by the stored blocks; for more, W is unpacked.
///
/// Returns an error, and writes nothing, if the format isn't a block format ([`serves`]), if the rows do not exist, or
/// if x and y don't fit together. Scratch: [`product_scratch`].
pub fn product(
    isa: Q8Isa,
    y: &mut [f32],
    weight: Weight<'_>,
    rows: Range<usize>,
    x: &[Block],
    workspace: &mut Workspace<'_>,
) -> Result<(), Error> {
    check_weight(weight, &rows)?;
    let (n, cols) = (rows.len(), weight.cols());
    let tokens = tokens(x, cols)?;
    exact("y", times(tokens, n)?, y.len())?;
    workspace.require(product_scratch(cols))?;
    if tokens == 0 || n == 0 {
        return Ok(());
    }
    if tokens <= few_tokens(isa) {
        few_rows(isa, y, weight, rows, x);
        return Ok(());
    }
    let memory = workspace.reborrow().take_lines::<PanelGroup>(panel_groups(PANELS * NR, cols))?;
    for first in rows.clone().step_by(PANELS * NR) {
        let part = first..rows.end.min(first + PANELS * NR);
        let memory = &mut memory[..panel_groups(part.len(), cols)];
        unpack(isa.widened(), memory, weight, part.clone())?;
        multiply(isa, &mut y[first - rows.start..], n, Panels::new(memory, weight, part.len())?, x)?;
    }
    Ok(())
}

/// Groups in the panels of `rows` rows of a weight of `cols` columns.
pub const fn panel_groups(rows: usize, cols: usize) -> usize {
    rows.div_ceil(NR).saturating_mul(cols.div_ceil(GROUP))
}

/// Unpacks the rows `rows` of W into `out` of [`panel_groups`].
///
/// Ranges that follow each other have panels that follow each other if all but the last are multiples of
/// [`PANEL_ROWS`], so several threads may unpack one weight. Returns an error, and writes nothing, if the format isn't
/// a block format, or the rows do not exist.
pub fn unpack(isa: Isa, out: &mut [PanelGroup], weight: Weight<'_>, rows: Range<usize>) -> Result<(), Error> {
    check_weight(weight, &rows)?;
    exact("panels", panel_groups(rows.len(), weight.cols()), out.len())?;
    for (i, panel) in out.chunks_exact_mut((weight.cols() / GROUP).max(1)).enumerate() {
        let first = rows.start + i * NR;
        panel::unpack(isa, panel, weight, first..rows.end.min(first + NR));
    }
    Ok(())
}

/// Rows of W that have been unpacked.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    data: &'a [PanelGroup],
    format: Format,
    rows: usize,
    cols: usize,
}

impl<'a> Panels<'a> {
    /// What [`unpack`] has written for `rows` rows of `weight`. An error if `data` has another length.
    pub fn new(data: &'a [PanelGroup], weight: Weight<'_>, rows: usize) -> Result<Self, Error> {
        check_weight(weight, &(0..rows))?;
        exact("panels", panel_groups(rows, weight.cols()), data.len())?;
        Ok(Self { data, format: weight.format(), rows, cols: weight.cols() })
    }

    /// Rows of W.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of W.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// `y` [tokens, rows] = x Wᵀ for unpacked rows of W; `x` [tokens, [`blocks`]`(cols)`]. A row of y begins `stride`
/// elements after the one before.
///
/// Returns an error, and writes nothing, if x and y don't fit together.
pub fn multiply(isa: Q8Isa, y: &mut [f32], stride: usize, w: Panels<'_>, x: &[Block]) -> Result<(), Error> {
    let tokens = tokens(x, w.cols)?;
    at_least("row stride of y", w.rows, stride)?;
    at_least("y", extent(tokens, w.rows, stride, 1)?, y.len())?;
    let (groups, width) = (w.cols / GROUP, blocks(w.cols));
    let mut sums = [[[[0.0; NR]; TOKENS]; LANES]; 2];
    for token in (0..tokens).step_by(TOKENS) {
        let x = &x[token * width..tokens.min(token + TOKENS) * width];
        for (panels, first) in w.data.chunks(2 * groups).zip((0..).step_by(2 * NR)) {
            let (panel, next) = panels.split_at(groups);
            tiles(isa, &mut sums, w.format, [panel, next], (x, width));
            for (sums, first) in sums.iter().zip((first..w.rows).step_by(NR)) {
                let columns = first..w.rows.min(first + NR);
                let y = y[token * stride..].chunks_mut(stride).take(x.len() / width);
                store(isa.widened(), y.map(|y| &mut y[columns.clone()]), sums);
            }
        }
    }
    Ok(())
}

/// An error unless the weight is in a block format, has columns, and has the rows.
fn check_weight(weight: Weight<'_>, rows: &Range<usize>) -> Result<(), Error> {
    if !serves(weight.format()) || weight.cols() == 0 {
        return Err(Error::Shape("eight-bit products need a weight in a block format"));
    }
    if rows.start > rows.end || rows.end > weight.rows() {
        return Err(Error::Range { operand: "rows", limit: weight.rows(), got: rows.end.max(rows.start) });
    }
    Ok(())
}

/// The rows of x, which has `cols` columns, at least one.
fn tokens(x: &[Block], cols: usize) -> Result<usize, Error> {
    let (width, len) = (blocks(cols), x.len());
    if len.is_multiple_of(width) { Ok(len / width) } else { Err(Error::Block { operand: "x", block: width, got: len }) }
}

/// Whether each half of a group has a scale: Q3_K and Q6_K.
const fn two_scales(bits: u32) -> bool {
    matches!(bits, 3 | 6)
}

/// Whether each half of a group has a minimum, which [`crate::quant::codes`] packs: Q2_K.
const fn two_minima(bits: u32) -> bool {
    bits == 2
}

/// Rows of x that are multiplied by the stored blocks; for more, a panel pays.
const fn few_tokens(isa: Q8Isa) -> usize {
    if matches!(isa, Q8Isa::Portable) { 0 } else { 4 }
}

/// `y` [tokens, rows] = x times the rows `rows` of W, straight from the stored blocks, for at most [`few_tokens`].
fn few_rows(isa: Q8Isa, mut y: &mut [f32], weight: Weight<'_>, rows: Range<usize>, mut x: &[Block]) {
    let (n, width) = (rows.len(), blocks(weight.cols()));
    while !x.is_empty() {
        let tokens = match x.len() / width {
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let (now, later) = core::mem::take(&mut y).split_at_mut(tokens * n);
        let (some, others) = x.split_at(tokens * width);
        match tokens {
            1 => rows_at_once::<1>(isa, now, weight, rows.clone(), some),
            2 => rows_at_once::<2>(isa, now, weight, rows.clone(), some),
            _ => rows_at_once::<4>(isa, now, weight, rows.clone(), some),
        }
        (y, x) = (later, others);
    }
}

/// [`few_rows`] for `T` rows of x.
#[cfg_attr(
    not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon"))),
    allow(unused_variables)
)]
fn rows_at_once<const T: usize>(isa: Q8Isa, y: &mut [f32], weight: Weight<'_>, rows: Range<usize>, x: &[Block]) {
    let (n, width) = (rows.len(), blocks(weight.cols()));
    let (mut y, mut x) = (y.chunks_exact_mut(n), x.chunks_exact(width));
    // y and x have T rows each.
    let y: [&mut [f32]; T] = from_fn(|_| y.next().unwrap_or_default());
    let x: [&[Block]; T] = from_fn(|_| x.next().unwrap_or_default());
    match isa {
        Q8Isa::Portable => unreachable!("few_tokens is 0"),
        #[cfg(target_arch = "x86_64")]
        Q8Isa::Avx2(isa) => row256::products(isa, y, weight, rows.start, x),
        #[cfg(target_arch = "x86_64")]
        Q8Isa::AvxVnni(isa) => row256::products(isa, y, weight, rows.start, x),
        #[cfg(target_arch = "x86_64")]
        Q8Isa::Avx512Vnni(isa) => row256::products(isa, y, weight, rows.start, x),
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        Q8Isa::NeonDotProd(isa) => row_neon::products(isa, y, weight, rows.start, x),
    }
}

/// The lanes of some rows of x, `width` blocks each and at most [`TOKENS`] of them, times a panel and the next one, if
/// that is not empty.
///
/// A tile function has the constants `BITS`, the width of the format's codes, and `MINIMUM`, whether its groups have a
/// minimum. Without one, codes have the offset 2^(BITS − 1). Formats are told apart by their bits, too: [`two_scales`] and
/// [`two_minima`].
fn tiles(isa: Q8Isa, sums: &mut [Sums; 2], format: Format, panels: [&[PanelGroup]; 2], (x, width): (&[Block], usize)) {
    #[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
    macro_rules! vectorized {
        ($isa:ident, $op:expr) => {
            $isa.vectorize(
                #[inline(always)]
                || $op,
            )
        };
    }
    #[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon")))]
    macro_rules! one_by_one {
        ($isa:ident, $tile:path) => {
            sums.iter_mut().zip(panels).for_each(|(sums, panel)| vectorized!($isa, $tile($isa, sums, panel, x, width)))
        };
    }
    macro_rules! tiles {
        ($name:ident, $bytes:literal, $groups:literal, $bits:literal, $minimum:literal) => {
            match isa {
                Q8Isa::Portable => sums
                    .iter_mut()
                    .zip(panels)
                    .for_each(|(sums, panel)| portable::tile::<$bits, $minimum>(sums, panel, x, width)),
                #[cfg(target_arch = "x86_64")]
                Q8Isa::Avx2(isa) => one_by_one!(isa, tile256::tile::<$bits, $minimum>),
                #[cfg(target_arch = "x86_64")]
                Q8Isa::AvxVnni(isa) => one_by_one!(isa, tile256::tile::<$bits, $minimum>),
                #[cfg(target_arch = "x86_64")]
                Q8Isa::Avx512Vnni(isa) => {
                    let [first, second] = sums;
                    if panels[1].is_empty() {
                        vectorized!(isa, tile512::tiles::<$bits, $minimum, 1>(isa, [first], [panels[0]], x, width))
                    } else {
                        vectorized!(isa, tile512::tiles::<$bits, $minimum, 2>(isa, [first, second], panels, x, width))
                    }
                }
                #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
                Q8Isa::NeonDotProd(isa) => one_by_one!(isa, tile_neon::tile::<$bits, $minimum>),
            }
        };
    }
    by_block_format!(format, tiles);
}

/// Rows of y, of the columns of a tile, from the sums of its lanes.
fn store<'a>(isa: Isa, y: impl Iterator<Item = &'a mut [f32]>, sums: &Sums) {
    #[inline(always)]
    fn rows<'a>(y: impl Iterator<Item = &'a mut [f32]>, totals: impl Fn(usize) -> [f32; NR]) {
        for (token, y) in y.enumerate() {
            let totals = totals(token);
            match y.first_chunk_mut::<NR>() {
                Some(y) => *y = totals,
                None => y.copy_from_slice(&totals[..y.len()]),
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    macro_rules! vectorized {
        ($isa:ident, $totals:path) => {
            $isa.vectorize(
                #[inline(always)]
                || {
                    rows(
                        y,
                        #[inline(always)]
                        |token| $totals($isa, sums, token),
                    )
                },
            )
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(isa) => vectorized!(isa, tile256::totals),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(isa) => vectorized!(isa, tile512::totals),
        _ => isa.vectorize(
            #[inline(always)]
            || {
                rows(
                    y,
                    #[inline(always)]
                    |token| portable::totals(sums, token),
                )
            },
        ),
    }
}
