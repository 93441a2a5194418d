//! Every operation except the linear ones. `size` scales the shapes.

use crate::support::*;
use hydra_kernels::quant::{Format, RowOrder};
use hydra_ptx::sizes::DECODED_TOKENS;
use hydra_runtime::backend::cuda::{Cuda, Driver};
use hydra_runtime::backend::{
    AdamW, AdamWStep, Attention, AttentionBackward, AttentionShape, Backend, HeadLoss, HeadNorm, HeadNormBackward,
    Prefix, RmsNorm, RmsNormBackward, Rope, StoredWeight,
};
use hydra_runtime::batch::Segment;
use hydra_runtime::config::Config;
use std::num::NonZeroUsize;

/// A matrix of a random format: random quants with scales of moderate size.
pub struct Stored {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: Vec<u8>,
    order: RowOrder,
}

impl Stored {
    pub fn draw(random: &mut Random, rows: usize, columns: usize) -> Self {
        let fits = |format: &Format| columns.is_multiple_of(format.block_len());
        let formats: Vec<_> = Format::ALL.into_iter().filter(fits).collect();
        let format = formats[random.within(0, formats.len() - 1)];
        let values = rows * columns;
        let bytes = match format {
            // Representable in bf16, so that the device has the same values.
            Format::F32 => {
                random.values(values).iter().flat_map(|x| (x.to_bits() & 0xffff_0000).to_le_bytes()).collect()
            }
            Format::F16 => random.values(values).iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
            Format::Bf16 => random.values(values).iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            _ => {
                let mut bytes: Vec<u8> =
                    (0..rows * format.row_bytes(columns).unwrap()).map(|_| random.bits() as u8).collect();
                for block in bytes.chunks_mut(format.block_bytes()) {
                    let scales = half::f16::from_f32(0.01 + random.values(1)[0].abs() / 16.0).to_le_bytes();
                    let places: &[usize] = match format {
                        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
                        Format::Q2K => &[80, 82],
                        Format::Q3K => &[108],
                        Format::Q6K => &[208],
                        _ => &[0],
                    };
                    places.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&scales));
                }
                bytes
            }
        };
        let order = if rows.is_multiple_of(4) && random.coin() {
            RowOrder::Interleaved { head_dim: 4 }
        } else {
            RowOrder::Natural
        };
        Self { format, rows, columns, bytes, order }
    }

    pub fn bf16(random: &mut Random, rows: usize, columns: usize) -> Self {
        let bytes = random.values(rows * columns).iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        Self { format: Format::Bf16, rows, columns, bytes, order: RowOrder::Natural }
    }

    /// Rows and columns.
    pub fn sizes(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    pub fn weight(&self) -> StoredWeight {
        StoredWeight::new(self.format, self.rows, self.columns, self.bytes.clone(), self.order).unwrap()
    }

    /// For the vocabulary's matrix, which the CPU reads by blocks of rows.
    pub fn in_order(mut self) -> Self {
        self.order = RowOrder::Natural;
        self
    }

    pub fn name(&self) -> String {
        format!("{} {:?} [{}, {}]", self.format.name(), self.order, self.rows, self.columns)
    }
}

