//! The memory that is announced before a run is what the run takes.

use super::support::{Scratch, assets, hydra};
use std::fs;

/// The number before "MiB" behind `text`.
fn mib_after(page: &str, text: &str) -> f64 {
    let rest = &page[page.find(text).unwrap_or_else(|| panic!("{text} in {page}")) + text.len()..];
    let end = rest.find(" MiB").expect("MiB");
    let start = rest[..end].rfind(|c: char| !(c.is_ascii_digit() || c == '.')).map_or(0, |at| at + 1);
    rest[start..end].parse().expect("a number")
}

/// Runs `options`; returns the MiB that were announced and the peak resident set, VmHWM, as the run's report shows it.
fn announced_and_peak(out: &str, options: &str) -> (f64, f64) {
    let (model, data) = (assets("model"), assets("corpus/test.jsonl"));
    let line = format!("finetune --model {model} --data {data} --steps 2 --threads 2 --out {out} {options}");
    let output = hydra(&line);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {said}");
    let report = fs::read_to_string(format!("{out}/report.html")).unwrap();
    let tile = report.find(">Memory<").expect("a tile");
    (mib_after(&said, "training needs "), mib_after(&report[tile..], ">Memory<"))
}

#[test]
fn peak_memory_is_within_a_tenth_of_what_is_announced() {
    // `.ci/aarch64 all` sets it.
    if std::env::var_os("QEMU_CPU").is_some() {
        return println!("skipped: VmHWM is QEMU's, and covers the code that it translates");
    }
    let scratch = Scratch::new("memory");
    // What a process takes that trains next to nothing: the program, the model, its tokenizer, threads.
    let (announced, peak) = announced_and_peak(&scratch.path("least"), "--rank 1 --heads 1 --targets q --batch 1");
    // Of the file itself, 30 MiB, the kernel maps as much as it likes: folios of a fresh file are large.
    let program = peak - announced;
    assert!(program < 64.0, "{program} MiB");
    let eval = format!("--eval-data {} --eval-every 1", assets("corpus/test.jsonl"));
    for (name, options) in [
        ("parameters", "--targets all --rank 256 --heads 4 --batch 1".to_string()),
        // The same run once more: all of its state is read.
        ("parameters", "--targets all --rank 256 --heads 4 --batch 1 --resume".to_string()),
        ("passes", "--targets all --rank 200 --heads 4 --batch 1 --grad-accum 32".to_string()),
        ("many-heads", "--targets all --rank 64 --heads 16 --method split --batch 2 --save-every 1".to_string()),
        ("activations", "--targets all --rank 8 --batch 960 --gate router".to_string()),
        ("with-eval", format!("--targets all --rank 200 --batch 8 --recompute {eval}")),
    ] {
        let (announced, peak) = announced_and_peak(&scratch.path(name), &options);
        println!("{program:.1} MiB for the program, {options}: announced {announced} MiB, peak {peak} MiB");
        // How much of the program's own memory is resident in the end depends on the machine.
        // A run that is complete is read and written, and takes no step.
        let least = if options.ends_with("--resume") { 0.0 } else { 0.9 * announced };
        let most = 1.1 * announced + program;
        assert!((least..most).contains(&peak), "{options}: {peak} MiB, expected {least:.0} to {most:.0}");
    }
}
