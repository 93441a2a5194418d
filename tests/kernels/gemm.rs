//! Products: every source, element type, stride and edge; independence of how C is cut.

use crate::support::{TestElement, isas, tolerance, values};
use half::bf16;
use hydra_kernels::{
    Accumulate, Bf16Isa, Error, Format, MatRef, PANEL_ALIGN, Panels, RowOrder, Source, Term, Values, Weight, gemm,
    matvec, pack, panels_len, to_bf16,
};
use proptest::prelude::*;

/// 0, 1, and around the edges of tiles (4, 6, 8, 12, 16, 32), stretches (256) and blocks of k (384, 768); where a second
/// term joins the first (128).
const SIZES: [usize; 17] = [0, 1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 65, 130];
const DEPTHS: [usize; 19] = [0, 1, 2, 7, 8, 31, 33, 127, 129, 255, 257, 383, 385, 769, 771, 1537, 64, 2801, 5505];

fn size() -> impl Strategy<Value = usize> {
    prop::sample::select(&SIZES[..])
}

fn depth() -> impl Strategy<Value = usize> {
    prop::sample::select(&DEPTHS[..])
}

/// How an operand lies.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Rows,
    Columns,
    Padded,
}

fn layout() -> impl Strategy<Value = Layout> {
    prop::sample::select(vec![Layout::Rows, Layout::Columns, Layout::Padded])
}

/// (from a row to the next, from a column to the next)
fn strides(layout: Layout, rows: usize, cols: usize) -> (usize, usize) {
    // From the only row, or column, no step is taken: it may be of any size.
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

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    store: Accumulate,
    terms: [(usize, Layout, Layout); 2],
    gap: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let terms = [(depth(), layout(), layout()), (depth(), layout(), layout())];
    let store = prop::sample::select(vec![Accumulate::Overwrite, Accumulate::Add]);
    (size(), size(), store, terms, 0..3usize, any::<u64>()).prop_map(|(m, n, store, terms, gap, seed)| Case {
        m,
        n,
        store,
        terms,
        gap,
        seed,
    })
}

fn check<E: TestElement>(isa: E::Isa, case: Case) {
    let Case { m, n, store, terms, gap, seed } = case;
    let scale = 0.5; // exact in bf16
    let c_stride = n + gap;
    let old = values(m * c_stride, seed);
    let mut c = old.clone();
    let mut want: Vec<f64> = old.iter().map(|&c| if store == Accumulate::Add { f64::from(c) } else { 0.0 }).collect();
    let mut magnitude: Vec<f64> = want.iter().map(|c| c.abs()).collect();
    let mut packed = Vec::new();
    for (t, (k, a_layout, b_layout)) in terms.into_iter().enumerate() {
        let (a_strides, b_strides) = (strides(a_layout, m, k), strides(b_layout, k, n));
        let a = values(room(m, k, a_strides), seed ^ 1 ^ t as u64);
        let narrow: Vec<bf16> = a.iter().map(|&a| bf16::from_f32(a)).collect();
        let b = values(room(k, n, b_strides), seed ^ 100 ^ t as u64);
        let mut panels = vec![<E as TestElement>::from(f32::NAN); panels_len::<E>(isa, k, n)];
        let narrow_b: Vec<bf16> = b.iter().map(|&b| bf16::from_f32(b)).collect();
        let data = if seed >> 2 >> t & 1 == 0 { Values::F32(&b) } else { Values::Bf16(&narrow_b) };
        let source = Source::Dense { data, k_stride: b_strides.0, n_stride: b_strides.1 };
        pack(isa, &mut panels, k, n, source, scale).unwrap();
        for i in 0..m {
            for j in 0..n {
                for p in 0..k {
                    let product = f64::from(a[i * a_strides.0 + p * a_strides.1])
                        * f64::from(b[p * b_strides.0 + j * b_strides.1])
                        * f64::from(scale);
                    want[i * c_stride + j] += product;
                    magnitude[i * c_stride + j] += product.abs();
                }
            }
        }
        packed.push((a, narrow, a_strides, panels, k));
    }
    let terms: Vec<Term<'_, E>> = packed
        .iter()
        .enumerate()
        .map(|(t, (a, narrow, strides, panels, k))| {
            // The values are exact in either type.
            let data = if seed >> t & 1 == 0 { Values::F32(a) } else { Values::Bf16(narrow) };
            let a = MatRef { data, row_stride: strides.0, col_stride: strides.1 };
            Term { a, b: Panels { data: panels, k: *k, n } }
        })
        .collect();
    let deepest = case.terms.iter().map(|term| term.0).sum();
    let mut narrow_c: Vec<bf16> = old.iter().map(|&c| bf16::from_f32(c)).collect();
    gemm(isa, &mut c[..], c_stride, m, n, store, &terms).unwrap();
    gemm(isa, &mut narrow_c[..], c_stride, m, n, store, &terms).unwrap();
    for i in 0..m {
        for j in 0..c_stride {
            let at = i * c_stride + j;
            if j >= n {
                assert_eq!(c[at].to_bits(), old[at].to_bits(), "{isa:?}: wrote beyond a row");
                assert_eq!(narrow_c[at].to_f32(), old[at], "{isa:?}: wrote beyond a row");
            } else {
                let bound = tolerance::product(deepest) * magnitude[at];
                let error = (f64::from(c[at]) - want[at]).abs();
                assert!(error <= bound, "{isa:?} {case:?} [{i}, {j}]: {} where {} is right", c[at], want[at]);
                let error = (f64::from(narrow_c[at].to_f32()) - want[at]).abs();
                let bound = bound + want[at].abs() / 256.0;
                assert!(error <= bound, "{isa:?} {case:?} [{i}, {j}]: {} where {} is right", narrow_c[at], want[at]);
            }
        }
    }
}

