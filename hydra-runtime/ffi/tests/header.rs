//! include/hydra.h is what cbindgen makes of the source.

use std::path::Path;

#[test]
fn the_header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(root).with_config(config).generate().unwrap();
    let mut made = Vec::new();
    bindings.write(&mut made);
    let (made, path) = (String::from_utf8(made).unwrap(), root.join("include/hydra.h"));
    if std::env::var_os("HYDRA_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let hint = "run HYDRA_WRITE_HEADER=1 cargo test -p hydra-ffi --test header";
    assert!(found == made, "{} is not what cbindgen makes of the source: {hint}", path.display());
}

/// The README shows the program that .ci/ffi compiles and runs.
#[test]
fn the_readme_shows_the_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    let (readme, example) = (read("README.md"), read("examples/generate.c"));
    assert!(readme.contains(&format!("```c\n{example}```\n")), "README.md: examples/generate.c has changed");
}
