//! The gate: which heads a token has, and what the load-balancing loss adds.

use hydra_kernels::{Gate, HydraShape, Isa, Routing, activate, balance_loss_grad, reference};

/// One token's gate.
fn gate_of(logits: &[f32], routing: Routing) -> Vec<f32> {
    let lora_heads = logits.len();
    let shape = HydraShape { d_in: 1, d_out: 1, rank: 1, lora_heads, per_head_a: false, router: true };
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::available() {
        let mut adapter_state = [&[7.0], logits].concat();
        activate(isa, &shape, &mut adapter_state, Gate::Router(routing), &[]).unwrap();
        assert_eq!(adapter_state[0], 7.0);
        let gate = adapter_state.split_off(1);
        let bits = |gate: &[f32]| gate.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(first.get_or_insert(gate.clone())), bits(&gate), "{isa:?}");
    }
    first.unwrap()
}

#[test]
fn top_k_keeps_the_largest_and_of_equals_the_first() {
    let top = |top_k| Routing { top_k, ..Routing::default() };
    assert_eq!(gate_of(&[1.0, 3.0, 3.0, 2.0], top(1)), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!(gate_of(&[1.0, 3.0, 3.0, 2.0], top(2)), [0.0, 0.5, 0.5, 0.0]);
    assert_eq!(gate_of(&[5.0, 5.0, 5.0, 5.0], top(2)), [0.5, 0.5, 0.0, 0.0]);
    assert_eq!(gate_of(&[0.0, -0.0, 0.0], top(1)), [1.0, 0.0, 0.0]);
    assert_eq!(gate_of(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY], top(2)), [0.0, 1.0, 0.0]);
    let all = gate_of(&[1.0, 3.0, 2.5, 2.0], Routing::default());
    assert_eq!(gate_of(&[1.0, 3.0, 2.5, 2.0], top(4)), all);
    assert_eq!(gate_of(&[1.0, 3.0, 2.5, 2.0], top(9)), all);
    // What is not a number stays to be seen.
    for top_k in 1..4 {
        assert!(gate_of(&[1.0, f32::NAN, 2.0], top(top_k)).iter().all(|x| x.is_nan()));
    }
    // Halved logits.
    let dull = Routing { temperature: 2.0, ..Routing::default() };
    assert_eq!(gate_of(&[2.0, 6.0, 5.0, 4.0], dull), all);
    // Logits that would overflow, and masked ones.
    let sharp = Routing { temperature: 1e-37, ..Routing::default() };
    for logits in [[40.0, 1.0], [-40.0, -50.0], [f32::MAX, f32::MIN], [0.0, f32::NEG_INFINITY]] {
        assert_eq!(gate_of(&logits, sharp), [1.0, 0.0], "{logits:?}");
    }
    assert_eq!(gate_of(&[f32::NEG_INFINITY; 2], sharp), [0.0; 2]);
    assert!(gate_of(&[f32::INFINITY, 1.0], sharp).iter().all(|x| x.is_nan()));
}

#[test]
fn the_balance_loss_is_least_where_heads_are_used_alike() {
    let shape = HydraShape { d_in: 1, d_out: 1, rank: 1, lora_heads: 3, per_head_a: false, router: true };
    let even = [0.0, 0.8, 0.1, 0.1, 0.0, 0.1, 0.8, 0.1, 0.0, 0.1, 0.1, 0.8];
    assert!((reference::balance_loss(&shape, &even, &even, 2.0) - 2.0).abs() < 1e-12);
    let one = [0.0, 0.8, 0.1, 0.1].repeat(3);
    assert!((reference::balance_loss(&shape, &one, &one, 2.0) - 2.0 * 3.0 * 0.8).abs() < 1e-12);
    // Two tokens of three, and a tie that counts for the lower index.
    let adapter_state = [0.0, 0.5, 0.5, 0.0, 0.0, 0.1, 0.2, 0.7, 0.0, 0.4, 0.3, 0.3];
    let mut grad = [f32::NAN; 3];
    balance_loss_grad(&shape, &mut grad, &adapter_state, 2.0).unwrap();
    let unit = 2.0 * 3.0 / 9.0f32;
    assert!(grad.iter().zip([2.0 * unit, 0.0, unit]).all(|(got, want)| (got - want).abs() < 1e-6), "{grad:?}");
    let before = grad;
    assert!(balance_loss_grad(&shape, &mut grad[..2], &adapter_state, 2.0).is_err());
    assert!(balance_loss_grad(&shape, &mut grad, &adapter_state[1..], 2.0).is_err());
    assert!(balance_loss_grad(&shape, &mut grad, &adapter_state, f32::NAN).is_err());
    assert_eq!(grad, before);
}

#[test]
fn gates_that_mean_nothing_are_refused() {
    let router = HydraShape { d_in: 1, d_out: 1, rank: 1, lora_heads: 2, per_head_a: false, router: true };
    let plain = HydraShape { router: false, ..router };
    let mut adapter_state = [1.0; 3];
    let mut refused = |shape, gate, labels: &[u32], len: usize| {
        let refused = activate(Isa::detect(), &shape, &mut adapter_state[..len], gate, labels).is_err();
        assert!(!refused || adapter_state == [1.0; 3]);
        refused
    };
    let good = Routing::default();
    let bad = [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-40].map(|temperature| Routing { temperature, ..good });
    for routing in bad.into_iter().chain([Routing { top_k: 0, ..good }]) {
        assert!(refused(router, Gate::Router(routing), &[], 3), "{routing:?}");
    }
    assert!(refused(plain, Gate::Router(good), &[], 3));
    assert!(refused(plain, Gate::Label, &[], 3));
    assert!(refused(plain, Gate::One, &[], 2));
    assert!(refused(HydraShape { rank: 0, ..plain }, Gate::One, &[], 3));
    assert!(!refused(plain, Gate::Label, &[0], 3));
}
