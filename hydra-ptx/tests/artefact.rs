//! The PTX text, the sources and the launch table belong together.

use hydra_ptx::launch::*;
use hydra_ptx::sizes::{ATTENTION_QUERIES, ATTENTION_THREADS, WIDE_THREADS};
use hydra_ptx::{HOPPER_PTX, PTX, launch};
use hydra_ptx_device::emulator::Kind;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An entry's parameter types and its body.
struct Entry {
    params: Vec<&'static str>,
    body: &'static str,
}

/// The modules.
const TEXTS: [&str; 2] = [PTX, HOPPER_PTX];

fn entries() -> BTreeMap<&'static str, Entry> {
    let parse = |text: &'static str| {
        let (name, rest) = text.split_once('(').expect("a parameter list");
        let (params, body) = rest.split_once(')').expect("its end");
        let types = params.lines().filter_map(|line| line.trim().strip_prefix(".param ")?.split(' ').next());
        (name, Entry { params: types.collect(), body })
    };
    TEXTS.iter().flat_map(|text| text.split(".visible .entry ").skip(1)).map(parse).collect()
}

/// One launch of each of the adapter's kernels.
fn adapter_launches(tokens: u32) -> Vec<Launch> {
    let p = Ptr(256);
    let adapter = Adapter {
        a_rows: 8,
        stacked_rows: 11,
        lora_heads: 3,
        rank: 8,
        per_head_a: false,
        gate: 0,
        labels: p,
        inverse_temperature: 1.0,
        top_k: 3,
        scale: 1.0,
        dropout: Mask::default(),
        head_dropout: Mask::default(),
    };
    let dropping = Adapter { dropout: Mask { threshold: 1, ..Mask::default() }, ..adapter };
    let operand = |rows, columns| Operand::new(p, rows, columns);
    let out = LoraDown { adapter_state: p, mixed: operand(tokens, 24) };
    let up = LoraUpBackward { dy: operand(tokens, 64), adapter_state: p, adapter: &adapter };
    let d_adapter_state_bf16 = operand(tokens, 8);
    let d_router_bf16 = Some(d_adapter_state_bf16);
    let gate = GateGradient { d_adapter_state: p, d_adapter_state_bf16, d_router_bf16, db: p };
    let parts = LoraUpParts { d_mixed: p, db: p };
    vec![
        pad(p, p, 8, 93),
        lora_down(out, operand(tokens, 96), p, &dropping, (operand(64, 24), p)),
        lora_down_matvec(out, operand(2, 96), p, &adapter),
        balance_loss_grad(p, p, tokens, &adapter, 0.5),
        up.products(parts, p),
        up.gate(&gate, parts, p),
        da(p, operand(10 * tokens, 96), operand(10 * tokens, 8), &adapter).total(p),
        da(p, operand(10 * tokens, 96), operand(10 * tokens, 8), &dropping).sum(p),
        dropped_dx((Values { at: p, bf16: true }, 96), [tokens, 96], p, p, &adapter),
    ]
}

/// One launch of each product with a frozen matrix.
fn product_launches(tokens: u32) -> Vec<Launch> {
    let p = Ptr(256);
    let values = Values { at: p, bf16: true };
    let w = |format| Matrix { format, scales: p, ..Matrix::bf16(Operand::new(p, 64, 96)) };
    let mut all =
        vec![operand(Operand::new(p, tokens, 9), values, 2), decode(Operand::new(p, 64, 96), &w(Format::Q4_0))];
    for format in Format::ALL {
        for form in [Form::Rows, Form::Columns] {
            let (w, a) = (&w(format), Operand::new(p, tokens, 96));
            let second = Some(SecondProduct { a: Operand::new(p, tokens, 24), b: Operand::new(p, 64, 24) });
            let product = Product { c: values, c_pitch: 64, addend: p, form, a, w, second };
            all.push(gemm(Instructions::Mma, &product));
            if format == Format::Bf16 {
                all.push(gemm(Instructions::Wgmma, &product));
            }
        }
        let (output, x) = (Output { y: values, pitch: 64, addend: p }, Operand::new(p, 2, 96));
        let second = SecondMatvec { x: Operand::new(p, 2, 24), w: p };
        all.push(matvec(output, x, &w(format), MatrixRows::Ids { at: p, count: 4 }, Some(second)));
    }
    all
}

