//! The kernels link without `std` and `alloc`: builds no_std/.

use std::path::Path;
use std::process::Command;

#[test]
fn kernels_link_without_std_and_alloc() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/no_std/Cargo.toml");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no_std");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .env_remove("RUSTFLAGS")
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
