//! cuBLASLt for the products that it computes faster than the kernels, on this device and in this process.
//!
//! A product of a new kind is computed by the kernel and by several of the library's algorithms, and timed, if it may be
//! computed more than once because it overwrites its result. The library can't add the adapter's product, so that one is
//! launched first, and the library accumulates onto it.

use super::blas::{Algorithm, Blas, NAMES, WORKSPACE};
use super::device::{Allocation, Device};
use crate::{Error, Result};
use half::bf16;
use hydra_ptx::launch::{Form, Launch, Product, Ptr, Values};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

/// A way replaces the best one before it below this part of its time, so that ways of about the same speed are chosen
/// alike in every run.
const FASTER: f32 = 0.96;
/// The largest difference between two ways to sum bf16 products, relative to the largest result.
const TOLERANCE: f32 = 0.02;
/// Rows of C in which two ways are compared.
const COMPARED_ROWS: u32 = 16;

/// What decides how long a product takes: form, about how large m is, n, k (with that of a second product, if they are
/// joined), whether C is bf16, whether it is multiplied in two parts.
type Kind = (Form, u32, u32, u32, bool, bool);

/// About how large m is: a way is chosen for up to 128 rows, for up to twice as many, and so on, up to all from 2049 on.
fn height(m: u32) -> u32 {
    m.div_ceil(128).clamp(1, 32).next_power_of_two()
}

/// cuBLASLt, and the products for which it is used.
pub(super) struct Library {
    blas: Blas,
    /// Allocated with the first product for which there is memory.
    workspace: OnceLock<Allocation>,
    /// The library's algorithm, or none where the kernel is faster.
    best: Mutex<HashMap<Kind, Option<Algorithm>>>,
}

impl Library {
    /// The library for `device`, whose context is current: the file that HYDRA_CUBLASLT names, or the first one of the
    /// usual names that works. `None` where there is none, or HYDRA_CUBLASLT is `off`.
    ///
    /// # Errors
    /// If the file that HYDRA_CUBLASLT names can't be used.
    pub fn open(device: &Device) -> Result<Option<Self>> {
        let blas = match std::env::var_os("HYDRA_CUBLASLT") {
            Some(name) if name == "off" => None,
            Some(name) => {
                let failed = |why| device.error(format_args!("HYDRA_CUBLASLT={}: {why}", name.display()));
                Some(Blas::open(&name).map_err(failed)?)
            }
            None => NAMES.iter().find_map(|name| Blas::open(name.as_ref()).ok()),
        };
        Ok(blas.map(|blas| Self { blas, workspace: OnceLock::new(), best: Mutex::default() }))
    }

