//! cuBLASLt's matrix product; the library is found at run time like the driver.
//!
//! Its matrices are column-major: a row-major matrix is its transpose there, so the product is computed as Cᵀ = op(W)
//! Aᵀ.

use core::ffi::{c_int, c_void};
use core::fmt;
use core::ptr::{from_ref, null_mut};
use hydra_ptx::launch::{Form, Product, Ptr};
use libloading::Library;
use std::ffi::OsStr;

/// The names of its file, the latest first.
pub(super) const NAMES: &[&str] = if cfg!(windows) {
    &["cublasLt64_13.dll", "cublasLt64_12.dll"]
} else {
    &["libcublasLt.so.13", "libcublasLt.so.12"]
};

/// Bytes of device memory for its workspace: what NVIDIA recommends for Hopper.
pub(in crate::backend::cuda) const WORKSPACE: usize = 32 << 20;
/// The most algorithms that are compared for a product.
const MOST_ALGORITHMS: usize = 8;
/// The alignment of addresses that its heuristics assume.
const ALIGNMENT: u64 = 256;

// cublasLt.h, cublas_api.h and library_types.h.
const COMPUTE_F32: c_int = 68;
const TYPE_F32: c_int = 0;
const TYPE_BF16: c_int = 14;
const TRANSPOSED_A: c_int = 3;
const OP_T: c_int = 1;
const MAX_WORKSPACE_BYTES: c_int = 1;

/// An opaque object of the library.
type Object = *mut c_void;
type Create = unsafe extern "C" fn(*mut Object) -> c_int;
type CreateProduct = unsafe extern "C" fn(*mut Object, c_int, c_int) -> c_int;
type CreateLayout = unsafe extern "C" fn(*mut Object, c_int, u64, u64, i64) -> c_int;
type Set = unsafe extern "C" fn(Object, c_int, *const c_void, usize) -> c_int;
type Destroy = unsafe extern "C" fn(Object) -> c_int;

/// cublasLtMatmulAlgo_t, which is opaque: a way to compute a product.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Algorithm([u64; 8]);

/// cublasLtMatmulHeuristicResult_t.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Find = unsafe extern "C" fn(
    Object,
    Object,
    Object,
    Object,
    Object,
    Object,
    Object,
    c_int,
    *mut Found,
    *mut c_int,
) -> c_int;

type Multiply = unsafe extern "C" fn(
    Object,
    Object,
    *const c_void,
    u64,
    Object,
    u64,
    Object,
    *const c_void,
    u64,
    Object,
    u64,
    Object,
    *const Algorithm,
    u64,
    usize,
    Object,
) -> c_int;

/// The functions that are used after opening.
struct Functions {
    destroy: Destroy,
    create_layout: CreateLayout,
    destroy_layout: Destroy,
    destroy_product: Destroy,
    destroy_preference: Destroy,
    find: Find,
    multiply: Multiply,
}

/// An error that a function returned.
struct Status(c_int);

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cublasStatus_t {}", self.0)
    }
}

fn result(status: c_int) -> Result<(), Status> {
    if status == 0 { Ok(()) } else { Err(Status(status)) }
}

/// The library, with a handle for the context that was current when it was opened.
pub(super) struct Blas {
    functions: Functions,
    handle: Object,
    /// The description of a product by form: [`Form::Rows`], [`Form::Columns`].
    products: [Object; 2],
    preference: Object,
}

// SAFETY: the handle may be used from several threads, and nothing else changes after `open`.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // An error here can't be handled.
        // SAFETY: created by `open` unless null, and not used any more.
        unsafe {
            for product in self.products.into_iter().filter(|product| !product.is_null()) {
                let _ = (self.functions.destroy_product)(product);
            }
            if !self.preference.is_null() {
                let _ = (self.functions.destroy_preference)(self.preference);
            }
            let _ = (self.functions.destroy)(self.handle);
        }
    }
}

