//! Products from every source and element type, at any strides and at the edges of tiles and blocks; the same bits
//! however C is cut.

use crate::support::{TestElement, assert_within, bits, cases, dot, isas, tolerance, values};
use half::bf16;
use hydra_kernels::{
    Accumulate, Bf16Isa, Error, Format, K_ALIGN, MatRef, PANEL_ALIGN, Panels, RowOrder, Source, Term, Values, Weight,
    gemm, matvec, pack, panels_len, to_bf16,
};
use proptest::prelude::*;

/// 0, 1, and the neighbourhood of tiles' edges: 4, 6, 8, 12, 16 and 32.
const SIZES: [usize; 17] = [0, 1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 65, 130];
/// The same for stretches (256), blocks of k (384, 576, 768) and the longest second term that joins the first (128).
const DEPTHS: [usize; 19] = [0, 1, 2, 7, 8, 31, 33, 127, 129, 255, 257, 383, 385, 769, 771, 1537, 64, 2801, 5505];

fn size() -> impl Strategy<Value = usize> {
    prop::sample::select(&SIZES[..])
}

fn depth() -> impl Strategy<Value = usize> {
    prop::sample::select(&DEPTHS[..])
}

/// The layout of an operand.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Rows,
    Columns,
    Padded,
}

fn layout() -> impl Strategy<Value = Layout> {
    prop::sample::select(vec![Layout::Rows, Layout::Columns, Layout::Padded])
}

/// The distances between rows and between columns.
fn strides(layout: Layout, rows: usize, cols: usize) -> (usize, usize) {
    // With one row or column the distance is never used, so it may be of any size.
    let step = |len: usize, count: usize| if count == 1 { usize::MAX } else { len };
    match layout {
        Layout::Rows => (step(cols, rows), 1),
        Layout::Columns => (1, step(rows, cols)),
        Layout::Padded => (2 * cols + 3, 2),
    }
}

fn room(rows: usize, cols: usize, (row, col): (usize, usize)) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
}

/// A product of two terms.
#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    accumulate: Accumulate,
    /// k, and the layouts of A and B.
    terms: [(usize, Layout, Layout); 2],
    /// Columns between two rows of C that do not belong to it.
    gap: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let terms = [(depth(), layout(), layout()), (depth(), layout(), layout())];
    let accumulate = prop::sample::select(vec![Accumulate::Overwrite, Accumulate::Add]);
    (size(), size(), accumulate, terms, 0..3usize, any::<u64>()).prop_map(|(m, n, accumulate, terms, gap, seed)| Case {
        m,
        n,
        accumulate,
        terms,
        gap,
        seed,
    })
}

/// B is packed times this, which is exact in bf16.
const SCALE: f32 = 0.5;

/// A matrix at any strides, in both element types; its values are exact in either.
struct Matrix {
    data: Vec<f32>,
    narrow: Vec<bf16>,
    strides: (usize, usize),
}

impl Matrix {
    fn new(rows: usize, cols: usize, layout: Layout, seed: u64) -> Matrix {
        let strides = strides(layout, rows, cols);
        let data = values(room(rows, cols, strides), seed);
        Matrix { narrow: narrow(&data), data, strides }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        f64::from(self.data[row * self.strides.0 + col * self.strides.1])
    }

    fn values(&self, as_f32: bool) -> Values<'_> {
        if as_f32 { Values::F32(&self.data) } else { Values::Bf16(&self.narrow) }
    }
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// B [k, n] in panels.
fn packed<E: TestElement>(isa: E::Isa, k: usize, n: usize, source: Source<'_>, scale: f32) -> Vec<E> {
    let mut panels = vec![<E as TestElement>::from(f32::NAN); panels_len::<E>(isa, k, n)];
    pack(isa, &mut panels, k, n, source, scale).unwrap();
    panels
}