pub fn memory<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let len = random.within(1, 500 * size);
    let values = random.rounded(len);
    let (filled, mut buffer) = (put(cuda, &values), cuda.buffer(len + 7).unwrap());
    assert_eq!(get(cuda, &buffer, len + 7), vec![0.0; len + 7], "buffers are zeroed");
    cuda.copy(&mut buffer, 7, &filled, len).unwrap();
    assert_eq!(get(cuda, &buffer, len + 7)[7..], values);
    cuda.copy(&mut buffer, len + 7, &filled, 0).unwrap();
    cuda.zero(&mut buffer, 0).unwrap();
    cuda.zero(&mut buffer, 8).unwrap();
    let after = get(cuda, &buffer, len + 7);
    assert!(after[..8].iter().all(|&x| x == 0.0) && after[8..] == values[1..]);
    let (filled, mut activations) = (put_activations(cuda, &values), cuda.activations(len + 7).unwrap());
    assert_eq!(get_activations(cuda, &activations, len + 7), vec![0.0; len + 7], "activations are zeroed");
    cuda.copy_activations(&mut activations, 7, &filled, 0..len).unwrap();
    assert_eq!(get_activations(cuda, &activations, len + 7)[7..], values);
    cuda.copy_activations(&mut activations, len + 7, &filled, 0..0).unwrap();
    cuda.copy_activations(&mut activations, 3, &filled, len / 3..len).unwrap();
    assert_eq!(get_activations(cuda, &activations, 3 + len - len / 3)[3..], values[len / 3..]);
    let config = Config::open(golden_case("qwen3/model")).unwrap();
    assert!(cuda.supports(&config).is_ok());
    let said = cuda.supports(&Config { head_dim: 256, ..config.clone() }).unwrap_err().to_string();
    assert!(said.contains("qwen3") && said.contains("256"), "{said}");
    assert!(!cuda.describe().is_empty());
}

/// Uploads twice what the pinned buffer holds before anything is waited for, and drops a device that is still working.
pub fn work_under_way<D: Driver>(cuda: Cuda<D>) {
    let values: Vec<f32> = (0..5 << 20).map(|i| i as f32).collect();
    let first = put(&cuda, &values);
    let second = put(&cuda, &values[1..]);
    assert_eq!(get(&cuda, &first, values.len()), values);
    assert_eq!(get(&cuda, &second, values.len() - 1), values[1..]);
    let third = put(&cuda, &values[..1000]);
    drop(cuda);
    drop([first, second, third]);
}

/// The error states what was asked for and what is free, and what is free can still be allocated.
pub fn more_memory_than_there_is<D: Driver>(cuda: &Cuda<D>) {
    // The driver allocates memory of its own at the first use of some functions.
    get(cuda, &put(cuda, &[0.0]), 1);
    let before = cuda.free_bytes().unwrap();
    let kept = put(cuda, &[1.0, 2.0]);
    let Err(error) = cuda.buffer(1 << 40) else { panic!("four TiB") };
    let text = error.to_string();
    assert!(text.contains("out of memory: 4194304.0 MiB asked for") && text.contains(" are free"), "{text}");
    let more: Vec<_> = (1..100).map(|i| put(cuda, &vec![i as f32; 1000 * i])).collect();
    for (i, buffer) in (1..100).zip(&more) {
        assert_eq!(get(cuda, buffer, 1000 * i), vec![i as f32; 1000 * i]);
    }
    assert_eq!(get(cuda, &kept, 2), [1.0, 2.0]);
    drop((kept, more));
    assert_eq!(cuda.free_bytes().unwrap(), before);
}

pub fn embedding<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let (rows, columns) = (random.within(1, 40), if random.coin() { 256 } else { random.within(1, 100 * size) });
    let table = Stored::draw(random, rows, columns);
    let tokens = random.within(1, 20 * size);
    let ids = random.ids(tokens, rows);
    fn run<B: Backend>(b: &B, table: &Stored, ids: &[u32]) -> Results {
        let mut out = b.buffer(ids.len() * table.columns).unwrap();
        b.embed(&mut out, &b.matrix(table.weight()).unwrap(), ids).unwrap();
        vec![("rows", get(b, &out, ids.len() * table.columns))]
    }
    // Formats without a kernel are converted to bf16.
    assert_same(&table.name(), run(cuda, &table, &ids), run(&cpu(), &table, &ids), 4e-3);
}

