//! The backend on a device that only records what happens.

use super::driver::Driver;
use super::launcher::Cuda;
use crate::Result;
use crate::backend::Backend;
use hydra_ptx::launch::{Arg, Instructions, Launch};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

thread_local! {
    /// The rows that this thread gathers.
    static ROWS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// A device that records what was uploaded to which address. At the launch of a gather, it compares the rows that are there with the
/// thread's own.
#[derive(Default)]
struct Uploads {
    end: AtomicU64,
    at: Mutex<HashMap<u64, Vec<u8>>>,
}

impl Driver for Uploads {
    type Memory = u64;
    type Entered = ();

    fn enter(&self) {}

    fn allocate(&self, bytes: usize) -> Result<u64> {
        Ok(256 + self.end.fetch_add(bytes as u64 + 256, Ordering::Relaxed))
    }

    fn address(&self, memory: &u64) -> u64 {
        *memory
    }

    fn upload(&self, to: &mut u64, at: usize, from: &[u8]) -> Result<()> {
        self.at.lock().unwrap().insert(*to + at as u64, from.into());
        Ok(())
    }

    fn download(&self, _: &mut [u8], _: &u64) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _: &mut u64, _: usize, _: &u64, _: Range<usize>) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: &mut u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        std::thread::sleep(Duration::from_millis(1));
        let Arg::U64(rows) = launch.args[3] else { panic!("{launch:?}") };
        let there: Vec<u32> = bytemuck::pod_collect_to_vec(&self.at.lock().unwrap()[&rows]);
        ROWS.with_borrow(|rows| assert_eq!(there, *rows));
        Ok(())
    }

    fn instructions(&self) -> Instructions {
        Instructions::Mma
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn describe(&self) -> String {
        String::new()
    }
}

#[test]
fn ids_stay_until_they_are_used() {
    let cuda = Cuda::new(Uploads::default());
    let x = cuda.buffer(1000).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let (cuda, x) = (&cuda, &x);
            scope.spawn(move || {
                let mut out = cuda.buffer(1).unwrap();
                for i in 0..10 {
                    let rows = [thread * 10 + i];
                    ROWS.set(rows.into());
                    cuda.gather(&mut out, x, &rows, 1).unwrap();
                }
            });
        }
    });
}