/// B [k, n], row-major.
fn row_major(data: &[f32], n: usize) -> Source<'_> {
    Source::Dense { data: Values::F32(data), k_stride: n, n_stride: 1 }
}

/// Multiplies into f32 and into bf16, and holds both to an f64 sum.
fn check<E: TestElement>(isa: E::Isa, case: Case) {
    let Case { m, n, accumulate, terms, gap, seed } = case;
    let operands: Vec<(Matrix, Matrix)> = (0..)
        .zip(terms)
        .map(|(t, (k, a, b))| (Matrix::new(m, k, a, seed ^ 1 ^ t), Matrix::new(k, n, b, seed ^ 100 ^ t)))
        .collect();
    let panels: Vec<Vec<E>> = (0..)
        .zip(operands.iter().zip(terms))
        .map(|(t, ((_, b), (k, ..)))| {
            let data = b.values(seed >> 2 >> t & 1 == 0);
            packed(isa, k, n, Source::Dense { data, k_stride: b.strides.0, n_stride: b.strides.1 }, SCALE)
        })
        .collect();
    let products: Vec<Term<'_, E>> = (0..)
        .zip(operands.iter().zip(terms).zip(&panels))
        .map(|(t, (((a, _), (k, ..)), panels))| {
            let (row_stride, col_stride) = a.strides;
            let a = MatRef { data: a.values(seed >> t & 1 == 0), row_stride, col_stride };
            Term { a, b: Panels::new(panels, k, n) }
        })
        .collect();
    let c_stride = n + gap;
    let old = values(m * c_stride, seed);
    let (mut c, mut narrow_c) = (old.clone(), narrow(&old));
    gemm(isa, &mut c[..], c_stride, m, n, accumulate, &products).unwrap();
    gemm(isa, &mut narrow_c[..], c_stride, m, n, accumulate, &products).unwrap();

    let k_sum = terms.iter().map(|term| term.0).sum();
    for (at, &old) in old.iter().enumerate() {
        let (i, j) = (at / c_stride, at % c_stride);
        if j >= n {
            assert_eq!(c[at].to_bits(), old.to_bits(), "{isa:?}: wrote between rows");
            assert_eq!(narrow_c[at].to_f32(), old, "{isa:?}: wrote between rows");
            continue;
        }
        let kept = if accumulate == Accumulate::Add { f64::from(old) } else { 0.0 };
        let terms = operands.iter().zip(terms);
        let products = terms.flat_map(|((a, b), (k, ..))| (0..k).map(move |p| (a.at(i, p), b.at(p, j))));
        let (want, size) = dot(products.map(|(a, b)| (a, b * f64::from(SCALE))).chain([(kept, 1.0)]));
        let allowed = tolerance::product(k_sum) * size;
        assert_within(|| format!("{isa:?} {case:?} [{i}, {j}]"), c[at], want, allowed);
        let allowed = allowed + want.abs() * tolerance::BF16;
        assert_within(|| format!("{isa:?} {case:?} [{i}, {j}] bf16"), narrow_c[at].to_f32(), want, allowed);
    }
}

/// A bf16 product rounds f32 operands to the nearest bf16, ties to even.
#[test]
fn f32_operands_are_rounded() {
    let (m, k) = (3, 70);
    let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let transposed: Vec<f32> = (0..k * m).map(|i| x[i % m * k + i / m]).collect();
    for isa in bf16::isas() {
        let panels = packed::<bf16>(isa, k, k, row_major(&identity(k), k), 1.0);
        for a in [MatRef::row_major(&x[..], k), MatRef::transposed(&transposed[..], m)] {
            let mut c = vec![f32::NAN; m * k];
            let term = Term { a, b: Panels::new(&panels, k, k) };
            gemm(isa, &mut c[..], k, m, k, Accumulate::Overwrite, &[term]).unwrap();
            assert!(c.iter().zip(&x).all(|(&c, &x)| c == bf16::from_f32(x).to_f32()), "{isa:?}");
        }
    }
}

