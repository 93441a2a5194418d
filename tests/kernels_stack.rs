//! The kernels' stack: stack/ runs every operation on a thread with 256 KiB, compiled as a dependent compiles it, without
//! this workspace's profiles: in debug and in release.

use std::path::Path;
use std::process::Command;

/// Builds and runs stack/ in the profile that `option` selects.
fn run(option: Option<&str>) {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/stack/Cargo.toml");
    // The folder of kernels_no_std.rs, for the same dependencies.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no_std");
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .args(option)
        .env_remove("RUSTFLAGS")
        .env_remove("RUST_MIN_STACK")
        .output()
        .expect("cargo runs");
    let [out, error] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{error}");
    assert!(out.contains("256 KiB of stack are enough for portable"), "{out}");
}

#[test]
fn operations_run_in_256_kib_of_stack_in_debug() {
    run(None);
}

#[test]
fn operations_run_in_256_kib_of_stack_in_release() {
    run(Some("--release"));
}
