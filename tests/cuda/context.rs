//! The current context of a host program's threads.

use crate::support::*;
use cust_raw::{CUcontext, CUresult, cuCtxCreate_v2, cuCtxDestroy_v2, cuCtxGetCurrent, cuCtxSetCurrent};
use hydra_runtime::backend::Backend;
use hydra_runtime::backend::cuda::Gpu;
use std::ptr::null_mut;

fn succeeds(code: CUresult) {
    assert_eq!(code, CUresult::CUDA_SUCCESS);
}

/// The calling thread's current context.
fn current() -> CUcontext {
    let mut context = null_mut();
    // SAFETY: the result may be written.
    succeeds(unsafe { cuCtxGetCurrent(&mut context) });
    context
}

/// Does `work`, after which the thread has to have no context, as before.
pub fn none_is_left(work: impl FnOnce()) {
    work();
    assert!(current().is_null());
}

/// Whatever is done with a GPU, the thread keeps the context that it had, or none.
pub fn the_hosts_context_stays_current() {
    drop(gpu()); // which starts the driver
    let mut own = null_mut();
    // SAFETY: the result may be written; a test on one GPU has the first one.
    succeeds(unsafe { cuCtxCreate_v2(&mut own, 0, 0) });
    for context in [own, null_mut()] {
        // SAFETY: it is a context, or none.
        succeeds(unsafe { cuCtxSetCurrent(context) });
        let stays = |after: &str| assert_eq!(current(), context, "after {after}");
        let cuda = gpu();
        stays("opening");
        let x = put(&cuda, &[1.0, 2.0]);
        stays("an upload");
        let mut y = cuda.buffer(2).unwrap();
        stays("an allocation");
        cuda.copy(&mut y, 0, &x, 2).unwrap();
        stays("a copy");
        cuda.add(&mut y, &x, 2).unwrap();
        stays("a launch");
        assert_eq!(get(&cuda, &y, 2), [2.0, 4.0]);
        stays("a download");
        cuda.free_bytes().unwrap();
        stays("a question");
        assert!(cuda.buffer(1 << 40).is_err());
        stays("an error");
        drop(x);
        stays("freeing");
        drop(cuda);
        stays("closing");
        drop(y);
        stays("freeing the last buffer");
        assert!(Gpu::open(99).is_err());
        stays("an error of opening");
    }
    // SAFETY: made above, and nothing uses it.
    succeeds(unsafe { cuCtxDestroy_v2(own) });
}