    /// Whether it has a workspace, which it tries to get if it has none. Without memory for that, the kernels do without
    /// the library.
    pub fn is_ready(&self, device: &Device) -> Result<bool> {
        if self.workspace.get().is_none() {
            match device.allocate(WORKSPACE) {
                // Another thread's may be there by now.
                Ok(workspace) => drop(self.workspace.set(workspace)),
                Err(Error::OutOfMemory { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Queues `product` in one way or the other; `kernel` is its launch. The library [is ready](Library::is_ready).
    ///
    /// # Safety
    /// As for the launch.
    pub unsafe fn multiply(&self, device: &Device, product: &Product<'_>, kernel: &Launch) -> Result<()> {
        let _entered = device.enter()?;
        let (n, in_place) = (product.sizes().0, product.addend == product.c.at);
        product.apart(|first, rest| {
            let ways = Ways { kernel, first, rest };
            let (m, k) = (height(product.m()), ways.rest.a.columns);
            let kind = (product.form, m, n, k, product.c.bf16, ways.first.is_some());
            let mut best = self.best.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the caller's contract.
            unsafe {
                let best = match best.get(&kind) {
                    Some(&known) => known,
                    None if in_place => None,
                    None => {
                        let Some(fastest) = self.fastest(device, &ways)? else { return device.launch(kernel) };
                        *best.entry(kind).insert_entry(fastest).get()
                    }
                };
                let Some(algorithm) = best else { return device.launch(kernel) };
                ways.launch_first(device)?;
                let done = self.queue(device, &ways.rest, &algorithm).or_else(|_| {
                    // The algorithm was found for another number of rows.
                    let favourite = self.blas.algorithms(&ways.rest)?.first().copied();
                    self.queue(device, &ways.rest, &favourite.ok_or("cuBLASLt: no algorithm for this product")?)
                });
                done.map_err(|why| device.error(why))
            }
        })
    }

    /// Queues a product without a second one by the library.
    ///
    /// # Errors
    /// If the algorithm can't compute it; then nothing was queued.
    ///
    /// # Safety
    /// As for a launch of the product.
    unsafe fn queue(
        &self,
        device: &Device,
        frozen: &Product<'_>,
        algorithm: &Algorithm,
    ) -> std::result::Result<(), String> {
        let workspace = Ptr(self.workspace.get().expect("a library that is ready").address());
        // SAFETY: the caller's contract; the workspace is only used by the work of one stream, in order.
        unsafe { self.blas.multiply(frozen, algorithm, workspace, device.stream()) }
    }

    /// The library's fastest algorithm, or none where the kernel is faster or the library's results are wrong; nothing,
    /// if this product doesn't show which results are right, because it is zero.
    ///
    /// # Safety
    /// As for a launch of the product, which overwrites C.
    unsafe fn fastest(&self, device: &Device, ways: &Ways<'_>) -> Result<Option<Option<Algorithm>>> {
        let Ok(algorithms) = self.blas.algorithms(&ways.rest) else { return Ok(Some(None)) };
        // SAFETY: the caller's contract; each time C is overwritten.
        unsafe {
            device.launch(ways.kernel)?;
            let expected = rows(device, &ways.rest)?;
            let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            if largest == 0.0 {
                return Ok(None);
            }
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * largest;
            let (mut best, mut least) = (None, device.milliseconds(|| device.launch(ways.kernel))?);
            for algorithm in algorithms {
                let by_library = || {
                    ways.launch_first(device)?;
                    self.queue(device, &ways.rest, &algorithm).map_err(|why| device.error(why))
                };
                if by_library().is_err() || !rows(device, &ways.rest)?.iter().zip(&expected).all(close) {
                    continue;
                }
                let time = device.milliseconds(by_library)?;
                if time < FASTER * least {
                    (best, least) = (Some(algorithm), time);
                }
            }
            Ok(Some(best))
        }
    }
}

/// The ways to compute a product.
struct Ways<'p> {
    /// By the kernel.
    kernel: &'p Launch,
    /// By the library: what it can't multiply together with the rest, if there is anything,
    first: Option<Launch>,
    /// and the rest.
    rest: Product<'p>,
}

impl Ways<'_> {
    /// Queues what comes before the library's part.
    ///
    /// # Safety
    /// As for a launch of the product.
    unsafe fn launch_first(&self, device: &Device) -> Result<()> {
        // SAFETY: the caller's contract; it writes only C.
        self.first.as_ref().map_or(Ok(()), |first| unsafe { device.launch(first) })
    }
}

/// Rows of C, spread from the first to the last: where a model answers after a prompt, gradients are zero in most rows.
fn rows(device: &Device, product: &Product<'_>) -> Result<Vec<f32>> {
    let (Values { at, bf16 }, n) = (product.c, product.sizes().0 as usize);
    let width = if bf16 { 2 } else { 4 };
    let count = product.m().min(COMPARED_ROWS);
    let mut bytes = vec![0; count as usize * n * width];
    for (i, bytes) in (0..count).zip(bytes.chunks_exact_mut(n * width)) {
        let first = spread(i, count, product.m()) as usize * product.c_pitch as usize;
        // SAFETY: C has m rows of n values.
        unsafe { device.read(bytes, Ptr(at.0 + (first * width) as u64))? };
    }
    Ok(match bf16 {
        true => bytes.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect(),
        false => bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect(),
    })
}

/// Row `i` of `count` rows that are spread over `m`.
fn spread(i: u32, count: u32, m: u32) -> u32 {
    (u64::from(i) * u64::from(m - 1) / u64::from(count - 1).max(1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_prompt_decides_nothing_for_long_ones() {
        assert_eq!(
            [1, 5, 128, 129, 256, 1000, 2048, 2049, 4096, u32::MAX].map(height),
            [1, 1, 1, 2, 2, 8, 16, 32, 32, 32]
        );
    }

    #[test]
    fn compared_rows_are_spread() {
        assert_eq!([0, 1, 2].map(|i| spread(i, 3, 9)), [0, 4, 8]);
        for m in [1, 2, 15, 16, 17, 1000, u32::MAX] {
            let count = m.min(COMPARED_ROWS);
            let all: Vec<u32> = (0..count).map(|i| spread(i, count, m)).collect();
            assert!(all.is_sorted_by(|a, b| a < b) && (all[0], all[all.len() - 1]) == (0, m - 1), "{all:?}");
        }
    }
}
