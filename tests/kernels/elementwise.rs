//! Functions of one number, softmax of rows, and dropout.

use crate::support::{assert_close, isas, tolerance, values, wide};
use half::bf16;
use hydra_kernels::softmax::{log_sum_exp, softmax_backward_rows, softmax_rows};
use hydra_kernels::{Dropout, dropout, dropout_accumulate, dropout_in_place, dropout_unscaled, math, reference};

/// |got − want| in units in the last place of `want`, or of the least subnormal below 2⁻¹²⁶.
fn ulps(got: f32, want: f64) -> f64 {
    let size = want.abs().max(f64::from(f32::MIN_POSITIVE));
    let ulp = f64::from_bits(size.to_bits() & 0x7ff0_0000_0000_0000) * f64::from(f32::EPSILON);
    (f64::from(got) - want).abs() / ulp
}

#[test]
fn exp_over_its_range() {
    let worst = (0..2_000_000)
        .map(|i| -104.0 + i as f32 * (192.7 / 2_000_000.0))
        .map(|x| ulps(math::exp(x), f64::from(x).exp()))
        .fold(0.0, f64::max);
    assert!(worst <= tolerance::ULPS, "{worst} ulp");
    assert_eq!(math::exp(0.0), 1.0);
    for (x, want) in [(-105.0, 0.0), (f32::MIN, 0.0), (f32::NEG_INFINITY, 0.0), (88.8, f32::INFINITY)] {
        assert_eq!(math::exp(x), want, "{x}");
    }
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert!(math::exp(f32::NAN).is_nan());
}

#[test]
fn coarse_exp_over_its_range() {
    for i in 0..500_000 {
        let x = -87.3 + i as f32 * (175.3 / 500_000.0);
        let error = (f64::from(math::exp_coarse(x)) / f64::from(x).exp() - 1.0).abs();
        assert!(error <= tolerance::EXP_COARSE + 1e-7 * f64::from(x.abs()), "{x}: {error}");
    }
    // Of a masked score, or one far below the largest: 0, and nothing subnormal.
    for x in [-87.4, -88.0, -105.0, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(math::exp_coarse(x), 0.0, "{x}");
    }
    for bits in [0x7fc0_0000, 0x7fc0_0001, 0x7f80_0001, 0x7fff_ffff, 0xffc0_0000, 0xffff_ffff] {
        assert!(math::exp_coarse(f32::from_bits(bits)).is_nan(), "{bits:#x}");
    }
}

#[test]
fn ln_and_roots_over_their_range() {
    for bits in (1..0x7f80_0000u32).step_by(997) {
        let x = f32::from_bits(bits);
        let exact = f64::from(x).ln();
        assert!(
            ulps(math::ln(x), exact) <= tolerance::ULPS
                || (f64::from(math::ln(x)) - exact).abs() < tolerance::LN_NEAR_1,
            "{x}"
        );
        assert_eq!(math::sqrt(x), x.sqrt());
        assert!(ulps(math::rsqrt(x), 1.0 / f64::from(x).sqrt()) <= tolerance::ULPS);
    }
    assert_eq!(math::ln(0.0), f32::NEG_INFINITY);
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
    assert!(math::ln(-1.0).is_nan() && math::ln(f32::NAN).is_nan() && math::sqrt(-1.0).is_nan());
}

#[test]
fn silu_and_its_derivative() {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    for i in -2000..2000 {
        let x = i as f32 / 20.0;
        let wide = f64::from(x);
        assert!((f64::from(math::silu(x)) - silu(wide)).abs() <= tolerance::SILU * wide.abs().max(1e-3), "{x}");
        let slope = (silu(wide + 1e-5) - silu(wide - 1e-5)) / 2e-5;
        assert!((f64::from(math::silu_derivative(x)) - slope).abs() < tolerance::SILU_DERIVATIVE, "{x}");
    }
    assert_eq!(math::silu(f32::MAX), f32::MAX);
    assert_eq!((math::silu(f32::INFINITY), math::silu(f32::NEG_INFINITY)), (f32::INFINITY, 0.0));
    assert_eq!((math::silu_derivative(f32::INFINITY), math::silu_derivative(f32::NEG_INFINITY)), (1.0, 0.0));
    assert_eq!(math::silu(-1e30), 0.0);
    assert!(math::silu(f32::NAN).is_nan());
}

#[test]
fn the_reference_knows_exp_and_ln() {
    for i in -7000..7000 {
        let x = f64::from(i) / 10.0;
        assert!((reference::exp(x) / x.exp() - 1.0).abs() < tolerance::REFERENCE_EXP, "{x}");
        assert!((reference::ln(x.exp()) - x).abs() < tolerance::REFERENCE_LN, "{x}");
    }
    for subnormal in [f64::from_bits(1), 1e-320, 3e-310] {
        assert!((reference::ln(subnormal) - subnormal.ln()).abs() < tolerance::REFERENCE_LN, "{subnormal:e}");
    }
}

