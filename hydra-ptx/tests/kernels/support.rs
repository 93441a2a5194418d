//! Launches on the emulator, and operands.

#[path = "../../../tests/close.rs"]
mod close;

use half::bf16;
use hydra_ptx::HOPPER_PTX;
use hydra_ptx::launch::{Launch, Ptr, padded};
use hydra_ptx_device::emulator::ptx::Module;
use hydra_ptx_device::emulator::{self, Global, Grid};

/// Parameters and grid as the emulator takes them; `seed` orders the warps.
fn unpacked(launch: &Launch, seed: u64) -> (Vec<u64>, Grid) {
    let grid = Grid { blocks: launch.grid, threads: launch.threads, shared: launch.shared, seed };
    (launch.args.iter().map(|arg| arg.slot()).collect(), grid)
}

/// Runs a kernel's source.
pub fn run(launch: Launch, seed: u64) {
    if launch.is_empty() {
        return;
    }
    let entry = hydra_ptx_device::entries().find(|entry| entry.name == launch.entry).expect(launch.entry);
    let (slots, grid) = unpacked(&launch, seed);
    // SAFETY: the launch table's parameters, over memory that the tests registered.
    unsafe { emulator::launch(entry, grid, &slots) }
}

thread_local! {
    static HOPPER: Module = Module::new(HOPPER_PTX);
}

/// Runs what the compiler made of one of Hopper's kernels.
pub fn run_compiled(launch: Launch, seed: u64) {
    if launch.is_empty() {
        return;
    }
    let (slots, grid) = unpacked(&launch, seed);
    // SAFETY: as in `run`.
    HOPPER.with(|module| unsafe { module.launch(launch.entry, grid, &slots) });
}

pub fn ptr<T: Copy>(global: &Global<T>) -> Ptr {
    Ptr(global.address())
}

/// Reproducible values in −1 .. 1.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    pub fn value(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 31) as f32 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

pub fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Rounded to bf16, as the kernel will see them.
pub fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// As a padded bf16 operand.
pub fn operand(values: &[f32], columns: usize) -> Vec<u16> {
    let pitch = padded(columns as u32) as usize;
    let row = |row: &[f32]| {
        let mut padded = vec![0; pitch];
        padded.iter_mut().zip(row).for_each(|(to, &x)| *to = bf16::from_f32(x).to_bits());
        padded
    };
    values.chunks(columns.max(1)).flat_map(row).collect()
}

/// As an operand with so many columns behind each row, which hold NaN.
pub fn spaced(values: &[f32], columns: usize, room: usize) -> Vec<u16> {
    let rows = operand(values, columns);
    let spaced = |row: &[u16]| [row.to_vec(), vec![0x7fc0; room]].concat();
    rows.chunks(padded(columns as u32) as usize).flat_map(spaced).collect()
}

/// Asserts that each element of `got` is within `tolerance` of `want`, relative to the largest `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    close::assert_close(what, got, want, tolerance, 1e-30);
}