/// One launch of each kernel, for so many tokens; other sizes don't matter.
fn launches_for(tokens: u32) -> Vec<Launch> {
    let p = Ptr(256);
    let saved = Saved { d_o: p, lse: p, delta: p };
    let adam = AdamWStep { beta1: 0.9, beta2: 0.99, eps: 1e-8, keep: 1.0, step: 1.0, root: 1.0, grad_scale: 1.0 };
    let w = |format| Matrix { format, scales: p, ..Matrix::bf16(Operand::new(p, 64, 96)) };
    let rows = Rows { at: p, pitch: 96 };
    let loss = RunningLoss { rows: tokens, d: 96, targets: p, state: p, dx: p };
    let mut all = vec![
        rms_norm(rows, p, tokens, p, p, 96, 1e-5),
        rms_norm_backward(p, tokens, p, p, p, p, 96),
        head_norm(p, p, p, [4 * tokens, 24], 1e-5),
        head_norm_backward(rows, p, p, [tokens, 4, 24], 1e-5),
        add_bias(Values { at: p, bf16: true }, tokens, p, 96),
        rope(rows, tokens, 4, 24, p, p, false),
        swiglu(rows, [tokens, 96], p, p),
        swiglu_backward(rows, rows, [tokens, 96], p, p),
        embed(p, tokens, &w(Format::Bf16), p),
        gather(p, rows, p, tokens, 96),
        scatter(p, p, p, tokens, 96),
        online_softmax(p, &LogitsBlock { logits: p, first: 0, count: 512 }, &loss),
        finish_loss(p, &loss, &w(Format::Q4_0), 1.0),
        squares(p, p, 100_000),
        squares_total(p, p, 7),
        adamw([p; 3], p, 1000, &adam),
    ];
    for d in [64, 128] {
        let shape = Attention {
            n_heads: 4,
            kv_heads: 2,
            d,
            tiles: p,
            tile_count: tokens.div_ceil(ATTENTION_QUERIES),
            window: launch::NO_WINDOW,
        };
        all.push(launch::attention(rows, p, &shape, [p; 3], Some(Prefix { k: p, v: p, len: 3 })));
        all.push(attention_delta(p, tokens, &shape, p, rows));
        all.push(attention_dq(rows, &shape, &saved, [p; 3]));
        all.push(attention_dkv([rows; 2], &shape, &saved, [p; 3]));
    }
    all.extend(adapter_launches(tokens));
    all.extend(product_launches(tokens));
    all
}

fn launches() -> Vec<Launch> {
    launches_for(40)
}