pub fn norms<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let (tokens, d) = (random.within(1, 9 * size), random.within(1, 700 * size));
    let inputs: Vec<_> = [tokens * d, d, tokens * d, tokens * d].iter().map(|&len| random.values(len)).collect();
    fn run<B: Backend>(b: &B, tokens: usize, d: usize, inputs: &[Vec<f32>]) -> Results {
        let [x, weight, dy, mut dx] = [0, 1, 2, 3].map(|i| put(b, &inputs[i]));
        let (mut y, mut inv_rms) = (b.operand(tokens, d).unwrap(), b.buffer(tokens).unwrap());
        let (x, weight) = (&x, &weight);
        b.rms_norm(RmsNorm { y: &mut y, inv_rms: &mut inv_rms, tokens, x, weight, eps: 1e-5 }).unwrap();
        b.rms_norm_backward(RmsNormBackward { dx: &mut dx, tokens, dy: &dy, x, inv_rms: &inv_rms, weight }).unwrap();
        let y = get_activations(b, &y, tokens * d);
        vec![("y", y), ("1/rms", get(b, &inv_rms, tokens)), ("dx", get(b, &dx, tokens * d))]
    }
    let (mut got, mut want) = (run(cuda, tokens, d, &inputs), run(&cpu(), tokens, d, &inputs));
    let case = format!("[{tokens}, {d}]");
    assert_same(&case, vec![got.remove(0)], vec![want.remove(0)], BF16);
    assert_same(&case, got, want, F32);
}

pub fn head_norms<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let d = [64, 128, 2 * random.within(1, 80)][random.within(0, 2)];
    let (rows, n_heads, eps) = (random.within(1, 10 * size), random.within(1, 4), 1e-5);
    let heads = rows * n_heads;
    let inputs: Vec<_> = [heads * d, d, heads * d].iter().map(|&len| random.rounded(len)).collect();
    fn run<B: Backend>(b: &B, rows: usize, eps: f32, inputs: &[Vec<f32>]) -> Results {
        let len = inputs[0].len();
        let heads = len / inputs[1].len();
        let (x, weight) = (&put_activations(b, &inputs[0]), &put(b, &inputs[1]));
        let (mut y, mut dx) = (b.activations(len).unwrap(), put_rows(b, len / rows, &inputs[2]));
        b.head_norm(HeadNorm { y: &mut y, heads, x, weight, eps }).unwrap();
        b.head_norm_backward(HeadNormBackward { dx: &mut dx, heads, x, weight, eps }).unwrap();
        vec![("y", get_activations(b, &y, len)), ("dx", get_activations(b, &dx, len))]
    }
    let case = format!("{rows} rows of {n_heads} heads of {d}");
    assert_same(&case, run(cuda, rows, eps, &inputs), run(&cpu(), rows, eps, &inputs), BF16);
}

pub fn rotations<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let d = [64, 128, 2 * random.within(1, 40)][random.within(0, 2)];
    let (tokens, heads) = (random.within(1, 9 * size), random.within(1, 4));
    let positions = random.ids(tokens, 30);
    let (x, table, inverse) = (random.rounded(tokens * heads * d), random.values(30 * d), random.coin());
    fn run<B: Backend>(
        b: &B,
        [heads, d]: [usize; 2],
        positions: &[u32],
        inverse: bool,
        x: &[f32],
        table: &[f32],
    ) -> Results {
        let (mut rotated, table) = (put_rows(b, heads * d, x), put(b, table));
        b.rope(Rope { x: &mut rotated, n_heads: heads, head_dim: d, table: &table, positions, inverse }).unwrap();
        vec![("x", get_activations(b, &rotated, x.len()))]
    }
    let got = run(cuda, [heads, d], &positions, inverse, &x, &table);
    let want = run(&cpu(), [heads, d], &positions, inverse, &x, &table);
    assert_same(&format!("{tokens} tokens, {heads} heads of {d}"), got, want, BF16);
}

