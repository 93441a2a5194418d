//! The kernels against their f64 reference.

use hydra_kernels::*;

#[test]
fn gemm_smoke() {
    for (m, k, n) in [(1, 1, 1), (5, 7, 9), (13, 400, 35), (3, 385, 300), (4, 0, 3)] {
        let a: Vec<f32> = (0..m * k).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
        let b: Vec<f32> = (0..n * k).map(|i| ((i * 104729 % 1000) as f32 - 500.0) / 500.0).collect();
        for isa in Isa::available() {
            let mut panels = vec![f32::NAN; panels_len::<f32>(isa, k, n)];
            let weight = Weight::from_f32(n, k, &b).unwrap();
            pack(isa, &mut panels, k, n, Source::WeightRows { weight, first: 0 }, 1.0).unwrap();
            let mut c = vec![f32::NAN; m * n];
            let term = Term { a: Rows::row_major(&a, k), b: Panels { data: &panels, k, n } };
            gemm(isa, &mut c, n, m, n, Store::Overwrite, &[term]).unwrap();
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[j * k + p])).sum();
                    assert!((f64::from(c[i * n + j]) - want).abs() < 1e-3, "{m} {k} {n} {i} {j}");
                }
            }
        }
    }
}
