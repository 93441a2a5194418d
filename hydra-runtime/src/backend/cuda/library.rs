//! Which products cuBLASLt does: those that it does faster than the kernels, on this device, in this process.
//!
//! A product of a new kind is done both ways, and timed, where it may be done twice: where it overwrites its result. The library
//! doesn't know of the adapter's product, so that comes first, by itself, and the library adds to it.

use super::blas::{Blas, NAMES, WORKSPACE};
use super::gpu::{Gpu, Memory};
use super::{Driver, launch};
use crate::Result;
use half::bf16;
use hydra_ptx::launch::{Form, Launch, Product, Ptr};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// By how much it has to be faster: so that what takes as long is done alike in every run.
const FASTER: f32 = 0.95;
/// How far apart two sums of bf16 products may be, relative to the largest.
const APART: f32 = 0.02;

/// What products have in common that take as long: form, n, k, whether C is bf16, whether there is a second product.
type Kind = (Form, u32, u32, bool, bool);

/// cuBLASLt, and for which products it is used.
pub(super) struct Library {
    blas: Blas,
    workspace: Memory,
    faster: Mutex<HashMap<Kind, bool>>,
}

impl Library {
    /// The library for `gpu`, whose context is current: the file that HYDRA_CUBLASLT names, which has to do, or what is found
    /// under the usual names and does. `None` where there is none, or HYDRA_CUBLASLT is `off`.
    pub fn open(gpu: &Gpu) -> Result<Option<Self>> {
        let blas = match std::env::var_os("HYDRA_CUBLASLT") {
            Some(name) if name == "off" => None,
            Some(name) => {
                let failed = |why| gpu.error(format_args!("HYDRA_CUBLASLT={}: {why}", name.display()));
                Some(Blas::open(&name).map_err(failed)?)
            }
            None => NAMES.iter().find_map(|name| Blas::open(name.as_ref()).ok()),
        };
        let Some(blas) = blas else { return Ok(None) };
        Ok(Some(Self { blas, workspace: gpu.allocate(WORKSPACE)?, faster: Mutex::default() }))
    }

    /// Does `product` in one way or the other; `own` is the kernel's launch.
    ///
    /// # Safety
    /// As for `own`.
    pub unsafe fn multiply(&self, gpu: &Gpu, product: &Product<'_>, own: &Launch) -> Result<()> {
        let (n, k) = product.sizes();
        let kind = (product.form, n, k, product.c.bf16, product.second.is_some());
        let mut faster = self.faster.lock().unwrap_or_else(PoisonError::into_inner);
        let in_place = product.before == product.c.at;
        // SAFETY: the caller's.
        unsafe {
            let faster = match faster.get(&kind) {
                Some(&known) => known,
                None if in_place => false,
                None => *faster.entry(kind).insert_entry(self.is_faster(gpu, product, own)?).get(),
            };
            if !faster {
                return gpu.launch(own);
            }
            self.by_library(gpu, product)?.map_err(|why| gpu.error(why))
        }
    }

    /// `Err` inside says that the library can't do such a product.
    unsafe fn by_library(&self, gpu: &Gpu, product: &Product<'_>) -> Result<Result<(), String>> {
        let (before, rest) = product.apart();
        // SAFETY: the caller's; what comes first writes C alone.
        unsafe {
            if let Some(before) = before {
                gpu.launch(&before)?;
            }
            Ok(self.blas.multiply(&rest, Ptr(gpu.address(&self.workspace)), gpu.stream()))
        }
    }

    /// Whether the library does it faster, and rightly.
    unsafe fn is_faster(&self, gpu: &Gpu, product: &Product<'_>, own: &Launch) -> Result<bool> {
        // SAFETY: the caller's; each time C is overwritten.
        unsafe {
            let by_kernel = gpu.milliseconds(|| gpu.launch(own))?;
            let wanted = rows(gpu, product)?;
            if self.by_library(gpu, product)?.is_err() {
                return Ok(false);
            }
            let close = |(a, b): (&f32, &f32), largest: f32| (a - b).abs() <= APART * largest;
            let largest = wanted.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let same = rows(gpu, product)?.iter().zip(&wanted).all(|pair| close(pair, largest));
            let by_library = gpu.milliseconds(|| self.by_library(gpu, product)?.map_err(|why| gpu.error(why)))?;
            Ok(same && by_library < FASTER * by_kernel)
        }
    }
}

/// The first and the last row of C.
fn rows(gpu: &Gpu, product: &Product<'_>) -> Result<Vec<f32>> {
    let (launch::Values { at, bf16 }, n) = (product.c, product.sizes().0 as usize);
    let width = if bf16 { 2 } else { 4 };
    let mut bytes = vec![0; 2 * n * width];
    for (row, bytes) in [0, product.m as usize - 1].into_iter().zip(bytes.chunks_exact_mut(n * width)) {
        // SAFETY: C has m rows of n values.
        unsafe { gpu.read(bytes, Ptr(at.0 + (row * n * width) as u64))? };
    }
    Ok(match bf16 {
        true => bytes.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect(),
        false => bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect(),
    })
}