pub fn swiglu<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let (rows, d) = (random.within(1, 9 * size), random.within(1, 200 * size));
    let len = rows * d;
    let inputs: Vec<Vec<f32>> = (0..3).map(|_| random.rounded(len).iter().map(|x| 8.0 * x).collect()).collect();
    // In rows, or one after the other.
    let rows = random.coin().then_some(rows);
    fn run<B: Backend>(b: &B, rows: Option<usize>, inputs: &[Vec<f32>]) -> Results {
        let len = inputs[0].len();
        let [gate, up, mut dgate] = [0, 1, 2].map(|i| put_activations(b, &inputs[i]));
        let [mut out, mut dup] = [(); 2].map(|()| match rows {
            Some(rows) => b.operand(rows, len / rows).unwrap(),
            None => b.activations(len).unwrap(),
        });
        if let Some(rows) = rows {
            dgate = put_rows(b, len / rows, &inputs[2]);
        }
        b.swiglu(&mut out, len, &gate, &up).unwrap();
        b.swiglu_backward(&mut dgate, &mut dup, len, &gate, &up).unwrap();
        [("out", &out), ("dgate", &dgate), ("dup", &dup)].map(|(name, x)| (name, get_activations(b, x, len))).into()
    }
    assert_same(&format!("{rows:?} rows of {len} values"), run(cuda, rows, &inputs), run(&cpu(), rows, &inputs), BF16);
}

pub fn gather_and_scatter<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let (tokens, d) = (random.within(1, 20 * size), 2 * random.within(1, 150 * size));
    let rows: Vec<u32> = (0..tokens as u32).filter(|_| random.coin()).collect();
    let (x, old) = (random.rounded(tokens * d), random.values(tokens * d));
    fn run<B: Backend>(b: &B, rows: &[u32], d: usize, x: &[f32], old: &[f32]) -> Results {
        let mut gathered = b.buffer(rows.len() * d).unwrap();
        b.gather(&mut gathered, &put(b, x), rows, d).unwrap();
        let mut scattered = put(b, old);
        b.scatter(&mut scattered, x.len() / d, &gathered, rows, d).unwrap();
        let mut activations = b.activations(rows.len() * d).unwrap();
        b.gather_activations(&mut activations, &put_rows(b, d, x), rows, d).unwrap();
        vec![
            ("gathered", get(b, &gathered, rows.len() * d)),
            ("scattered", get(b, &scattered, x.len())),
            ("activations", get_activations(b, &activations, rows.len() * d)),
        ]
    }
    let (got, want) = (run(cuda, &rows, d, &x, &old), run(&cpu(), &rows, d, &x, &old));
    assert_same(&format!("{} of {tokens} rows of {d}", rows.len()), got, want, 0.0);
}

