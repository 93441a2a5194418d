//! The emulator finds what it says it finds.

use hydra_ptx_device::emulator::{Entry, Global, Grid, Kind, launch};
use hydra_ptx_device::prelude::*;

fn run(call: unsafe fn(&[u64]), slots: &[u64]) {
    let params: &[Kind] = if slots.is_empty() { &[] } else { &[Kind::U64] };
    let grid = Grid { blocks: [2, 1], threads: 64, shared: 1024, seed: 1 };
    // SAFETY: the kernels below take what they are given.
    unsafe { launch(&Entry { name: "test", params, call }, grid, slots) }
}

#[test]
#[should_panic(expected = "a race")]
fn a_missing_barrier() {
    // SAFETY: emulated.
    run(
        |_| unsafe {
            st_f32(shared() + 4 * thread(), 1.0);
            ld_f32(shared() + 4 * (thread() ^ 1));
        },
        &[],
    );
}

#[test]
fn a_barrier() {
    // SAFETY: emulated.
    let own = |_: &[u64]| unsafe {
        st_f32(shared() + 4 * thread(), thread() as f32);
        barrier();
        assert_eq!(ld_f32(shared() + 4 * (thread() ^ 33)), (thread() ^ 33) as f32);
    };
    run(own, &[]);
}

#[test]
#[should_panic(expected = "a race")]
fn two_blocks_at_one_place() {
    let global = Global::new(&[0f32; 4]);
    // SAFETY: emulated.
    run(
        |slots| unsafe {
            if thread() == 0 {
                store(slots[0] as *mut f32, 1.0)
            }
        },
        &[global.address()],
    );
}

#[test]
#[should_panic(expected = "in the same banks")]
fn a_matrix_with_a_row_of_the_banks() {
    // SAFETY: emulated.
    let kernel = |_: &[u64]| unsafe {
        ldmatrix(shared() + 128 * (thread() % 8));
    };
    run(kernel, &[]);
}

#[test]
#[should_panic(expected = "some lanes of the warp never reach")]
fn a_divergent_shuffle() {
    run(
        |_| {
            if thread().is_multiple_of(2) {
                shuffle_xor(1.0, 2);
            }
        },
        &[],
    );
}

#[test]
#[should_panic(expected = "some warps have ended")]
fn a_barrier_that_a_warp_misses() {
    run(
        |_| {
            if warp() == 0 {
                barrier()
            }
        },
        &[],
    );
}

#[test]
#[should_panic(expected = "allocated are 16")]
fn out_of_bounds() {
    let global = Global::new(&[0f32; 4]);
    // SAFETY: emulated.
    run(
        |slots| unsafe {
            load((slots[0] as *const f32).add(thread() as usize));
        },
        &[global.address()],
    );
}

#[test]
#[should_panic(expected = "not aligned")]
fn off_its_alignment() {
    let global = Global::new(&[0f32; 16]);
    // SAFETY: emulated.
    run(
        |slots| unsafe {
            load((slots[0] as *const f32).add(1).cast::<U4>());
        },
        &[global.address()],
    );
}

#[test]
fn a_copy_arrives_when_it_is_waited_for() {
    let global = Global::new(&[7f32; 4]);
    // SAFETY: emulated.
    let kernel = |slots: &[u64]| unsafe {
        if thread() == 0 {
            copy_async(shared(), slots[0] as *const u8, true);
            copy_commit();
            assert!(ld_f32(shared()).is_nan());
            copy_wait::<0>();
            assert_eq!(ld_f32(shared() + 12), 7.0);
        }
    };
    run(kernel, &[global.address()]);
}

/// Two matrices of 64 and 256 rows of 128 bytes, all ones, and the descriptors of four products.
fn ones() -> ([u64; 4], [u64; 4]) {
    let (mut at, end) = (shared() + 16 * thread(), shared() + (64 + 256) * 128);
    while at < end {
        // SAFETY: emulated.
        unsafe { st_u4(at, [0x3f80_3f80; 4]) };
        at += 16 * threads();
    }
    let matrix = |at| Swizzled { at, panel: 0, eight: 1024 }.steps(32);
    (matrix(shared()), matrix(shared() + 64 * 128))
}

/// The same where products may read them.
fn ones_for_products() -> ([u64; 4], [u64; 4]) {
    let operands = ones();
    proxy_fence();
    barrier();
    operands
}

/// Four products of ones, under way.
fn started() -> Sums {
    let ((a, b), mut sums) = (ones_for_products(), Sums::zero());
    // SAFETY: emulated.
    unsafe { sums.start::<false>(a, b) };
    sums
}

fn run_warpgroup(call: unsafe fn(&[u64])) {
    let grid = Grid { blocks: [1, 1], threads: 128, shared: (64 + 256) * 128, seed: 1 };
    // SAFETY: the kernels below take nothing.
    unsafe { launch(&Entry { name: "test", params: &[], call }, grid, &[]) }
}

#[test]
fn an_asynchronous_product() {
    // SAFETY: emulated.
    run_warpgroup(|_| unsafe {
        let (a, b) = ones_for_products();
        let mut sums = Sums::zero();
        sums.start::<false>(a, b);
        sums.wait_for_all_but_one();
        sums.start::<false>(a, b);
        assert_eq!(sums.finish(), [[128.0; 4]; 32]);
    });
}

#[test]
#[should_panic(expected = "which set no fence")]
fn a_missing_proxy_fence() {
    // SAFETY: emulated.
    run_warpgroup(|_| unsafe {
        let (a, b) = ones();
        barrier();
        let mut sums = Sums::zero();
        sums.start::<false>(a, b);
        sums.finish();
    });
}

#[test]
#[should_panic(expected = "changed while it was multiplied")]
fn overwritten_under_a_product() {
    // SAFETY: emulated.
    run_warpgroup(|_| unsafe {
        let sums = started();
        barrier();
        st_u4(shared() + 16 * thread(), [0; 4]);
        proxy_fence();
        barrier();
        sums.finish();
    });
}

#[test]
#[should_panic(expected = "nothing waited for")]
fn a_product_that_nothing_waits_for() {
    run_warpgroup(|_| {
        started();
    });
}

#[test]
#[should_panic(expected = "warps of a warpgroup ask for")]
fn warps_with_other_descriptors() {
    // SAFETY: emulated.
    run_warpgroup(|_| unsafe {
        let (a, b) = ones_for_products();
        let mut sums = Sums::zero();
        sums.start::<false>(if warp() == 2 { b } else { a }, b);
        sums.finish();
    });
}

#[test]
#[should_panic(expected = "changed while it was multiplied")]
fn a_copy_under_a_product() {
    // SAFETY: emulated.
    run_warpgroup(|_| unsafe {
        let sums = started();
        barrier();
        if thread() == 0 {
            copy_async(shared(), core::ptr::null(), false);
        }
        copy_commit();
        sums.finish();
    });
}

#[test]
#[should_panic(expected = "a race")]
fn a_copy_to_where_others_still_read() {
    let global = Global::new(&[7f32; 4]);
    // SAFETY: emulated.
    let kernel = |slots: &[u64]| unsafe {
        if thread() == 0 {
            st_f32(shared(), 1.0);
        }
        barrier();
        ld_f32(shared());
        if thread() == 63 {
            copy_async(shared(), slots[0] as *const u8, true);
            copy_commit();
        }
        barrier();
        copy_wait::<0>();
    };
    run(kernel, &[global.address()]);
}
