//! With the feature `mpi`: compiles `src/ranks/mpi.c`, and links the MPI that `mpicc` or pkg-config names.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "mpi")]
    mpi();
}

#[cfg(feature = "mpi")]
fn mpi() {
    println!("cargo::rerun-if-changed=src/ranks/mpi.c");
    let Ok(mpi) = build_probe_mpi::probe() else {
        println!("cargo::error=no MPI was found: install Open MPI or MPICH (Debian: libopenmpi-dev openmpi-bin)");
        return;
    };
    let mut c = cc::Build::new();
    c.includes(&mpi.include_paths);
    c.file("src/ranks/mpi.c").compile("hydra_mpi");
    for path in &mpi.lib_paths {
        println!("cargo::rustc-link-search=native={}", path.display());
    }
    for library in &mpi.libs {
        println!("cargo::rustc-link-lib={library}");
    }
}
