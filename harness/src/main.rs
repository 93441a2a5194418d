//! The binary `hydra`; everything is in the library, where tests can see it.

fn main() -> std::process::ExitCode {
    hydra_harness::run(std::env::args_os())
}
