//! The launch table: one pure function for each kernel.
//!
//! What the parameters mean is said at the kernels (`device/src`); the order here is theirs, and a test compares both with the
//! PTX text. Sizes are in elements, pointers are device addresses. Activations are bf16; an *operand* is an activation whose rows
//! are padded with zeros to a multiple of 8 columns.

use crate::sizes::*;

mod adapter;
mod attention;
mod dense;
mod model;

pub use adapter::*;
pub use attention::*;
pub use dense::*;
pub use model::*;

/// An address in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// No memory: what the kernel would write there, it doesn't.
    pub const NULL: Ptr = Ptr(0);

    /// The address of f32 number `index` from here.
    pub fn f32(self, index: usize) -> Self {
        Ptr(self.0 + 4 * index as u64)
    }
}

/// Values that are f32, or bf16 as activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Values {
    /// The first.
    pub at: Ptr,
    /// Which of the two.
    pub bf16: bool,
}

impl Values {
    /// f32.
    pub fn f32(at: Ptr) -> Self {
        Self { at, bf16: false }
    }
}

/// A parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// An address or a 64-bit number.
    U64(u64),
    /// A 32-bit number.
    U32(u32),
    /// A float.
    F32(f32),
}

impl Arg {
    /// The parameter in 64 bits, the lower ones first.
    pub fn slot(self) -> u64 {
        match self {
            Arg::U64(value) => value,
            Arg::U32(value) => u64::from(value),
            Arg::F32(value) => u64::from(value.to_bits()),
        }
    }

    /// Its type in PTX.
    pub fn ptx_type(self) -> &'static str {
        match self {
            Arg::U64(_) => ".u64",
            Arg::U32(_) => ".u32",
            Arg::F32(_) => ".f32",
        }
    }
}

impl From<Ptr> for Arg {
    fn from(value: Ptr) -> Self {
        Arg::U64(value.0)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Arg::U64(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Arg::U32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}

impl From<bool> for Arg {
    fn from(value: bool) -> Self {
        Arg::U32(value.into())
    }
}

/// All that a driver needs to start a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's name in the PTX.
    pub entry: &'static str,
    /// Blocks. If one is 0, there is nothing to do.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Parameters, in order.
    pub args: Vec<Arg>,
}

impl Launch {
    /// Whether there is nothing to do, which a driver would refuse.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// A launch of 256 threads a block; parameters of any of the kernels' types.
macro_rules! launch {
    ($entry:expr, $grid:expr, $shared:expr, $($arg:expr),* $(,)?) => {
        $crate::launch::Launch {
            entry: $entry,
            grid: $grid,
            threads: $crate::sizes::THREADS,
            shared: $shared,
            args: vec![$($crate::launch::Arg::from($arg)),*],
        }
    };
}
use launch;

/// Blocks of [`THREADS`] for `len` values.
fn blocks(len: u64) -> u32 {
    u32::try_from(len.div_ceil(u64::from(THREADS))).expect("fewer blocks than 2^32")
}

/// How a frozen matrix lies on the device: one of `sizes::FORMAT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// bf16, rows padded to a multiple of 8.
    Bf16,
    /// Quants, then scales (`data`, `scales`).
    Q8_0,
    /// The same.
    Q4_0,
    /// Quants, then pairs of scale and minimum.
    Q4_1,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 4] = [Format::Bf16, Format::Q8_0, Format::Q4_0, Format::Q4_1];

    fn code(self) -> u32 {
        match self {
            Format::Bf16 => FORMAT_BF16,
            Format::Q8_0 => FORMAT_Q8_0,
            Format::Q4_0 => FORMAT_Q4_0,
            Format::Q4_1 => FORMAT_Q4_1,
        }
    }
}

/// A frozen matrix [rows, columns] on the device.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Its storage.
    pub format: Format,
    /// bf16 values, or quants.
    pub data: Ptr,
    /// Scales of a block format.
    pub scales: Ptr,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
}

impl Matrix {
    /// Elements from a row to the next.
    pub fn pitch(&self) -> u32 {
        padded(self.columns)
    }

    /// The matrix from row `first` on, `rows` of them.
    pub fn from_row(&self, first: u32, rows: u32) -> Self {
        let elements = u64::from(first) * u64::from(self.pitch());
        let (data, scales) = match self.format {
            Format::Bf16 => (2 * elements, 0),
            Format::Q8_0 => (elements, elements / 32 * 2),
            Format::Q4_0 => (elements / 2, elements / 32 * 2),
            Format::Q4_1 => (elements / 2, elements / 32 * 4),
        };
        Self { data: Ptr(self.data.0 + data), scales: Ptr(self.scales.0 + scales), rows, ..*self }
    }
}

/// Columns of a bf16 operand with its padding.
pub const fn padded(columns: u32) -> u32 {
    columns.next_multiple_of(8)
}
