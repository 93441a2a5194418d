//! What the operator refuses: memory that is too small, shapes that can't be, arguments that don't fit each other.

use crate::operator::{Case, Stored, hydra};
use half::bf16;
use hydra_kernels::hydra::{backward_scratch, forward_scratch};
use hydra_kernels::{Error, HydraShape};

#[test]
fn one_float_less_is_an_error() {
    for (tokens, p) in [(5, None), (5, Some(0.1)), (2, None)] {
        let case = Case::new(tokens, hydra(40, 33), 0, p, 1);
        for recomputed in [false, true] {
            let error = case.run::<f32>(hydra_kernels::Isa::detect(), 1, recomputed);
            assert!(matches!(error, Err(Error::Workspace { .. })));
            let error = case.run::<bf16>(hydra_kernels::Bf16Isa::detect(), 1, recomputed);
            assert!(matches!(error, Err(Error::Workspace { .. })));
        }
    }
}

#[test]
fn absurd_shapes_are_refused() {
    let good = HydraShape { d_in: 1, d_out: 1, rank: 1, lora_heads: 1, per_head_a: false, router: false };
    assert_eq!(good.validate(1), Ok(()));
    assert!(good.validate(usize::MAX).is_err());
    assert!(forward_scratch::<f32>(&good, usize::MAX, true).0 > isize::MAX as usize / size_of::<f32>());
    for bad in [
        HydraShape { rank: 0, ..good },
        HydraShape { lora_heads: 0, ..good },
        HydraShape { d_in: 0, ..good },
        HydraShape { d_out: 0, ..good },
        HydraShape { d_in: usize::MAX / 8, d_out: 16, ..good },
        HydraShape { rank: usize::MAX, lora_heads: 2, ..good },
        HydraShape { rank: 1 << 40, lora_heads: 1 << 40, per_head_a: true, ..good },
    ] {
        assert!(bad.validate(1).is_err(), "{bad:?}");
        assert!(forward_scratch::<f32>(&bad, 9, true).0 >= forward_scratch::<f32>(&bad, 9, false).0);
        assert!(backward_scratch::<f32>(&bad, 9, true).0 >= backward_scratch::<f32>(&bad, 9, false).0);
    }
}

#[test]
fn a_residual_of_another_type_is_refused() {
    let case = Case::new(6, hydra(20, 30), 0, None, 1);
    let x = case.stored(&case.x);
    let mut y = Stored::new(&case.dy, false);
    let state = vec![0.0; case.state_len()];
    for (narrow, fits) in [(false, true), (true, false)] {
        let residual = Stored::new(&case.dy, narrow);
        let args = case.forward_args(&x, Some(&residual));
        assert_eq!(case.layer().check_outputs(&args, &y.get_mut(), &state).is_ok(), fits);
    }
}

/// With and without an adapter, for a few tokens and for more. A layer without tokens is fine.
#[test]
fn layers_without_columns_are_refused() {
    let isa = hydra_kernels::Isa::detect();
    for (d_in, d_out) in [(0, 30), (20, 0), (0, 0), (20, 30)] {
        for tokens in [0, 2, 6] {
            for adapted in [true, false] {
                let case = Case { adapted, ..Case::new(tokens, hydra(d_in, d_out), 0, None, 1) };
                let outcome = case.run::<f32>(isa, 0, false);
                assert_eq!(outcome.is_ok(), d_in > 0 && d_out > 0, "{:?} {tokens} {adapted}", case.shape);
            }
        }
    }
}

/// Each argument one element too long or too short.
#[test]
fn wrong_lengths_are_refused() {
    let good = Case::new(6, HydraShape { router: false, ..hydra(20, 30) }, 0, None, 1);
    let isa = hydra_kernels::Isa::detect();
    assert!(good.run::<f32>(isa, 0, false).is_ok());
    type Change = fn(&mut Case);
    let changes: [(&str, Change); 6] = [
        ("x", |case| case.x.push(0.0)),
        ("dy", |case| case.dy.push(0.0)),
        ("residual", |case| case.residual = Some(vec![0.0; 179])),
        ("a", |case| case.a.push(0.0)),
        ("b", |case| case.b.truncate(7)),
        ("labels", |case| case.labels.truncate(5)),
    ];
    for (name, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.run::<f32>(isa, 0, false).unwrap_err();
        assert!(matches!(error, Error::Length { .. }), "{name}: {error}");
    }
    let bad = Case { load_balance: f32::NAN, ..good };
    assert!(matches!(bad.run::<f32>(isa, 0, false), Err(Error::Shape(_))));
}
