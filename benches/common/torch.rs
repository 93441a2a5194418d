//! PyTorch as a process that multiplies when it is told to: its bf16 products (oneDNN's) beside ours in one report.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Names a Python with PyTorch.
pub const PYTHON: &str = "HYDRA_PYTHON";

/// x [m, k] and w [n, k] in bf16, of the bench's values; on one thread, as ours. Each line on stdin asks for so many products
/// x wᵀ and is answered by their seconds; the first line out is 64 sampled elements of the product.
const SCRIPT: &str = "
import sys, time, torch
m, n, k = map(int, sys.argv[1:])
torch.set_num_threads(1)
def values(rows, columns):
    i = torch.arange(rows * columns)
    return (((i * 2654435761 >> 16 & 15) / 8) - 1).reshape(rows, columns).bfloat16()
x, w = values(m, k), values(n, k)
y = torch.nn.functional.linear(x, w)
print(*(y[s * 7919 % m, s * 104729 % n].item() for s in range(64)), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        y = torch.nn.functional.linear(x, w)
    print(time.perf_counter() - start, flush=True)
";

/// One shape's process.
pub struct Torch {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Torch {
    /// Begins, and gives the sampled elements; `None` if [`PYTHON`] isn't set.
    pub fn begin(m: usize, n: usize, k: usize) -> Option<(Self, Vec<f32>)> {
        let python = std::env::var_os(PYTHON)?;
        let mut child = Command::new(python)
            .args(["-c", SCRIPT])
            .args([m, n, k].map(|size| size.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{PYTHON}: {error}"));
        let (requests, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut torch = Self { child, requests, answers };
        let sampled = torch.answer().split_whitespace().map(|value| value.parse().unwrap()).collect();
        Some((torch, sampled))
    }

    /// The time that so many products take.
    pub fn time(&mut self, products: u64) -> Duration {
        writeln!(self.requests, "{products}").unwrap();
        Duration::from_secs_f64(self.answer().trim().parse().unwrap())
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{PYTHON}: it ended; has it PyTorch?");
        line
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
