//! cuBLASLt for the products that it computes faster than the kernels, on this device and in this process.
//!
//! A product of a new kind is computed in both ways and timed, if it may be computed twice because it overwrites its
//! result. The library can't add the adapter's product, so that one is launched first, and the library accumulates onto
//! it.

use super::blas::{Blas, NAMES, WORKSPACE};
use super::device::{Allocation, Device};
use crate::Result;
use half::bf16;
use hydra_ptx::launch::{Form, Launch, Product, Ptr, Values};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// The library is used below this part of the kernel's time, so that ways of about the same speed are chosen alike in
/// every run.
const FASTER: f32 = 0.95;
/// The largest difference between two ways to sum bf16 products, relative to the largest result.
const TOLERANCE: f32 = 0.02;

/// What decides how long a product takes: form, n, k, whether C is bf16, whether there is a second product.
type Kind = (Form, u32, u32, bool, bool);

/// cuBLASLt, and the products for which it is used.
pub(super) struct Library {
    blas: Blas,
    workspace: Allocation,
    faster: Mutex<HashMap<Kind, bool>>,
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
        let Some(blas) = blas else { return Ok(None) };
        Ok(Some(Self { blas, workspace: device.allocate(WORKSPACE)?, faster: Mutex::default() }))
    }

    /// Queues `product` in one way or the other; `kernel` is its launch.
    ///
    /// # Safety
    /// As for the launch.
    pub unsafe fn multiply(&self, device: &Device, product: &Product<'_>, kernel: &Launch) -> Result<()> {
        let (n, k) = product.sizes();
        let kind = (product.form, n, k, product.c.bf16, product.second.is_some());
        let mut faster = self.faster.lock().unwrap_or_else(PoisonError::into_inner);
        let in_place = product.addend == product.c.at;
        // SAFETY: the caller's contract.
        unsafe {
            let faster = match faster.get(&kind) {
                Some(&known) => known,
                None if in_place => false,
                None => *faster.entry(kind).insert_entry(self.is_faster(device, product, kernel)?).get(),
            };
            if !faster {
                return device.launch(kernel);
            }
            self.by_library(device, product)?.map_err(|why| device.error(why))
        }
    }

    /// Queues `product` by the library. The inner error says that the library can't compute such a product.
    ///
    /// # Safety
    /// As for a launch of the product.
    unsafe fn by_library(&self, device: &Device, product: &Product<'_>) -> Result<Result<(), String>> {
        let (second, frozen) = product.apart();
        // SAFETY: the caller's contract; the second product writes only C.
        unsafe {
            if let Some(second) = second {
                device.launch(&second)?;
            }
            Ok(self.blas.multiply(&frozen, Ptr(self.workspace.address()), device.stream()))
        }
    }

    /// Whether the library is faster, and its result is right.
    ///
    /// # Safety
    /// As for a launch of the product, which overwrites C.
    unsafe fn is_faster(&self, device: &Device, product: &Product<'_>, kernel: &Launch) -> Result<bool> {
        // SAFETY: the caller's contract; each time C is overwritten.
        unsafe {
            let by_kernel = device.milliseconds(|| device.launch(kernel))?;
            let expected = rows(device, product)?;
            if self.by_library(device, product)?.is_err() {
                return Ok(false);
            }
            let close = |(a, b): (&f32, &f32), largest: f32| (a - b).abs() <= TOLERANCE * largest;
            let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let same = rows(device, product)?.iter().zip(&expected).all(|pair| close(pair, largest));
            let by_library =
                device.milliseconds(|| self.by_library(device, product)?.map_err(|why| device.error(why)))?;
            Ok(same && by_library < FASTER * by_kernel)
        }
    }
}

/// The first and the last row of C.
fn rows(device: &Device, product: &Product<'_>) -> Result<Vec<f32>> {
    let (Values { at, bf16 }, n) = (product.c, product.sizes().0 as usize);
    let width = if bf16 { 2 } else { 4 };
    let mut bytes = vec![0; 2 * n * width];
    for (row, bytes) in [0, product.m as usize - 1].into_iter().zip(bytes.chunks_exact_mut(n * width)) {
        // SAFETY: C has m rows of n values.
        unsafe { device.read(bytes, Ptr(at.0 + (row * n * width) as u64))? };
    }
    Ok(match bf16 {
        true => bytes.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect(),
        false => bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect(),
    })
}
