//! The part of cuBLASLt that Hydra uses. It is found under the name `libcublasLt.so.13`, a link to this library.
//!
//! Matrices are column-major, operands bf16, sums f32. It is as strict as the driver's part: layouts have to match,
//! operands to be aligned, and an algorithm to be one that was found for these layouts. It finds two: a right one, and
//! one that is fast and wrong: its results are zero.

use super::{INVALID_CONTEXT, INVALID_VALUE, OK, in_context, later, note};
use core::ffi::c_void;
use hydra_ptx_device::prelude::{from_bf16, to_bf16};

const F32: i32 = 0;
const BF16: i32 = 14;
const COMPUTE_F32: i32 = 68;
const HANDLE: usize = 4;
const PREFERENCE: usize = 5;
/// CUBLAS_STATUS_NOT_INITIALIZED.
const NOT_INITIALIZED: u32 = 1;
/// CUBLAS_STATUS_NOT_SUPPORTED.
const NOT_SUPPORTED: u32 = 15;
/// Alignment of addresses.
const ALIGNMENT: u64 = 256;

/// Whether A is transposed.
struct Product(bool);

#[derive(Clone, Copy, PartialEq)]
struct Layout {
    of: i32,
    rows: u64,
    columns: u64,
    pitch: u64,
}

/// cublasLtMatmulHeuristicResult_t.
#[repr(C)]
pub struct Found {
    algorithm: [u64; 8],
    workspace: usize,
    state: i32,
    waves: f32,
    reserved: [i32; 4],
}

/// The contents of an algorithm: the layouts for which it was found, and whether it is the one that is wrong.
fn algorithm(a: &Layout, b: &Layout, d: &Layout, wrong: bool) -> [u64; 8] {
    [a.rows, a.columns, b.columns, d.rows, d.columns, a.pitch, b.pitch, d.of as u64 + if wrong { 1 << 32 } else { 0 }]
}

unsafe fn load(of: i32, at: u64, index: u64) -> f32 {
    match of {
        F32 => (at as *const f32).add(index as usize).read(),
        _ => from_bf16((at as *const u16).add(index as usize).read()),
    }
}

unsafe fn store(of: i32, at: u64, index: u64, value: f32) {
    match of {
        F32 => (at as *mut f32).add(index as usize).write(value),
        _ => (at as *mut u16).add(index as usize).write(to_bf16(value)),
    }
}