pub fn attention<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let kv_heads = random.within(1, 2 * size);
    let head_dim = [64, 128, 8, 2 * random.within(1, 63)][random.within(0, 3)];
    let shape = AttentionShape { n_heads: kv_heads * random.within(1, 3), kv_heads, head_dim };
    let mut segments = Vec::new();
    let mut tokens = 0;
    for _ in 0..random.within(1, 3) {
        let len = [1, 63, 64, 65, random.within(1, 150 * size)][random.within(0, 4)];
        segments.push(Segment { start: tokens, len });
        tokens += len;
    }
    let prefix = if random.coin() { random.within(1, 130) } else { 0 };
    // 0: none.
    let window = [0, 0, 1, 64, 65, random.within(1, 200)][random.within(0, 5)];
    let (wide, narrow, before) = (tokens * shape.q_width(), tokens * shape.kv_width(), prefix * shape.kv_width());
    let inputs: Vec<_> = [wide, narrow, narrow, wide, before, before].iter().map(|&len| random.rounded(len)).collect();
    fn run<B: Backend>(
        b: &B,
        shape: AttentionShape,
        segments: &[Segment],
        [prefix, window]: [usize; 2],
        inputs: &[Vec<f32>],
    ) -> Results {
        let (wide, narrow) = (inputs[0].len(), inputs[1].len());
        let (rows, window) = (wide / shape.head_dim, NonZeroUsize::new(window));
        let [q, k, v, d_o, prefix_k, prefix_v] = [0, 1, 2, 3, 4, 5].map(|i| put_activations(b, &inputs[i]));
        let (q, k, v) = (&q, &k, &v);
        let tokens = wide / shape.q_width();
        let (mut o, mut lse) = (b.operand(tokens, shape.q_width()).unwrap(), b.buffer(rows).unwrap());
        let mut results = Vec::new();
        if prefix > 0 {
            let prefix = Some(Prefix { k: &prefix_k, v: &prefix_v, len: prefix });
            b.attention(Attention { o: &mut o, lse: &mut lse, shape, segments, window, q, k, v, prefix }).unwrap();
            results.extend([("o after a prefix", get_activations(b, &o, wide)), ("its lse", get(b, &lse, rows))]);
        }
        b.attention(Attention { o: &mut o, lse: &mut lse, shape, segments, window, q, k, v, prefix: None }).unwrap();
        let [mut dq, mut dk, mut dv] =
            [wide, narrow, narrow].map(|len| put_rows(b, len / tokens, &vec![f32::NAN; len]));
        let (o, lse, d_o) = (&o, &lse, &d_o);
        let (dqs, dks, dvs) = (&mut dq, &mut dk, &mut dv);
        b.attention_backward(AttentionBackward {
            dq: dqs,
            dk: dks,
            dv: dvs,
            shape,
            segments,
            window,
            d_o,
            o,
            lse,
            q,
            k,
            v,
        })
        .unwrap();
        results.push(("lse", get(b, lse, rows)));
        let activations = [("o", o, wide), ("dq", &dq, wide), ("dk", &dk, narrow), ("dv", &dv, narrow)];
        results.extend(activations.map(|(name, x, len)| (name, get_activations(b, x, len))));
        results
    }
    let case = format!("{shape:?} {segments:?} prefix {prefix} window {window}");
    let before = [prefix, window];
    let (got, want) = (run(cuda, shape, &segments, before, &inputs), run(&cpu(), shape, &segments, before, &inputs));
    if window == 1 {
        let zero = |name: &str| got.iter().filter(|result| result.0 == name).all(|(_, x)| x.iter().all(|x| *x == 0.0));
        assert!(zero("dq") && zero("dk"), "{case}: the softmax over a single key is constant");
    }
    assert_same(&case, got, want, BF16);
}

/// Scores near the lowest number are scores: only those of hidden keys count as none.
pub fn lowest_scores<D: Driver>(cuda: &Cuda<D>, random: &mut Random, _: usize) {
    let (tokens, shape) = (70, AttentionShape { n_heads: 1, kv_heads: 1, head_dim: 8 });
    let v = random.rounded(tokens * shape.head_dim);
    fn run<B: Backend>(b: &B, shape: AttentionShape, v: &[f32]) -> Results {
        let (rows, large) = (v.len() / shape.head_dim, vec![2f32.powi(60); v.len()]);
        let (q, k) = (&put_activations(b, &large), &put_activations(b, &large.iter().map(|x| -x).collect::<Vec<_>>()));
        let (mut o, mut lse) = (b.activations(v.len()).unwrap(), b.buffer(rows).unwrap());
        let (v, segments) = (&put_activations(b, v), &[Segment { start: 0, len: rows }]);
        let (window, prefix) = (None, None);
        b.attention(Attention { o: &mut o, lse: &mut lse, shape, segments, window, q, k, v, prefix }).unwrap();
        vec![("o", get_activations(b, &o, rows * shape.head_dim)), ("lse", get(b, &lse, rows))]
    }
    assert_same("the lowest scores", run(cuda, shape, &v), run(&cpu(), shape, &v), BF16);
}

pub fn head<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let (vocab, d) = (random.within(2, 400 * size), if random.coin() { 32 } else { random.within(1, 90 * size) });
    let rows = random.within(1, 20 * size);
    check_head(cuda, random, [vocab, d, rows]);
}