fn sources() -> Vec<(String, PathBuf)> {
    fn walk(dir: &Path, prefix: &str, into: &mut Vec<(String, PathBuf)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{prefix}/{}", path.file_name().unwrap().to_str().unwrap());
            // What isn't compiled.
            if name.contains("emulator") || name.ends_with("host.rs") {
                continue;
            }
            if path.is_dir() {
                walk(&path, &name, into);
            } else if name.ends_with(".rs") {
                into.push((name, path));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["device/src", "src/kernels"] {
        walk(&root.join(dir), dir, &mut files);
    }
    for name in ["src/sizes.rs", "../hydra-kernels/src/math.rs", "build-ptx"] {
        files.push((name.to_string(), root.join(name)));
    }
    files.sort();
    files
}

#[test]
fn the_text_is_that_of_the_sources() {
    let mut hash = Sha256::new();
    for (name, path) in sources() {
        hash.update(format!("{name}\n"));
        hash.update(std::fs::read(path).unwrap());
    }
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    for text in TEXTS {
        let stated = text.lines().find_map(|line| line.strip_prefix("// sources sha256 ")).expect("a hash");
        assert_eq!(stated, hash, "the kernels' sources have changed: run hydra-ptx/build-ptx");
    }
}

#[test]
fn each_entry_has_its_source_and_its_launch() {
    let entries = entries();
    let launched: BTreeSet<_> = launches().iter().map(|launch| launch.entry).collect();
    assert!(entries.keys().copied().eq(launched), "launches of kernels that don't exist, or kernels without a launch");
    for launch in launches() {
        let types: Vec<_> = launch.args.iter().map(|arg| arg.ptx_type()).collect();
        assert_eq!(types, entries[launch.entry].params, "{}: parameters", launch.entry);
    }
    assert_eq!(hydra_ptx_device::entries().count(), entries.len());
    for source in hydra_ptx_device::entries() {
        let kind = |kind: &Kind| match kind {
            Kind::U64 => ".u64",
            Kind::U32 => ".u32",
            Kind::F32 => ".f32",
        };
        assert!(source.params.iter().map(kind).eq(entries[source.name].params.iter().copied()), "{}", source.name);
    }
}

#[test]
fn shared_memory_is_asked_for_where_it_is_used() {
    let entries = entries();
    for launch in launches() {
        let used = entries[launch.entry].body.contains("dynamic_shared");
        assert_eq!(used, launch.shared > 0, "{}: shared memory", launch.entry);
        // What every device from 8.0 on gives a block, and Hopper.
        let most = if HOPPER_PTX.contains(&format!("entry {}(", launch.entry)) { 227 } else { 99 };
        assert!(launch.shared <= most * 1024, "{}: {} bytes of shared memory", launch.entry, launch.shared);
        assert!(launch.threads.is_multiple_of(32) && launch.threads <= 1024);
        // Kernels that copy operands as they are stored.
        let copies = launch.threads == ATTENTION_THREADS
            || launch.entry.contains("gemm")
            || launch.entry.contains("wgmma")
            || launch.threads == WIDE_THREADS;
        assert_eq!(entries[launch.entry].body.contains("cp.async"), copies, "{}", launch.entry);
    }
}

#[test]
fn grids_have_room_for_many_tokens() {
    for launch in [40, 1 << 20, 1 << 22].into_iter().flat_map(launches_for) {
        let [x, y] = launch.grid;
        assert!(x < 1 << 31 && y <= MOST_BLOCKS_Y, "{}: a grid of {x} x {y}", launch.entry);
    }
    let (output, x) = (Output { y: Values::f32(Ptr(256)), pitch: 64, addend: Ptr::NULL }, MOST_MATVEC_TOKENS);
    let [x, w] = [x, 64].map(|rows| Operand::new(Ptr(256), rows, 96));
    assert_eq!(matvec(output, x, &Matrix::bf16(w), MatrixRows::All, None).grid[1], MOST_BLOCKS_Y);
}

/// Barriers, shuffles, ldmatrix and mma of a kernel: as many as its source has, once its loops over registers are
/// unrolled. More would mean that the compiler has cloned one into a branch.
fn collectives(name: &str) -> [usize; 4] {
    let widths = |name: &str| if name.ends_with("_128") { 16 } else { 8 };
    // Chunks of a row, fragments and products of the two kinds of products in attention, each of 32 rows.
    let chunks = widths(name);
    let rows_by_rows = |n: usize| (chunks / 2 * (2 + n / 2), chunks / 2 * 2 * n);
    let by_tile = |k: usize| (k / 2 * (chunks / 2), k / 2 * 2 * chunks);
    let sum = |parts: &[(usize, usize)]| parts.iter().fold((0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
    match name {
        // Two steps of 16: four fragments of A and two pairs of B, 4 x 4 products. C is written in two halves.
        _ if name.starts_with("gemm") => [1 + 2 * 2, 0, 2 * (4 + 2), 2 * 16],
        // C is written in one piece.
        _ if name.starts_with("wgmma") => [1 + 2, 0, 0, 0],
        // Maxima of four rows, and their sums at the end.
        "attention_64" | "attention_128" => {
            let (fragments, products) = sum(&[rows_by_rows(8), by_tile(8)]);
            [1, 2 * 4 + 2 * 4, fragments, products]
        }
        "attention_dq_64" | "attention_dq_128" => {
            let (fragments, products) = sum(&[rows_by_rows(4), rows_by_rows(4), by_tile(4)]);
            [2, 0, fragments, products]
        }
        // Two of the four products: each warp computes either dk or dv.
        "attention_dkv_64" | "attention_dkv_128" => {
            let (fragments, products) = sum(&[rows_by_rows(4), by_tile(4)]);
            [2, 0, fragments, products]
        }
        "attention_delta" | "head_norm" => [0, 5, 0, 0],
        // A sum of squares and one of products.
        "head_norm_backward" => [0, 2 * 5, 0, 0],
        // A sum a token.
        _ if name.starts_with("matvec") => [0, 4 * 5, 0, 0],
        "rms_norm" | "rms_norm_backward" => [2, 5, 0, 0],
        "online_softmax" => [2 * 2, 2 * 5, 0, 0],
        "squares" | "squares_total" | "balance_loss_grad" => [8, 0, 0, 0],
        // A sum a row.
        "lora_down_matvec" => [3, 4 * 5, 0, 0],
        // Two steps of 16 tokens: two fragments of the narrow operand, four of the wide one, 4 x 4 products. Twice,
        // where dropout may be before A.
        "weight_grad" => [2, 0, 2 * 2 * (2 + 4), 2 * 2 * 4 * 4],
        // The same, and eight steps of 16 columns, whose fragments of B are loaded before.
        "lora_up_backward" => [3, 0, 2 * (2 + 4) + 8 * (2 + 1), 2 * 4 * 4 + 8 * 4],
        // Of rows in shared memory, and in the device's.
        "gate_backward" => [2 * 2, 2 * 4, 0, 0],
        // Four parts of 32: a fragment of the right operand for two of the left one, two products. Twice, but for the
        // right one, where dropout may be before A.
        // Two chunks of 32 products; one or two tiles of rows; without dropout, and with it once for A and once for the
        // router. The gate reads shared memory or the device's.
        "lora_down" => [2 + 1 + 2, 0, 0, 2 * 32 * 2 * (1 + 2)],
        _ => [0; 4],
    }
}

#[test]
fn no_collective_is_cloned() {
    for (name, entry) in entries() {
        let count = |what: &str| entry.body.matches(what).count();
        let found = [count("bar.sync"), count("shfl.sync"), count("ldmatrix.sync"), count("mma.sync")];
        assert_eq!(found, collectives(name), "{name}: barriers, shuffles, ldmatrix, mma");
        // A fence, four products and their commit; two waits.
        let asynchronous = if name.starts_with("wgmma") { 1 + 4 + 1 + 2 } else { 0 };
        assert_eq!(count("wgmma."), asynchronous, "{name}: asynchronous products");
        let all = count(".sync") - count("bar.warp.sync");
        assert_eq!(all, found.iter().sum::<usize>() + asynchronous, "{name}: other collectives");
        // What keeps inline collectives in their place stands right before them, or before the first of two.
        let instructions: Vec<_> = entry.body.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect();
        let inline = ["ldmatrix", "wgmma.fence", "wgmma.wait_group"];
        for pair in instructions.windows(2).filter(|pair| inline.iter().any(|name| pair[1].starts_with(name))) {
            let second = pair.iter().all(|line| line.starts_with("ldmatrix"));
            assert!(second || pair[0].starts_with("bar.warp.sync"), "{name}: {pair:?}");
        }
    }
}

#[test]
fn nothing_is_atomic_on_the_stack_or_panics() {
    for banned in ["atom.", "red.", ".local", "call", ".func", "trap"] {
        for text in TEXTS {
            assert!(!text.lines().any(|line| line.trim_start().starts_with(banned)), "{banned}");
            assert!(!text.contains(&format!("\t{banned}")), "{banned}");
        }
    }
    assert!(PTX.contains(".target sm_80") && HOPPER_PTX.contains(".target sm_90a"));
}

/// The assembler: `$HYDRA_PTXAS`, or the one on the path.
fn ptxas() -> Option<PathBuf> {
    let named = std::env::var_os("HYDRA_PTXAS").map(PathBuf::from);
    let candidate = named.clone().unwrap_or_else(|| "ptxas".into());
    let runs = Command::new(&candidate).arg("--version").output().is_ok_and(|output| output.status.success());
    assert!(runs || named.is_none(), "HYDRA_PTXAS is {}, which doesn't run", candidate.display());
    runs.then_some(candidate)
}

#[test]
fn it_assembles_without_spills() {
    let Some(ptxas) = ptxas() else {
        eprintln!("no ptxas: not assembled");
        return;
    };
    let threads: BTreeMap<_, _> = launches().into_iter().map(|launch| (launch.entry, launch.threads)).collect();
    let of_all = [("sm_80", "sm_80"), ("sm_80", "sm_86"), ("sm_80", "sm_90a")];
    for (text, architecture) in of_all.into_iter().chain([("sm_90a", "sm_90a")]) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("ptx/hydra.{text}.ptx"));
        let arch = format!("-arch={architecture}");
        let output = Command::new(&ptxas).args([&arch, "-v", "-o", "/dev/null"]).arg(&path).output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{architecture}: {log}");
        // Above all that asynchronous products wait for each other.
        assert!(!log.contains("arning") && !log.contains("erformance"), "{architecture}: {log}");
        let (mut name, mut assembled) = ("", 0);
        for line in log.lines() {
            if let Some(rest) = line.split_once("Compiling entry function '") {
                name = rest.1.split('\'').next().unwrap();
            } else if line.contains("bytes spill stores") {
                assert!(
                    line.contains("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"),
                    "{name}: {line}"
                );
            } else if let Some(rest) = line.split_once("Used ") {
                let registers: u32 = rest.1.split(' ').next().unwrap().parse().unwrap();
                println!("{architecture} {name:<20} {registers} registers");
                // Two blocks of a product on a multiprocessor, so that one multiplies while the other waits.
                let two = name.starts_with("gemm") || ["lora_up_backward", "weight_grad"].contains(&name);
                let blocks = if two { 2 } else { 1 };
                assert!(blocks * registers * threads[name] <= 65_536, "{name}: {registers} registers");
                assembled += 1;
            }
        }
        let entries = std::fs::read_to_string(&path).unwrap().matches(".visible .entry").count();
        assert_eq!(assembled, entries, "{architecture}: {log}");
    }
}
