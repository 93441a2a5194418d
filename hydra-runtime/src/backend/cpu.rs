//! The CPU: `hydra-kernels` on a pool of threads.
//!
//! Threads live here and nowhere else. Kernels are pure and single-threaded; this module splits rows of outputs among
//! threads, or adds up parts in a fixed order, so that no result depends on the number of threads.

mod aligned;
mod attention;
mod binding;
mod buffer;
mod elementwise;
mod exec;
mod gradient;
mod lanes;
mod linear;
mod loss;
mod operations;
mod operator;
mod parts;
mod q8;
mod rows;
mod threads;
mod workspace;

use crate::{Error, Result};
pub use aligned::Aligned;
pub use binding::Bound;
pub use buffer::{Activations, Buffer};
use exec::with_element;
use hydra_kernels::Scratch;
use hydra_kernels::gemm::PANEL_ALIGN;
use hydra_kernels::hydra::{MAX_ROW_STEPS, row_step};
pub use hydra_kernels::isa::{Bf16Isa, Isa, Q8Isa};
use std::sync::Mutex;
use threads::{Threads, lock};
use workspace::Workspaces;

/// What matrices are multiplied in; everything else, and every sum, is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout: agrees with the reference to rounding.
    F32,
    /// The operands of the large products are rounded to bf16.
    Bf16,
    /// Products with frozen weights in block formats quantize their activations to eight bits, in blocks of 32, and
    /// multiply integers ([`hydra_kernels::q8`]). All else, products with f32, f16 and bf16 weights included, is as
    /// under [`Precision::F32`]. For evaluation and generation: nothing is trained in it.
    Q8,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Q8];

    /// "f32", "bf16" or "q8".
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Q8 => "q8",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|precision| precision.name() == name)
    }
}

/// How to set up the CPU.
#[derive(Clone, Copy, Debug)]
pub struct CpuOptions {
    /// Number of threads; `None` takes one a core.
    pub threads: Option<usize>,
    /// Operand precision.
    pub precision: Precision,
    /// The instruction set of f32 arithmetic, [`Isa::by_name`] say; `None` takes the machine's best.
    pub isa: Option<Isa>,
    /// That of products under [`Precision::Bf16`], which `isa` doesn't limit; `None` takes the machine's best.
    pub bf16_isa: Option<Bf16Isa>,
    /// That of integer products under [`Precision::Q8`], which `isa` doesn't limit; `None` takes the machine's best.
    pub q8_isa: Option<Q8Isa>,
    /// Keep each thread on a CPU of its own if the process may use as many CPUs as there are threads; the calling thread
    /// during each step. This helps beside other busy programs, and makes no difference alone. Only on Linux.
    pub bind_threads: bool,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { threads: None, precision: Precision::F32, isa: None, bf16_isa: None, q8_isa: None, bind_threads: true }
    }
}

/// The CPU as a [`Backend`](super::Backend).
///
/// Several threads may use one at a time: they share its threads, and each operation that is under way has memory of its own.
pub struct Cpu {
    threads: Threads,
    precision: Precision,
    isa: Isa,
    bf16_isa: Bf16Isa,
    q8_isa: Q8Isa,
    workspaces: Workspaces,
    /// One for each worker; locked while a task uses it.
    worker_scratch: Vec<Mutex<Aligned<f32>>>,
    /// As many as callers have needed at once.
    caller_scratch: Mutex<Vec<Aligned<f32>>>,
}