fn identity(k: usize) -> Vec<f32> {
    (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect()
}

/// An operand that starts at a cache line may be read in place; its product is the same.
#[test]
fn an_operands_alignment_changes_nothing() {
    let (m, n) = (45, 70);
    for k in [32, 96, 576, 800] {
        let b = values(k * n, 3);
        let x = narrow(&values(m * k, 2));
        for isa in bf16::isas() {
            let panels = packed::<bf16>(isa, k, n, row_major(&b, n), 1.0);
            let results = [0, 1, 16].map(|offset| {
                let mut room = vec![bf16::NAN; m * k + 64];
                let first = room.as_ptr().align_offset(64) + offset;
                room[first..first + m * k].copy_from_slice(&x);
                let mut c = vec![f32::NAN; m * n];
                let a = MatRef::row_major(&room[first..first + m * k], k);
                let term = Term { a, b: Panels::new(&panels, k, n) };
                gemm(isa, &mut c[..], n, m, n, Accumulate::Overwrite, &[term]).unwrap();
                c
            });
            assert!(results[0].iter().all(|c| c.is_finite()));
            assert_eq!(bits(&results[0]), bits(&results[1]), "{isa:?}");
            assert_eq!(bits(&results[0]), bits(&results[2]), "{isa:?}");
        }
    }
}

/// An operand may repeat one column.
#[test]
fn an_operand_of_equal_columns() {
    let (m, k, n) = (4, 1000, 40);
    let x = narrow(&[1.0, -2.0, 3.0, 0.5]);
    for isa in bf16::isas() {
        let panels = packed::<bf16>(isa, k, n, row_major(&vec![1.0; k * n], n), 1.0);
        let a = MatRef { data: Values::Bf16(&x), row_stride: 1, col_stride: 0 };
        let mut c = vec![f32::NAN; m * n];
        let term = Term { a, b: Panels::new(&panels, k, n) };
        gemm(isa, &mut c[..], n, m, n, Accumulate::Overwrite, &[term]).unwrap();
        for (c, x) in c.chunks(n).zip(&x) {
            assert!(c.iter().all(|&c| c == 1000.0 * x.to_f32()), "{isa:?}");
        }
    }
}

/// A product with some rows and columns of what was packed is that with a matrix of them.
fn parts<E: TestElement>() {
    let (m, k, n) = (29, 3 * K_ALIGN + 5, 2 * PANEL_ALIGN + 9);
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    for isa in E::isas() {
        let whole = packed::<E>(isa, k, n, row_major(&b, n), 1.0);
        let whole = Panels::new(&whole, k, n);
        for rows in [0..k, 0..K_ALIGN, K_ALIGN..3 * K_ALIGN, 2 * K_ALIGN..k, K_ALIGN..K_ALIGN] {
            for columns in [0..n, 0..PANEL_ALIGN, PANEL_ALIGN..2 * PANEL_ALIGN, 2 * PANEL_ALIGN..n] {
                let (part_k, part_n) = (rows.len(), columns.len());
                let source =
                    Source::Dense { data: Values::F32(&b[rows.start * n + columns.start..]), k_stride: n, n_stride: 1 };
                let alone = packed::<E>(isa, part_k, part_n, source, 1.0);
                let part = whole.part(isa, rows.clone(), columns).unwrap();
                let multiply = |b| {
                    let (mut c, mut narrow_c) = (vec![0.5; m * part_n], vec![bf16::ONE; m * part_n]);
                    let term =
                        Term { a: MatRef { data: Values::F32(&a[rows.start..]), row_stride: k, col_stride: 1 }, b };
                    gemm(isa, &mut c[..], part_n, m, part_n, Accumulate::Add, &[term]).unwrap();
                    gemm(isa, &mut narrow_c[..], part_n, m, part_n, Accumulate::Overwrite, &[term]).unwrap();
                    (bits(&c), narrow_c)
                };
                assert_eq!(multiply(part), multiply(Panels::new(&alone, part_k, part_n)), "{isa:?}");
            }
        }
        let block = |operand, block, got| Some(Error::Block { operand, block, got });
        let range = |operand, limit, got| Some(Error::Range { operand, limit, got });
        assert_eq!(whole.part(isa, 1..k, 0..n).err(), block("rows of b", K_ALIGN, 1), "{isa:?}");
        assert_eq!(whole.part(isa, 0..k, 0..n - 1).err(), block("columns of b", PANEL_ALIGN, n - 1), "{isa:?}");
        assert_eq!(whole.part(isa, 0..k + 1, 0..n).err(), range("rows of b", k, k + 1), "{isa:?}");
        let short = Panels { data: &whole.data[..1], ..whole };
        assert!(matches!(short.part(isa, 0..k, PANEL_ALIGN..n), Err(Error::Length { operand: "b", .. })), "{isa:?}");
        let last = Panels { data: &whole.data[..whole.data.len() - 1], ..whole };
        for rows in [0..k, 3 * K_ALIGN..k] {
            let part = last.part(isa, rows.clone(), 0..n);
            assert!(matches!(part, Err(Error::Length { operand: "b", .. })), "{isa:?}");
            assert!(last.part(isa, rows, 0..PANEL_ALIGN).is_ok(), "{isa:?}");
        }
        for wrong in [Panels { packed_k: k - 1, ..whole }, Panels { packed_k: usize::MAX, ..whole }, short] {
            let mut c = vec![7.0; m * n];
            let term = Term { a: MatRef::row_major(&a[..], k), b: wrong };
            assert!(gemm(isa, &mut c[..], n, m, n, Accumulate::Overwrite, &[term]).is_err(), "{isa:?}");
            assert!(c.iter().all(|&c| c == 7.0));
        }
    }
}

#[test]
fn parts_of_panels() {
    parts::<f32>();
    parts::<bf16>();
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn products_of_f32(case in case()) {
        for isa in f32::isas() {
            check::<f32>(isa, case);
        }
    }

    #[test]
    fn products_of_bf16(case in case()) {
        for isa in bf16::isas() {
            check::<bf16>(isa, case);
        }
    }
}

/// A term without rows needs no panels, also beside a product that is summed tile by tile.
fn empty_term<E: TestElement>() {
    let (k, n) = (2048, 200);
    let (a, b) = (values(k, 1), values(k * n, 2));
    for isa in E::isas() {
        let panels = packed::<E>(isa, k, n, row_major(&b, n), 1.0);
        let whole = Term { a: MatRef::row_major(&a[..], k), b: Panels::new(&panels, k, n) };
        let empty = Term { a: MatRef::row_major(&[] as &[f32], 0), b: Panels { data: &[], k: 0, n, packed_k: 32 } };
        let product = |terms: &[Term<'_, E>]| {
            let mut c = vec![bf16::NAN; n];
            gemm(isa, &mut c[..], n, 1, n, Accumulate::Overwrite, terms).unwrap();
            c
        };
        let want = product(&[whole]);
        assert_eq!(product(&[whole, empty]), want, "{isa:?}");
        assert_eq!(product(&[empty, whole]), want, "{isa:?}");
    }
}

#[test]
fn terms_without_rows() {
    empty_term::<f32>();
    empty_term::<bf16>();
}

/// The same bits whether C is computed whole or in pieces.
fn cut_anywhere<E: TestElement>() {
    let (m, n, k) = (69, 2 * PANEL_ALIGN + 7, 801);
    let a = values(m * k, 1);
    let w = values(n * k, 2);
    let weight = Weight::from_f32(n, k, &w).unwrap();
    for isa in E::isas() {
        let product = |rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| {
            let (m, n) = (rows.len(), columns.len());
            let panels = packed::<E>(isa, k, n, Source::WeightRows { weight, first: columns.start }, 1.0);
            let mut c = vec![f32::NAN; m * n];
            let a = MatRef::row_major(&a[rows.start * k..rows.end * k], k);
            let b = Panels::new(&panels, k, n);
            gemm(isa, &mut c[..], n, m, n, Accumulate::Overwrite, &[Term { a, b }]).unwrap();
            c
        };
        let whole = product(0..m, 0..n);
        for rows in [0..1, 1..13, 13..69] {
            for columns in [0..PANEL_ALIGN, PANEL_ALIGN..n, 3..4] {
                let part = product(rows.clone(), columns.clone());
                for (i, row) in rows.clone().enumerate() {
                    let want = &whole[row * n + columns.start..row * n + columns.end];
                    let got = &part[i * columns.len()..][..columns.len()];
                    assert_eq!(bits(want), bits(got), "{isa:?}");
                }
            }
        }
    }
}

#[test]
fn pieces_have_the_same_bits() {
    cut_anywhere::<f32>();
    cut_anywhere::<bf16>();
}

/// A subnormal sum is rounded the same way however many columns C has.
#[test]
fn subnormal_sums_are_rounded_alike() {
    let k = 3000;
    let mut x = vec![0.0; k];
    x[0] = 1.5 * f32::MIN_POSITIVE;
    for isa in bf16::isas() {
        let product = |n: usize| {
            let panels = packed::<bf16>(isa, k, n, row_major(&vec![1.0; k * n], n), 1.0);
            let mut c = vec![bf16::from_f32(-f32::MIN_POSITIVE); n];
            let term = Term { a: MatRef::row_major(&x[..], k), b: Panels::new(&panels, k, n) };
            gemm(isa, &mut c[..], n, 1, n, Accumulate::Add, &[term]).unwrap();
            c
        };
        let few = product(PANEL_ALIGN);
        assert!(product(8 * PANEL_ALIGN).chunks(PANEL_ALIGN).all(|c| c == few), "{isa:?}");
    }
}

/// Frozen weights, by rows and by columns, against `decode_row`.
#[test]
fn weights_pack_as_they_decode() {
    let (rows, cols) = (70, 512);
    for format in Format::ALL {
        let data = crate::quant::blocks(format, rows * cols / format.block_len());
        for order in [RowOrder::Natural, RowOrder::Interleaved { head_dim: 14 }] {
            let weight = Weight::new(format, rows, cols, &data, order).unwrap();
            let mut decoded = vec![0.0; rows * cols];
            for isa in isas() {
                for (row, out) in decoded.chunks_mut(cols).enumerate() {
                    weight.decode_row(isa, row, 0, out);
                }
                let (n, k, first) = (37, cols - 32, 32);
                let source = Source::WeightRows { weight, first };
                assert_panels::<f32>(isa, k, n, source, |p, j| decoded[(first + j) * cols + p]);
                let source = Source::WeightCols { weight, first };
                assert_panels::<f32>(isa, rows - 1, cols - 2 * first - 1, source, |p, j| decoded[p * cols + first + j]);
            }
            for isa in bf16::isas() {
                let rounded = |row: usize, column: usize| bf16::from_f32(decoded[row * cols + column]);
                for (first, k) in [(0, cols), (33, 70)] {
                    let source = Source::WeightRows { weight, first };
                    assert_panels::<bf16>(isa, k, 37, source, |p, j| rounded(first + j, p));
                }
                let source = Source::WeightCols { weight, first: 32 };
                assert_panels::<bf16>(isa, rows - 1, 99, source, |p, j| rounded(p, 32 + j));
            }
        }
    }
}

/// Multiplies panels by the identity, to read them back whatever their layout is.
fn assert_panels<E: TestElement>(
    isa: E::Isa,
    k: usize,
    n: usize,
    source: Source<'_>,
    want: impl Fn(usize, usize) -> E,
) {
    let panels = packed::<E>(isa, k, n, source, 2.0);
    let mut c = vec![f32::NAN; k * n];
    let identity = identity(k);
    let term = Term { a: MatRef::row_major(&identity[..], k), b: Panels::new(&panels, k, n) };
    gemm(isa, &mut c[..], n, k, n, Accumulate::Overwrite, &[term]).unwrap();
    for p in 0..k {
        for j in 0..n {
            let (got, want) = (c[p * n + j], 2.0 * want(p, j).wide());
            // Products of bf16 may flush subnormals to zero.
            let flushed = got == 0.0 && want.abs() < f32::MIN_POSITIVE;
            assert!(got == want || flushed, "{isa:?} {source:?} [{p}, {j}]: expected {want}, found {got}");
        }
    }
}

#[test]
fn errors_write_nothing() {
    let isa = hydra_kernels::Isa::detect();
    let data = vec![0u8; 18 * 4];
    let weight = Weight::new(Format::Q4_0, 2, 64, &data, RowOrder::Natural).unwrap();
    let mut panels = vec![7.0; panels_len::<f32>(isa, 64, 2)];
    let len = panels.len();
    let short = pack(isa, &mut panels[..len - 1], 64, 2, Source::WeightRows { weight, first: 0 }, 1.0);
    assert_eq!(short, Err(Error::Length { operand: "panels", want: len, got: len - 1 }));
    let beyond = pack(isa, &mut panels, 64, 2, Source::WeightRows { weight, first: 1 }, 1.0);
    assert_eq!(beyond, Err(Error::Range { operand: "weight rows", limit: 2, got: 3 }));
    let astride = pack(isa, &mut panels, 2, 2, Source::WeightCols { weight, first: 31 }, 1.0);
    assert_eq!(astride, Err(Error::Block { operand: "first", block: 32, got: 31 }));
    let huge = Source::Dense { data: Values::F32(&[0.0; 4]), k_stride: usize::MAX, n_stride: usize::MAX };
    assert_eq!(pack(isa, &mut panels, 2, 2, huge, 1.0), Err(Error::Overflow));
    assert!(panels.iter().all(|&x| x == 7.0));

    let b = Panels::new(&panels[..], 64, 2);
    let a = values(3 * 64, 1);
    let mut c = vec![7.0; 6];
    for (m, c_stride, len) in [(4, 2, 6), (3, 1, 6), (3, 2, 5), (2, usize::MAX, 6)] {
        let term = Term { a: MatRef::row_major(&a[..], 64), b };
        assert!(gemm(isa, &mut c[..len], c_stride, m, 2, Accumulate::Overwrite, &[term]).is_err());
    }
    let far = Term { a: MatRef { data: Values::F32(&a), row_stride: usize::MAX / 2, col_stride: 1 }, b };
    assert!(gemm(isa, &mut c[..], 2, 3, 2, Accumulate::Overwrite, &[far]).is_err());
    let term = Term { a: MatRef::row_major(&a[..], 64), b };
    let mut rounded = [bf16::ONE; 6];
    let many = gemm(isa, &mut rounded[..], 2, 3, 2, Accumulate::Overwrite, &[term; 5]);
    assert_eq!(many, Err(Error::Range { operand: "terms", limit: 4, got: 5 }));
    assert_eq!(rounded, [bf16::ONE; 6]);
    assert!(matvec(isa, &mut c, weight, 0, &a[..64]).is_err());
    assert!(to_bf16(Bf16Isa::detect(), &mut [bf16::ONE; 2], &a).is_err());
    assert!(c.iter().all(|&x| x == 7.0));
    assert!(Weight::new(Format::Q4K, 1, 128, &data, RowOrder::Natural).is_err());
    assert!(Weight::new(Format::Q4_0, usize::MAX, 64, &data, RowOrder::Natural).is_err());
    assert!(Weight::new(Format::Q4_0, 2, 64, &data, RowOrder::Interleaved { head_dim: 0 }).is_err());
}