/// With enough rows that a quantised vocabulary's matrix is decoded, and enough ids for two blocks of the vocabulary.
pub fn large_head<D: Driver>(cuda: &Cuda<D>, random: &mut Random, _: usize) {
    let decoded = [random.within(2, 60), 32, DECODED_TOKENS as usize + random.within(0, 40)];
    check_head(cuda, random, decoded);
    let two_blocks = [8192 + random.within(1, 90), 32, random.within(1, 5)];
    check_head(cuda, random, two_blocks);
}

fn check_head<D: Driver>(cuda: &Cuda<D>, random: &mut Random, [vocab, d, rows]: [usize; 3]) {
    let stored = Stored::draw(random, vocab, d).in_order();
    // Small logits, because the exponentials of large ones magnify the weights' rounding to bf16.
    let x: Vec<f32> = random.rounded(rows * d).into_iter().map(|x| x / 4.0).collect();
    let (targets, ids) = (random.ids(rows, vocab), random.ids(4, vocab));
    fn run<B: Backend>(b: &B, stored: &Stored, x: &[f32], targets: &[u32], ids: &[u32]) -> Results {
        let (rows, lm_head, x) = (targets.len(), &b.matrix(stored.weight()).unwrap(), &put_activations(b, x));
        let (mut nll, mut dx) = (b.buffer(rows).unwrap(), put(b, &vec![f32::NAN; rows * stored.columns]));
        b.head_loss(HeadLoss { nll: &mut nll, dx: Some(&mut dx), x, lm_head, targets, scale: 0.5 }).unwrap();
        let mut alone = b.buffer(rows).unwrap();
        b.head_loss(HeadLoss { nll: &mut alone, dx: None, x, lm_head, targets, scale: 0.5 }).unwrap();
        assert_eq!(get(b, &alone, rows), get(b, &nll, rows), "with and without a gradient");
        let mut logits = vec![0.0; rows * ids.len()];
        b.head_rows(&mut logits, x, rows, lm_head, ids).unwrap();
        vec![("nll", get(b, &nll, rows)), ("dx", get(b, &dx, rows * stored.columns)), ("logits", logits)]
    }
    let case = format!("{} {rows} rows", stored.name());
    assert_same(&case, run(cuda, &stored, &x, &targets, &ids), run(&cpu(), &stored, &x, &targets, &ids), BF16);
}

pub fn optimizer<D: Driver>(cuda: &Cuda<D>, random: &mut Random, size: usize) {
    let len = random.within(1, 40_000 * size);
    let inputs: Vec<_> = (0..4).map(|_| random.values(len)).collect();
    fn run<B: Backend>(b: &B, inputs: &[Vec<f32>]) -> (Results, f64) {
        let len = inputs[0].len();
        let [mut params, mut m, mut v, mut grads] = [0, 1, 2, 3].map(|i| put(b, &inputs[i]));
        // All but one of them: what is behind stays.
        b.add(&mut grads, &m, len - 1).unwrap();
        b.upload(&mut v, &inputs[2].iter().map(|x| x.abs()).collect::<Vec<_>>()).unwrap();
        let adam = AdamW { weight_decay: 0.1, ..AdamW::default() };
        let rates = [(0..len / 3, 1e-2), (len / 3..len, 3e-3)];
        b.adamw(AdamWStep {
            params: &mut params,
            exp_avg: &mut m,
            exp_avg_sq: &mut v,
            grads: &grads,
            rates: &rates,
            adam,
            step: 3,
            grad_scale: 0.5,
        })
        .unwrap();
        let sum = b.sum_of_squares(&grads, len).unwrap();
        let results = [("params", &params), ("m", &m), ("v", &v), ("grads", &grads)];
        (results.map(|(name, buffer)| (name, get(b, buffer, len))).into(), sum)
    }
    let ((got, got_sum), (want, want_sum)) = (run(cuda, &inputs), run(&cpu(), &inputs));
    assert_same(&format!("{len} parameters"), got, want, 1e-6);
    assert!((got_sum / want_sum - 1.0).abs() < 1e-12, "{got_sum} and {want_sum}");
}
