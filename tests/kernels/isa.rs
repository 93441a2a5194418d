//! Detection against the standard library's.

use crate::support::isas;
use hydra_kernels::{Bf16Isa, Isa};

#[test]
#[cfg(target_arch = "x86_64")]
fn detection_agrees_with_std() {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    assert_eq!(Isa::by_name("avx2").is_some(), avx2);
    assert_eq!(Isa::by_name("avx512").is_some(), avx512);
    assert_eq!(Bf16Isa::by_name("avx512bf16").is_some(), avx512 && is_x86_feature_detected!("avx512bf16"));
}

#[test]
fn the_best_is_the_last() {
    assert_eq!(isas().first(), Some(&Isa::Portable));
    assert_eq!(isas().last(), Some(&Isa::detect()));
    assert_eq!(Bf16Isa::available().last(), Some(Bf16Isa::detect()));
    for isa in Bf16Isa::available() {
        assert_eq!(Bf16Isa::by_name(isa.name()), Some(isa));
        assert!(Isa::by_name(isa.widened().name()).is_some());
    }
    assert_eq!(Isa::by_name("mmx"), None);
}