#[test]
fn softmax_and_its_gradient() {
    for isa in isas() {
        for cols in [1, 2, 15, 16, 17, 33, 1000] {
            for scale in [1.0, 50.0, 1e30] {
                let x: Vec<f32> = values(3 * cols, cols as u64).iter().map(|x| x * scale).collect();
                let dp = values(3 * cols, 9);
                let (mut p, mut dx) = (x.clone(), dp.clone());
                let (mut want_p, mut want_dx) = (wide(&x), wide(&dp));
                softmax_rows(isa, &mut p, cols).unwrap();
                softmax_backward_rows(isa, &mut dx, &p, cols).unwrap();
                for (row, (p, dx)) in want_p.chunks_mut(cols).zip(want_dx.chunks_mut(cols)).enumerate() {
                    let want = reference::log_sum_exp(p);
                    let got = f64::from(log_sum_exp(isa, &x[row * cols..][..cols]));
                    assert!((got - want).abs() <= tolerance::SOFTMAX * want.abs().max(1.0), "{got} {want}");
                    reference::softmax_row(p);
                    reference::softmax_backward_row(dx, p);
                }
                for (got, want) in [(p, want_p), (dx, want_dx)] {
                    for (got, want) in got.into_iter().zip(want) {
                        assert!((f64::from(got) - want).abs() <= 2.0 * tolerance::SOFTMAX, "{isa:?} {cols}");
                    }
                }
            }
        }
        let mut rows = [f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, 3.0, f32::NAN, f32::NEG_INFINITY];
        softmax_rows(isa, &mut rows, 2).unwrap();
        assert_eq!(rows[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(rows[4].is_nan() && rows[5].is_nan());
        assert_eq!(log_sum_exp(isa, &[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(isa, &[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
        // What has no softmax, here and in the reference.
        let (nan, infinity) = (f32::NAN, f32::INFINITY);
        for row in [&[nan][..], &[nan, -infinity], &[1.0, nan], &[infinity], &[infinity, 1.0]] {
            let (mut got, mut want) = (row.to_vec(), wide(row));
            softmax_rows(isa, &mut got, row.len()).unwrap();
            reference::softmax_row(&mut want);
            assert!(got.iter().all(|x| x.is_nan()) && want.iter().all(|x| x.is_nan()), "{row:?}: {got:?} {want:?}");
            assert!(log_sum_exp(isa, row).is_nan() && reference::log_sum_exp(&wide(row)).is_nan(), "{row:?}");
        }
        assert!(softmax_rows(isa, &mut rows, 4).is_err() && softmax_rows(isa, &mut rows, 0).is_err());
    }
}

#[test]
fn dropout_draws_the_same_mask_everywhere() {
    for isa in isas() {
        for cols in [1, 3, 4, 5, 16, 67, 128, 200] {
            let mask = Dropout { p: 0.3, seed: 11, first_row: 5 };
            let x = values(6 * cols, 1);
            let mut out = vec![f32::NAN; x.len()];
            dropout(isa, &mut out, &x, cols, mask).unwrap();
            let want: Vec<f32> = (0..x.len())
                .map(|i| if mask.keeps(5 + (i / cols) as u64, i % cols) { x[i] * mask.scale() } else { 0.0 })
                .collect();
            assert_eq!(out, want, "{isa:?} {cols}");
            dropout_unscaled(isa, &mut out, &x, cols, mask).unwrap();
            out.iter_mut().for_each(|out| *out *= mask.scale());
            assert_eq!(out, want, "{isa:?} {cols} unscaled");
            let narrow: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut out = vec![bf16::NAN; x.len()];
            dropout_unscaled(isa, &mut out, &narrow, cols, mask).unwrap();
            let kept = |i: usize| if want[i] == 0.0 { bf16::ZERO } else { narrow[i] };
            assert_eq!(out, (0..x.len()).map(kept).collect::<Vec<_>>(), "{isa:?} {cols} bf16");
            let mut in_place = x.clone();
            dropout_in_place(isa, &mut in_place, cols, mask).unwrap();
            assert_eq!(in_place, want, "{isa:?} {cols} in place");
            assert_eq!(dropout_in_place(isa, &mut in_place[1..], cols, mask).is_ok(), cols == 1);
            // A later range of rows, added to what is there.
            let mut piece = vec![1.0; 2 * cols];
            let later = Dropout { first_row: 9, ..mask };
            dropout_accumulate(isa, &mut piece, &x[4 * cols..], cols, later).unwrap();
            let want: Vec<f64> = wide(&want[4 * cols..]).iter().map(|x| x + 1.0).collect();
            assert_close("piece", &piece, &want, tolerance::ONE_OPERATION, 1.0);
        }
    }
}

#[test]
fn dropout_keeps_the_right_share() {
    let isa = hydra_kernels::Isa::detect();
    for p in [0.0, 0.05, 0.5, 0.999, 1.0] {
        let ones = vec![1.0; 1 << 18];
        let mut out = ones.clone();
        let mask = Dropout { p, seed: 3, first_row: 0 };
        dropout_unscaled(isa, &mut out, &ones, 512, mask).unwrap();
        let unscaled = out.clone();
        dropout(isa, &mut out, &ones, 512, mask).unwrap();
        assert!(unscaled.iter().zip(&out).all(|(unscaled, out)| (*unscaled != 0.0) == (*out != 0.0)));
        let kept = out.iter().filter(|&&x| x != 0.0).count() as f64 / out.len() as f64;
        let deviation = f64::from(p * (1.0 - p)).max(1e-9).sqrt() / (out.len() as f64).sqrt();
        assert!((kept - f64::from(1.0 - p)).abs() <= 5.0 * deviation + 1e-5, "{p}: {kept}");
        assert!(out.iter().all(|x| x.is_finite()));
    }
    let a: Vec<bool> = (0..64).map(|col| Dropout { p: 0.5, seed: 1, first_row: 0 }.keeps(0, col)).collect();
    let b: Vec<bool> = (0..64).map(|col| Dropout { p: 0.5, seed: 2, first_row: 0 }.keeps(0, col)).collect();
    let c: Vec<bool> = (0..64).map(|col| Dropout { p: 0.5, seed: 1, first_row: 0 }.keeps(1, col)).collect();
    assert!(a != b && a != c && b != c);
}
