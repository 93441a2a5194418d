//! The binary `hydra`.
fn main() {}