functions! {
    fn cublasLtCreate(handle: *mut usize) {
        note("cublasLtCreate");
        if !in_context() {
            return NOT_INITIALIZED;
        }
        *handle = HANDLE;
        OK
    }

    fn cublasLtDestroy(handle: usize) {
        assert_eq!(handle, HANDLE);
        assert!(in_context(), "cublasLtDestroy without a context");
        OK
    }

    fn cublasLtMatmulDescCreate(product: *mut *mut c_void, compute: i32, scale: i32) {
        assert_eq!((compute, scale), (COMPUTE_F32, F32));
        *product = Box::into_raw(Box::new(Product(false))).cast();
        OK
    }

    // 3 is A's operation, and 1 to transpose it.
    fn cublasLtMatmulDescSetAttribute(product: *mut c_void, attribute: i32, value: *const i32, size: usize) {
        if attribute != 3 || size != 4 {
            return INVALID_VALUE;
        }
        (*product.cast::<Product>()).0 = *value == 1;
        OK
    }

    fn cublasLtMatmulDescDestroy(product: *mut c_void) {
        drop(Box::from_raw(product.cast::<Product>()));
        OK
    }

    fn cublasLtMatmulPreferenceCreate(preference: *mut usize) {
        *preference = PREFERENCE;
        OK
    }

    // 1 is the size of the workspace.
    fn cublasLtMatmulPreferenceSetAttribute(preference: usize, attribute: i32, _value: *const u64, size: usize) {
        assert_eq!(preference, PREFERENCE);
        if attribute == 1 && size == 8 { OK } else { INVALID_VALUE }
    }

    fn cublasLtMatmulPreferenceDestroy(preference: usize) {
        assert_eq!(preference, PREFERENCE);
        OK
    }

    fn cublasLtMatrixLayoutCreate(layout: *mut *mut c_void, of: i32, rows: u64, columns: u64, pitch: i64) {
        if ![F32, BF16].contains(&of) || pitch < rows as i64 {
            return INVALID_VALUE;
        }
        *layout = Box::into_raw(Box::new(Layout { of, rows, columns, pitch: pitch as u64 })).cast();
        OK
    }

    fn cublasLtMatrixLayoutDestroy(layout: *mut c_void) {
        drop(Box::from_raw(layout.cast::<Layout>()));
        OK
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        handle: usize,
        product: *const c_void,
        a: *const c_void,
        b: *const c_void,
        c: *const c_void,
        d: *const c_void,
        preference: usize,
        wanted: i32,
        found: *mut Found,
        count: *mut i32,
    ) {
        assert_eq!((handle, preference), (HANDLE, PREFERENCE));
        assert!(wanted > 0);
        let transposed = (*product.cast::<Product>()).0;
        let [a, b, c, d] = [a, b, c, d].map(|layout| *layout.cast::<Layout>());
        let (m, k) = if transposed { (a.columns, a.rows) } else { (a.rows, a.columns) };
        if (a.of, b.of) != (BF16, BF16) || c != d || [k, m, b.columns] != [b.rows, d.rows, d.columns] {
            return INVALID_VALUE;
        }
        // Like the real library, it copies tiles 16 bytes at a time.
        if [&a, &b].iter().any(|x| !x.pitch.is_multiple_of(8)) {
            return NOT_SUPPORTED;
        }
        *count = wanted.min(2);
        for (i, wrong) in (0..*count).zip([false, true]) {
            let (algorithm, workspace) = (algorithm(&a, &b, &d, wrong), 1 << 20);
            found.add(i as usize).write(Found { algorithm, workspace, state: 0, waves: 1.0, reserved: [0; 4] });
        }
        OK
    }
}

in_context! {
    fn cublasLtMatmul(
        handle: usize,
        product: *const c_void,
        alpha: *const f32,
        a_at: u64,
        a: *const c_void,
        b_at: u64,
        b: *const c_void,
        beta: *const f32,
        c_at: u64,
        c: *const c_void,
        d_at: u64,
        d: *const c_void,
        algorithm: *const [u64; 8],
        workspace: u64,
        workspace_size: usize,
        stream: usize,
    ) {
        assert_eq!(handle, HANDLE);
        let transposed = (*product.cast::<Product>()).0;
        let [a, b, c, d] = [a, b, c, d].map(|layout| *layout.cast::<Layout>());
        let misplaced = [a_at, b_at, c_at, d_at, workspace].iter().any(|at| *at == 0 || !at.is_multiple_of(ALIGNMENT));
        let wrong = *algorithm == self::algorithm(&a, &b, &d, true);
        let found = wrong || *algorithm == self::algorithm(&a, &b, &d, false);
        if c != d || !found || misplaced || workspace_size < 1 << 20 {
            return INVALID_VALUE;
        }
        note("cublasLtMatmul");
        let (alpha, beta) = (*alpha, *beta);
        later(stream, move || {
            (workspace as *mut u8).write_bytes(0xff, 1 << 20);
            let mut column = vec![0.0; b.rows as usize];
            for j in 0..d.columns {
                if wrong {
                    (0..d.rows).for_each(|i| store(d.of, d_at, j * d.pitch + i, 0.0));
                    continue;
                }
                column.iter_mut().zip(0..).for_each(|(x, p)| *x = load(b.of, b_at, j * b.pitch + p));
                for i in 0..d.rows {
                    let (first, step) = if transposed { (i * a.pitch, 1) } else { (i, a.pitch) };
                    let terms = column.iter().zip(0..).map(|(x, p)| x * load(a.of, a_at, first + p * step));
                    let place = j * d.pitch + i;
                    let before = if beta == 0.0 { 0.0 } else { beta * load(c.of, c_at, place) };
                    store(d.of, d_at, place, alpha * terms.sum::<f32>() + before);
                }
            }
        });
        OK
    }
}