impl Cpu {
    /// Starts the threads. Fails if there can't be that many.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(0) => return Err(Error::Invalid("0 threads".into())),
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        Ok(Self {
            threads: Threads::new(threads, options.bind_threads)?,
            precision: options.precision,
            isa: options.isa.unwrap_or_else(Isa::detect),
            bf16_isa: options.bf16_isa.unwrap_or_else(Bf16Isa::detect),
            q8_isa: options.q8_isa.unwrap_or_else(Q8Isa::detect),
            workspaces: Workspaces::default(),
            worker_scratch: (1..threads).map(|_| Mutex::default()).collect(),
            caller_scratch: Mutex::default(),
        })
    }

    /// Number of threads in use.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Operand precision.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `len` floats of this thread's scratch; what they hold is not specified.
    fn with_scratch<R>(&self, len: usize, body: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
        // A worker keeps its own, which stays in its core's cache. Callers, of which there may be several, take turns.
        if let Some(worker) = self.threads.worker() {
            let mut scratch = lock(&self.worker_scratch[worker]);
            return body(&mut scratch.reserve(len)?[..len]);
        }
        let mut scratch = lock(&self.caller_scratch).pop().unwrap_or_default();
        let result = body(&mut scratch.reserve(len)?[..len]);
        lock(&self.caller_scratch).push(scratch);
        result
    }

    /// The same, as kernels take it.
    fn with_workspace<R>(
        &self,
        need: Scratch,
        body: impl FnOnce(&mut hydra_kernels::Workspace<'_>) -> Result<R>,
    ) -> Result<R> {
        self.with_scratch(need.0, |scratch| body(&mut hydra_kernels::Workspace::new(scratch)))
    }

    /// Calls `part` with each of `parts`, on all threads.
    fn run<I>(&self, parts: I, part: impl Fn(I::Item) + Sync)
    where
        I: ExactSizeIterator + Send,
        I::Item: Send,
    {
        let infallible = |_, item| {
            part(item);
            Ok(())
        };
        self.threads.each(parts, infallible).expect("parts that don't fail");
    }

    /// Rows a task takes: few enough that a task's results stay in its core's L2 for what comes next; every task reads all of a
    /// weight's panels.
    fn row_chunk(&self, rows: usize) -> usize {
        self.row_share(rows, MAX_ROW_STEPS)
    }

    /// Rows a task takes, whole tiles, at most `tiles` of them.
    fn row_share(&self, rows: usize, tiles: usize) -> usize {
        // In f32 48 rows, which are three tiles of a product in eight bits, too.
        let tile = with_element!(self.precision, E => row_step::<E>());
        tile * self.share(rows.div_ceil(tile), tiles)
    }

    /// Columns a task takes, whole panels, at most `panels` of them.
    fn column_share(&self, columns: usize, panels: usize) -> usize {
        PANEL_ALIGN * self.share(columns.div_ceil(PANEL_ALIGN), panels)
    }

    /// How many of `units` a task takes, `most` at most: two tasks a thread or more, as many for each thread, so that all end
    /// together.
    fn share(&self, units: usize, most: usize) -> usize {
        let rounds = units.div_ceil(most.saturating_mul(self.threads.count())).max(2);
        units.div_ceil(rounds * self.threads.count()).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Linear, LinearOutput, StoredWeight};
    use hydra_kernels::{Format, RowOrder};

    fn cpu(threads: usize) -> Cpu {
        Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap()
    }

    #[test]
    fn threads_get_equal_shares() {
        let two = cpu(2);
        // 70 as 5 × 12 + 10, not 4 × 16 + 6.
        assert_eq!([18, 48, 47, 70, 64, 1, 0].map(|units| two.share(units, 16)), [5, 12, 12, 12, 16, 1, 1]);
        for threads in [1, 2, 3, 64] {
            let cpu = cpu(threads);
            for units in 1..300 {
                for most in [1, 8, 16, usize::MAX] {
                    let share = cpu.share(units, most);
                    let rounds = units.div_ceil(share).div_ceil(threads);
                    assert!((1..=most).contains(&share), "{share} of {units}");
                    assert!(
                        share == 1 || rounds * share * threads < units + 3 * rounds * threads,
                        "{share} of {units}"
                    );
                }
            }
        }
    }

    /// A weight that is worth several threads: the same bits from any number of them.
    #[test]
    fn one_token_has_the_same_bits_on_any_number_of_threads() {
        let (rows, cols) = (1001, 1024);
        let data: Vec<u8> = (0..rows * cols).flat_map(|i| ((i % 251) as f32 - 125.0).to_le_bytes()).collect();
        let weight = &StoredWeight::new(Format::F32, rows, cols, data, RowOrder::Natural).unwrap();
        let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |threads: usize, added: bool| {
            let (x, residual) = (&Activations::F32(x.as_slice().into()), Buffer::from(&*vec![0.5; rows]));
            let mut y = Buffer::from(&*vec![9.0; rows]);
            let output = LinearOutput::Buffer { y: &mut y, residual: added.then_some(&residual) };
            cpu(threads).linear(Linear { output, tokens: 1, x, weight, bias: None, adapter: None }).unwrap();
            y.to_vec()
        };
        let (set, added) = (run(1, false), run(1, true));
        assert!(set.iter().zip(&added).all(|(set, added)| 0.5 + set == *added));
        for threads in [2, 3, 8] {
            assert_eq!(run(threads, false), set);
            assert_eq!(run(threads, true), added);
        }
    }

    /// Sums that don't fit the tiles' registers for long, a bf16 result, columns that come in two blocks.
    #[test]
    fn deep_products_into_bf16_are_rounded_once() {
        let (tokens, rows, cols) = (37, 530, 2100);
        let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 16 & 15) as f32 / 8.0 - 1.0;
        let w: Vec<f32> = (0..rows * cols).map(value).collect();
        let x: Vec<f32> = (0..tokens * cols).map(|i| value(i + 7)).collect();
        let bytes = w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
        let weight = &StoredWeight::new(Format::F32, rows, cols, bytes, RowOrder::Natural).unwrap();
        let options = CpuOptions { threads: Some(2), precision: Precision::Bf16, ..CpuOptions::default() };
        let cpu = Cpu::new(options).unwrap();
        let (mut operand, mut y) = (cpu.activations(x.len()).unwrap(), cpu.activations(tokens * rows).unwrap());
        cpu.upload_activations(&mut operand, &x).unwrap();
        let output = LinearOutput::Activations { y: &mut y, residual: None };
        cpu.linear(Linear { output, tokens, x: &operand, weight, bias: None, adapter: None }).unwrap();
        let mut got = vec![0.0; tokens * rows];
        cpu.download_activations(&mut got, &y).unwrap();
        for (i, got) in got.into_iter().enumerate() {
            let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
            // Multiples of 1/64 below 2^12: exact in f32, whatever the order.
            let want: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            assert_eq!(got, half::bf16::from_f32(want).to_f32(), "[{}, {}]", i / rows, i % rows);
        }
    }
}
