//! The device's memory in the emulator: allocations, and the last accesses to each two bytes.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// The time and the author of an access.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The launch, counted from 1; 0 for no access.
    pub launch: u32,
    /// The block, or [`SEVERAL`].
    pub block: u32,
    /// The number of barriers that the block had passed.
    pub epoch: u32,
    /// The thread in its block, or [`SEVERAL`].
    pub thread: u32,
}

/// More than one thread, or block, has read.
const SEVERAL: u32 = u32::MAX;

/// The last store and the last load of two bytes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Touched {
    store: Stamp,
    load: Stamp,
}

impl Touched {
    /// The thread that stored last.
    pub fn writer(&self) -> usize {
        self.store.thread as usize
    }

    /// Records an access. Returns whether it races with an earlier one.
    pub fn touch(&mut self, now: Stamp, is_store: bool) -> bool {
        let unordered = |then: Stamp| {
            let same_time = then.block != now.block || (then.epoch == now.epoch && then.thread != now.thread);
            then.launch == now.launch && same_time
        };
        let races = unordered(self.store) || (is_store && unordered(self.load));
        if is_store {
            self.store = now;
        } else if !unordered(self.load) {
            self.load = now;
        } else if self.load.block != now.block {
            self.load.block = SEVERAL;
        } else {
            self.load.thread = SEVERAL;
        }
        races
    }
}

struct Allocation {
    end: usize,
    touched: Vec<Touched>,
}

thread_local! {
    static ALLOCATED: RefCell<BTreeMap<usize, Allocation>> = const { RefCell::new(BTreeMap::new()) };
    static LAUNCH: Cell<u32> = const { Cell::new(1) };
}

/// The current launch's number.
pub(crate) fn launch() -> u32 {
    LAUNCH.get()
}

pub(crate) fn next_launch() {
    LAUNCH.set(LAUNCH.get() + 1);
}

/// Checks an access to the device's memory.
#[track_caller]
pub(crate) fn check(at: usize, len: usize, align: usize, now: Stamp, is_store: bool) {
    let what = if is_store { "store" } else { "load" };
    assert!(at.is_multiple_of(align), "{what} of {len} bytes at {at:#x}, not aligned");
    ALLOCATED.with_borrow_mut(|allocated| {
        let found = allocated.range_mut(..=at).next_back();
        let (start, allocation) = found.unwrap_or_else(|| panic!("{what} at {at:#x}, below all allocations"));
        let end = allocation.end;
        assert!(at + len <= end, "{what} of {len} bytes at byte {}, allocated are {}", at - start, end - start);
        for half in (at - start) / 2..(at - start + len).div_ceil(2) {
            let races = allocation.touched[half].touch(now, is_store);
            assert!(!races, "{what} at byte {} of {}: a race", at - start, end - start);
        }
    });
}

/// An array on the emulated device, which belongs to the host's thread.
pub struct Global<T> {
    at: *mut T,
    len: usize,
}

impl<T: Copy> Global<T> {
    /// Aligned as by the driver.
    fn layout(len: usize) -> Layout {
        Layout::array::<T>(len.max(1)).and_then(|layout| layout.align_to(256)).expect("a size that exists")
    }

    /// Allocates an array of these values.
    pub fn new(values: &[T]) -> Self {
        let (layout, len) = (Self::layout(values.len()), values.len());
        // SAFETY: the layout isn't empty, and the values fit it.
        let at = unsafe {
            let at = alloc_zeroed(layout).cast::<T>();
            if at.is_null() {
                handle_alloc_error(layout);
            }
            at.copy_from_nonoverlapping(values.as_ptr(), len);
            at
        };
        let (start, bytes) = (at as usize, size_of_val(values));
        if bytes > 0 {
            let touched = vec![Touched::default(); bytes.div_ceil(2)];
            ALLOCATED.with_borrow_mut(|all| all.insert(start, Allocation { end: start + bytes, touched }));
        }
        Self { at, len }
    }

    /// Its address, as a launch passes it.
    pub fn address(&self) -> u64 {
        self.at as u64
    }

    /// The values.
    pub fn values(&self) -> &[T] {
        // SAFETY: initialised by `new`; kernels run only inside `launch`, which no borrow of this outlives.
        unsafe { core::slice::from_raw_parts(self.at, self.len) }
    }

    /// The values, to be changed between launches.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `values`.
        unsafe { core::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for Global<T> {
    fn drop(&mut self) {
        // A host's thread that ends may have dropped its list of allocations already.
        let _ = ALLOCATED.try_with(|all| all.borrow_mut().remove(&(self.at as usize)));
        let bytes = (size_of::<T>() * self.len.max(1), 256);
        // SAFETY: `new` allocated it with this layout.
        unsafe { dealloc(self.at.cast(), Layout::from_size_align_unchecked(bytes.0, bytes.1)) }
    }
}