impl Blas {
    /// Opens the library of this name, and sets it up for the current context.
    ///
    /// # Errors
    /// One line that says why it can't be used.
    pub fn open(name: &OsStr) -> Result<Self, String> {
        // SAFETY: the library's initialisers set up the library and nothing else.
        let library = unsafe { Library::new(name) }.map_err(|error| error.to_string())?;
        // It is never closed, because it has threads and memory of its own.
        let library = Box::leak(Box::new(library));
        let broken = |error: libloading::Error| error.to_string();
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: cublasLt.h declares it with these types.
                *unsafe { library.get(concat!($name, "\0")) }.map_err(broken)?
            };
        }
        let create: Create = function!("cublasLtCreate");
        let create_product: CreateProduct = function!("cublasLtMatmulDescCreate");
        let set_product: Set = function!("cublasLtMatmulDescSetAttribute");
        let create_preference: Create = function!("cublasLtMatmulPreferenceCreate");
        let set_preference: Set = function!("cublasLtMatmulPreferenceSetAttribute");
        let functions = Functions {
            destroy: function!("cublasLtDestroy"),
            create_layout: function!("cublasLtMatrixLayoutCreate"),
            destroy_layout: function!("cublasLtMatrixLayoutDestroy"),
            destroy_product: function!("cublasLtMatmulDescDestroy"),
            destroy_preference: function!("cublasLtMatmulPreferenceDestroy"),
            find: function!("cublasLtMatmulAlgoGetHeuristic"),
            multiply: function!("cublasLtMatmul"),
        };
        let failed = |status: Status| format!("can't be set up: {status}");
        let mut handle = null_mut();
        // SAFETY: the result may be written.
        result(unsafe { create(&mut handle) }).map_err(failed)?;
        let mut blas = Self { functions, handle, products: [null_mut(); 2], preference: null_mut() };
        let set_up = || {
            for product in &mut blas.products {
                // SAFETY: as above.
                result(unsafe { create_product(product, COMPUTE_F32, TYPE_F32) })?;
            }
            // SAFETY: the attribute is a cublasOperation_t, and copied.
            result(unsafe { set_product(blas.products[0], TRANSPOSED_A, from_ref(&OP_T).cast(), size_of_val(&OP_T)) })?;
            // SAFETY: the result may be written.
            result(unsafe { create_preference(&mut blas.preference) })?;
            // SAFETY: the attribute is a u64, and copied.
            result(unsafe {
                let most = WORKSPACE as u64;
                set_preference(blas.preference, MAX_WORKSPACE_BYTES, from_ref(&most).cast(), size_of_val(&most))
            })
        };
        let done: Result<(), Status> = { set_up }();
        done.map_err(failed)?;
        Ok(blas)
    }

    fn layout(&self, of: c_int, rows: u32, columns: u32, pitch: u32) -> Result<Layout<'_>, Status> {
        let mut layout = null_mut();
        // SAFETY: the result may be written.
        result(unsafe { (self.functions.create_layout)(&mut layout, of, rows.into(), columns.into(), pitch.into()) })?;
        Ok(Layout { of: self, layout })
    }

    /// How the library sees `product`.
    ///
    /// # Errors
    /// If it can't compute it.
    fn call(&self, product: &Product<'_>) -> Result<Call<'_>, String> {
        let refused = |status: Status| format!("cuBLASLt: {status}");
        let &Product { c, c_pitch, addend, form, a, w, .. } = product;
        let (n, k) = product.sizes();
        let beta: f32 = if addend == Ptr::NULL { 0.0 } else { 1.0 };
        let addend = if addend == Ptr::NULL { c.at } else { addend };
        if [c.at, addend, a.at, w.data].iter().any(|at| !at.0.is_multiple_of(ALIGNMENT)) {
            return Err("cuBLASLt: an operand that isn't aligned".into());
        }
        let (left, of) = match form {
            Form::Rows => (self.layout(TYPE_BF16, k, n, w.pitch), self.products[0]),
            Form::Columns => (self.layout(TYPE_BF16, n, k, w.pitch), self.products[1]),
        };
        let right = self.layout(TYPE_BF16, k, a.rows, a.pitch).map_err(refused)?;
        let result_type = if c.bf16 { TYPE_BF16 } else { TYPE_F32 };
        let out = self.layout(result_type, n, a.rows, c_pitch).map_err(refused)?;
        Ok(Call { of, left: left.map_err(refused)?, right, out, beta, addend })
    }

    /// Algorithms for `product`, whose matrix is bf16 and which has no second product; the library's favourite first.
    ///
    /// # Errors
    /// If it can't compute it.
    pub fn algorithms(&self, product: &Product<'_>) -> Result<Vec<Algorithm>, String> {
        let Call { of, left, right, out, .. } = self.call(product)?;
        let (mut found, mut count) = ([Found::default(); MOST_ALGORITHMS], 0);
        // SAFETY: all objects are alive, and so many results may be written.
        let status = unsafe {
            (self.functions.find)(
                self.handle,
                of,
                left.layout,
                right.layout,
                out.layout,
                out.layout,
                self.preference,
                MOST_ALGORITHMS as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        result(status).map_err(|status| format!("cuBLASLt: {status}"))?;
        let found = found[..count as usize].iter().filter(|found| found.state == 0);
        Ok(found.map(|found| found.algorithm).collect())
    }

    /// Queues `product` by an algorithm from [`Blas::algorithms`].
    ///
    /// # Errors
    /// If the algorithm, which may have been found for another number of rows, can't compute it.
    ///
    /// # Safety
    /// As for a launch of the same product; `workspace` is the address of [`WORKSPACE`] bytes that nothing else uses,
    /// and the context is current.
    pub unsafe fn multiply(
        &self,
        product: &Product<'_>,
        algorithm: &Algorithm,
        workspace: Ptr,
        stream: Object,
    ) -> Result<(), String> {
        let Call { of, left, right, out, beta, addend } = self.call(product)?;
        let alpha: f32 = 1.0;
        // SAFETY: alpha and beta are read before it returns; the rest is this function's contract.
        result(unsafe {
            (self.functions.multiply)(
                self.handle,
                of,
                from_ref(&alpha).cast(),
                product.w.data.0,
                left.layout,
                product.a.at.0,
                right.layout,
                from_ref(&beta).cast(),
                addend.0,
                out.layout,
                product.c.at.0,
                out.layout,
                algorithm,
                workspace.0,
                WORKSPACE,
                stream,
            )
        })
        .map_err(|status| format!("cuBLASLt: {status}"))
    }
}

/// A product in the library's terms: `out` = `left` · `right` + beta · the addend.
struct Call<'b> {
    of: Object,
    left: Layout<'b>,
    right: Layout<'b>,
    out: Layout<'b>,
    beta: f32,
    addend: Ptr,
}

/// The layout of a matrix.
struct Layout<'b> {
    of: &'b Blas,
    layout: Object,
}

impl Drop for Layout<'_> {
    fn drop(&mut self) {
        // An error here can't be handled.
        // SAFETY: created by `Blas::layout`, and not used any more.
        let _ = unsafe { (self.of.functions.destroy_layout)(self.layout) };
    }
}