/// What a product of bf16 makes of f32 operands: the nearest bf16, ties to even.
#[test]
fn f32_operands_are_rounded() {
    let (m, k) = (3, 70);
    let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    for isa in bf16::isas() {
        let mut identity = vec![0.0; k * k];
        (0..k).for_each(|p| identity[p * k + p] = 1.0);
        let mut panels = vec![bf16::NAN; panels_len::<bf16>(isa, k, k)];
        pack(isa, &mut panels, k, k, Source::Dense { data: Values::F32(&identity), k_stride: k, n_stride: 1 }, 1.0)
            .unwrap();
        let turned: Vec<f32> = (0..k * m).map(|i| x[i % m * k + i / m]).collect();
        for a in [MatRef::row_major(&x[..], k), MatRef::transposed(&turned[..], m)] {
            let mut c = vec![f32::NAN; m * k];
            gemm(isa, &mut c[..], k, m, k, Accumulate::Overwrite, &[Term { a, b: Panels { data: &panels, k, n: k } }])
                .unwrap();
            assert!(c.iter().zip(&x).all(|(&c, &x)| c == bf16::from_f32(x).to_f32()), "{isa:?}");
        }
    }
}

/// An operand that begins at a cache line may be read in another way; its product is the same.
#[test]
fn where_an_operand_lies_changes_nothing() {
    let (m, n) = (45, 70);
    for k in [32, 96, 576, 800] {
        let b = values(k * n, 3);
        let x: Vec<bf16> = values(m * k, 2).into_iter().map(bf16::from_f32).collect();
        for isa in bf16::isas() {
            let mut panels = vec![bf16::ZERO; panels_len::<bf16>(isa, k, n)];
            pack(isa, &mut panels, k, n, Source::Dense { data: Values::F32(&b), k_stride: n, n_stride: 1 }, 1.0)
                .unwrap();
            let results = [0, 1, 16].map(|offset| {
                let mut room = vec![bf16::NAN; m * k + 64];
                let first = room.as_ptr().align_offset(64) + offset;
                room[first..first + m * k].copy_from_slice(&x);
                let mut c = vec![f32::NAN; m * n];
                let term =
                    Term { a: MatRef::row_major(&room[first..first + m * k], k), b: Panels { data: &panels, k, n } };
                gemm(isa, &mut c[..], n, m, n, Accumulate::Overwrite, &[term]).unwrap();
                c
            });
            assert!(results[0].iter().all(|c| c.is_finite()));
            assert_eq!(bytemuck_bits(&results[0]), bytemuck_bits(&results[1]), "{isa:?}");
            assert_eq!(bytemuck_bits(&results[0]), bytemuck_bits(&results[2]), "{isa:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

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

/// The same bits whether C is computed whole or in pieces.
fn cut_anywhere<E: TestElement>() {
    let (m, n, k) = (69, 2 * PANEL_ALIGN + 7, 801);
    let a = values(m * k, 1);
    let w = values(n * k, 2);
    let weight = Weight::from_f32(n, k, &w).unwrap();
    for isa in E::isas() {
        let product = |rows: std::ops::Range<usize>, columns: std::ops::Range<usize>| {
            let (m, n) = (rows.len(), columns.len());
            let mut panels = vec![<E as TestElement>::from(0.0); panels_len::<E>(isa, k, n)];
            pack(isa, &mut panels, k, n, Source::WeightRows { weight, first: columns.start }, 1.0).unwrap();
            let mut c = vec![f32::NAN; m * n];
            let a = MatRef::row_major(&a[rows.start * k..rows.end * k], k);
            let b = Panels { data: &panels, k, n };
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
                    assert_eq!(bytemuck_bits(want), bytemuck_bits(got), "{isa:?}");
                }
            }
        }
    }
}

fn bytemuck_bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn pieces_have_the_same_bits() {
    cut_anywhere::<f32>();
    cut_anywhere::<bf16>();
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
                let x = values(cols, 5);
                let mut y = vec![0.0; 9];
                matvec(isa, &mut y, weight, 3, &x).unwrap();
                for (i, &y) in y.iter().enumerate() {
                    let terms = (0..cols).map(|p| f64::from(decoded[(3 + i) * cols + p]) * f64::from(x[p]));
                    let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    assert!((f64::from(y) - want).abs() <= tolerance::product(cols) * size, "{format:?} {isa:?}");
                }
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

/// Multiplies by the identity to read panels back, whatever their arrangement.
fn assert_panels<E: TestElement>(
    isa: E::Isa,
    k: usize,
    n: usize,
    source: Source<'_>,
    want: impl Fn(usize, usize) -> E,
) {
    let mut panels = vec![<E as TestElement>::from(f32::NAN); panels_len::<E>(isa, k, n)];
    pack(isa, &mut panels, k, n, source, 2.0).unwrap();
    let mut identity = vec![0.0; k * k];
    (0..k).for_each(|p| identity[p * k + p] = 1.0);
    let mut c = vec![f32::NAN; k * n];
    let term = Term { a: MatRef::row_major(&identity[..], k), b: Panels { data: &panels, k, n } };
    gemm(isa, &mut c[..], n, k, n, Accumulate::Overwrite, &[term]).unwrap();
    for p in 0..k {
        for j in 0..n {
            let (got, want) = (c[p * n + j], 2.0 * want(p, j).wide());
            // Products of bf16 may flush subnormals.
            let flushed = got == 0.0 && want.abs() < f32::MIN_POSITIVE;
            assert!(got == want || flushed, "{isa:?} {source:?} [{p}, {j}]: {got} where {want} is right");
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

    let b = Panels { data: &panels[..], k: 64, n: 2 };
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
