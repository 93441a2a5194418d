//! Detection of instruction sets, against the standard library's.

use crate::support::isas;
use hydra_kernels::{Bf16Isa, Isa, Q8Isa};

#[test]
#[cfg(target_arch = "x86_64")]
fn detection_agrees_with_std() {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let avx512 = avx512 && cfg!(feature = "avx512");
    assert_eq!(Isa::by_name("avx2").is_some(), avx2 && cfg!(feature = "avx2"));
    assert_eq!(Isa::by_name("avx512").is_some(), avx512);
    let avx2 = avx2 && cfg!(feature = "avx2");
    assert_eq!(Q8Isa::by_name("avx2").is_some(), avx2);
    assert_eq!(Q8Isa::by_name("avxvnni").is_some(), avx2 && is_x86_feature_detected!("avxvnni"));
    assert_eq!(Q8Isa::by_name("avx512vnni").is_some(), avx512 && is_x86_feature_detected!("avx512vnni"));
    let avx512bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
    assert_eq!(Bf16Isa::by_name("avx512bf16").is_some(), avx512bf16);
    // Stable Rust's standard library does not detect AMX; Linux lists it.
    if let Ok(info) = std::fs::read_to_string("/proc/cpuinfo") {
        let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or("");
        let has = |flag| flags.split_whitespace().any(|f| f == flag);
        let amx = cfg!(feature = "amx") && avx512bf16 && has("amx_tile") && has("amx_bf16");
        assert!(amx || Bf16Isa::by_name("amxbf16").is_none());
        assert_eq!(Bf16Isa::by_name("amxbf16").is_some(), amx, "does the kernel refuse the tiles?");
    }
}

#[test]
#[cfg(target_arch = "aarch64")]
fn detection_agrees_with_std() {
    assert_eq!(Isa::by_name("neon").is_some(), std::arch::is_aarch64_feature_detected!("neon"));
    assert_eq!(Q8Isa::by_name("neondotprod").is_some(), std::arch::is_aarch64_feature_detected!("dotprod"));
    assert_eq!(Bf16Isa::by_name("neonbf16").is_some(), std::arch::is_aarch64_feature_detected!("bf16"));
}

#[test]
fn the_fastest_is_the_last() {
    assert_eq!(isas().first(), Some(&Isa::Portable));
    assert_eq!(isas().last(), Some(&Isa::detect()));
    assert_eq!(Bf16Isa::available().last(), Some(Bf16Isa::detect()));
    for isa in Bf16Isa::available() {
        assert_eq!(Bf16Isa::by_name(isa.name()), Some(isa));
        assert!(Isa::by_name(isa.widened().name()).is_some());
    }
    assert_eq!(Q8Isa::available().last(), Some(Q8Isa::detect()));
    for isa in Q8Isa::available() {
        assert_eq!(Q8Isa::by_name(isa.name()), Some(isa));
        assert!(Isa::by_name(isa.widened().name()).is_some());
    }
    assert_eq!(Isa::by_name("mmx"), None);
}
