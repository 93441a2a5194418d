//! The launch table: one pure function for each kernel.
//!
//! The kernels' parameters are listed in `kernels/`, which the device code shares; a test compares them with the PTX
//! text. Sizes are in elements, pointers are device addresses. Activations are bf16; an *operand* is a bf16 matrix
//! whose rows are padded with zeros to a multiple of 8 columns.

use crate::sizes::*;

mod adapter;
mod adapter_backward;
mod attention;
mod dense;
mod model;

pub use adapter::*;
pub use adapter_backward::*;
pub use attention::*;
pub use dense::*;
pub use model::*;

/// An address in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// No memory: a kernel neither reads nor writes it.
    pub const NULL: Ptr = Ptr(0);

    /// The address of f32 number `index` from here.
    pub fn f32(self, index: usize) -> Self {
        Ptr(self.0 + 4 * index as u64)
    }
}

/// Values that are f32, or bf16 as activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Values {
    /// The address of the first.
    pub at: Ptr,
    /// Whether they are bf16.
    pub bf16: bool,
}

/// A bf16 matrix [rows, columns] whose rows are padded with zeros to a multiple of 8 columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// The address of the first value.
    pub at: Ptr,
    /// Rows.
    pub rows: u32,
    /// Columns, without padding.
    pub columns: u32,
    /// Elements from a row to the next: a multiple of 8, at least the padded columns.
    pub pitch: u32,
}

impl Operand {
    /// No operand: a kernel reads nothing of it.
    pub const NONE: Self = Self { at: Ptr::NULL, rows: 0, columns: 0, pitch: 0 };

    /// An operand without anything between its rows.
    pub fn new(at: Ptr, rows: u32, columns: u32) -> Self {
        Self { at, rows, columns, pitch: padded(columns) }
    }

    /// The rows from number `first` on, at most so many.
    pub fn from_row(&self, first: u32, most: u32) -> Self {
        let at = Ptr(self.at.0 + 2 * u64::from(first) * u64::from(self.pitch));
        Self { at, rows: (self.rows - first).min(most), ..*self }
    }

    /// The operand of so many columns behind each of the rows, if there is room for it.
    pub fn behind(&self, columns: u32) -> Option<Self> {
        let at = Ptr(self.at.0 + 2 * u64::from(padded(self.columns)));
        (self.pitch >= padded(self.columns) + padded(columns)).then_some(Self { at, columns, ..*self })
    }
}

/// Where the rows of a matrix lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The address of the first value.
    pub at: Ptr,
    /// Elements from a row to the next.
    pub pitch: u32,
}

impl Values {
    /// Values that are f32.
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

/// A type of a kernel's parameter, in the device's words.
pub(crate) trait Parameter {
    /// What a launch passes.
    type Value;
}

impl<T> Parameter for *const T {
    type Value = Ptr;
}

impl<T> Parameter for *mut T {
    type Value = Ptr;
}

impl Parameter for u64 {
    type Value = u64;
}

impl Parameter for u32 {
    type Value = u32;
}

impl Parameter for f32 {
    type Value = f32;
}

/// The most blocks in a grid's second dimension.
pub const MOST_BLOCKS_Y: u32 = (1 << 16) - 1;

/// All that a driver needs to start a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's name in the PTX.
    pub entry: &'static str,
    /// Blocks in each dimension: less than 2³¹, and at most [`MOST_BLOCKS_Y`]. If one is 0, there is nothing to do.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// Parameters, in order.
    pub args: Vec<Arg>,
}

impl Launch {
    /// A launch of blocks of [`THREADS`].
    fn new(entry: &'static str, grid: [u32; 2], shared: u32, args: Vec<Arg>) -> Self {
        Self { entry, grid, threads: THREADS, shared, args }
    }

    /// Whether there is nothing to do, which a driver would refuse.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// Blocks of [`THREADS`] for `len` values.
fn blocks(len: u64) -> u32 {
    u32::try_from(len.div_ceil(u64::from(THREADS))).expect("fewer blocks than 2^32")
}

/// How a frozen matrix is stored on the device: one of `sizes::FORMAT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// bf16, rows padded to a multiple of 8.
    Bf16,
    /// Quants in `data`, scales in `scales`.
    Q8_0,
    /// Quants, then scales.
    Q4_0,
    /// Quants, then pairs of scale and minimum.
    Q4_1,
}

impl Format {
    /// All formats.
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
    /// Its format.
    pub format: Format,
    /// bf16 values, or quants.
    pub data: Ptr,
    /// Scales of a block format.
    pub scales: Ptr,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
    /// Elements from a row to the next: for bf16 a multiple of 8, at least the padded columns; else the columns.
    pub pitch: u32,
    /// Free rows below a bf16 matrix, after its rows have been padded with zeros to a multiple of 8.
    pub room: u32,
}

impl Matrix {
    /// A bf16 matrix.
    pub fn bf16(operand: Operand) -> Self {
        let Operand { at: data, rows, columns, pitch } = operand;
        Self { format: Format::Bf16, data, scales: Ptr::NULL, rows, columns, pitch, room: 0 }
    }

    /// The operand of so many columns behind each of the rows, if there is room for it.
    pub fn behind(&self, columns: u32) -> Option<Operand> {
        let &Self { format, data: at, rows, columns: own, pitch, .. } = self;
        if format == Format::Bf16 { Operand { at, rows, columns: own, pitch }.behind(columns) } else { None }
    }

    /// The operand of so many rows below the matrix, if there is room for it and for rows of zeros up to a multiple of 8.
    pub fn below(&self, rows: u32) -> Option<Operand> {
        let &Self { format, data, rows: own, columns, pitch, room, .. } = self;
        let at = Ptr(data.0 + 2 * u64::from(padded(own)) * u64::from(pitch));
        (format == Format::Bf16 && room >= padded(rows)).then_some(Operand { at, rows, columns, pitch })
    }

    /// The matrix from row `first` on, `rows` of them.
    pub fn from_row(&self, first: u32, rows: u32) -> Self {
        let elements = u64::from(first) * u64::from(self.pitch);
        let (data, scales) = match self.format {
            Format::Bf16 => (2 * elements, 0),
            Format::Q8_0 => (elements, elements / 32 * 2),
            Format::Q4_0 => (elements / 2, elements / 32 * 2),
            Format::Q4_1 => (elements / 2, elements / 32 * 4),
        };
        let (data, scales) = (Ptr(self.data.0 + data), Ptr(self.scales.0 + scales));
        Self { data, scales, rows, room: 0, ..*self }
    }
}

/// Columns of a bf16 operand with its padding.
pub const fn padded(columns: u32) -> u32 {
    columns.next_multiple_of(8)
}
