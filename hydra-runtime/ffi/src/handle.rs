//! Handles: numbers that name objects of this library.
//!
//! A handle has its kind, its slot and the slot's generation, which goes up when the object is freed. So a handle that has
//! been freed, was made up, or is of another kind is recognised: it is an error with text and never a stray pointer. A
//! slot that has had all generations isn't used again.

use crate::error::{Failure, Result, hydra_status, invalid};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Kind in bits 60 to 63, generation in 32 to 59, slot + 1 in 0 to 31. No handle is 0.
const KIND_SHIFT: u32 = 60;
const GENERATION_SHIFT: u32 = 32;
const GENERATIONS: u32 = 1 << (KIND_SHIFT - GENERATION_SHIFT);

/// What the kinds are called in messages, in the order of their numbers from 1 on.
const KINDS: [&str; 4] = ["model", "adapter", "generator", "trainer"];

/// A kind of objects, each of which has one table.
pub(crate) trait Object: Sized + 'static {
    /// From 1 to the number of kinds.
    const KIND: usize;
    fn table() -> &'static Table<Self>;
}

/// The objects of one kind.
pub(crate) struct Table<T>(Mutex<Slots<T>>);

struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    generation: u32,
    object: Option<Arc<T>>,
}

impl<T> Table<T> {
    pub const fn new() -> Self {
        Self(Mutex::new(Slots { slots: Vec::new(), free: Vec::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Slots<T>> {
        // Nothing in here panics half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives an object a handle.
pub(crate) fn insert<T: Object>(object: T) -> Result<u64> {
    let mut table = T::table().lock();
    let slot = match table.free.pop() {
        Some(slot) => slot,
        None => {
            let slot = u32::try_from(table.slots.len()).ok().filter(|&slot| slot < u32::MAX);
            let slot = slot.ok_or_else(|| invalid(format!("too many objects: {} {}s", u32::MAX, name::<T>())))?;
            table.slots.push(Slot { generation: 0, object: None });
            slot
        }
    };
    let entry = &mut table.slots[slot as usize];
    entry.object = Some(Arc::new(object));
    let (kind, generation) = (T::KIND as u64, u64::from(entry.generation));
    Ok(kind << KIND_SHIFT | generation << GENERATION_SHIFT | (u64::from(slot) + 1))
}

/// The object of a handle. It lives until the call that uses it ends, even if another thread frees it.
pub(crate) fn get<T: Object>(handle: u64) -> Result<Arc<T>> {
    let slot = slot::<T>(handle)?;
    let table = T::table().lock();
    let object = table.slots.get(slot).filter(|slot| slot.generation == generation(handle));
    object.and_then(|slot| slot.object.clone()).ok_or_else(|| stale::<T>())
}

/// The object of a handle that may be 0, for none.
pub(crate) fn get_optional<T: Object>(handle: u64) -> Result<Option<Arc<T>>> {
    if handle == 0 { Ok(None) } else { get(handle).map(Some) }
}

/// Takes the object's handle away. 0 is allowed and does nothing.
pub(crate) fn remove<T: Object>(handle: u64) -> Result<()> {
    if handle == 0 {
        return Ok(());
    }
    let slot = slot::<T>(handle)?;
    let mut table = T::table().lock();
    let entry = table.slots.get_mut(slot).filter(|slot| slot.generation == generation(handle));
    let object = entry.and_then(|entry| {
        let object = entry.object.take()?;
        entry.generation += 1;
        Some((object, entry.generation))
    });
    let (object, generation) = object.ok_or_else(|| stale::<T>())?;
    if generation < GENERATIONS {
        table.free.push(slot as u32);
    }
    drop(table);
    // Outside the lock: an object's end may take a while.
    drop(object);
    Ok(())
}

fn name<T: Object>() -> &'static str {
    KINDS[T::KIND - 1]
}

fn generation(handle: u64) -> u32 {
    (handle >> GENERATION_SHIFT) as u32 % GENERATIONS
}

/// The slot that a handle of this kind names.
fn slot<T: Object>(handle: u64) -> Result<usize> {
    let text = if handle == 0 {
        format!("no {}: the handle is 0", name::<T>())
    } else {
        match ((handle >> KIND_SHIFT) as usize, handle as u32) {
            (kind, slot) if kind == T::KIND && slot > 0 => return Ok(slot as usize - 1),
            (kind, _) => match kind.checked_sub(1).and_then(|kind| KINDS.get(kind)) {
                Some(other) if kind != T::KIND => {
                    format!("wrong kind of handle: expected {}, found {other}", name::<T>())
                }
                _ => format!("no {}: {handle:#x} is no handle", name::<T>()),
            },
        }
    };
    Err(Failure { status: hydra_status::InvalidHandle, text })
}

fn stale<T: Object>() -> Failure {
    Failure { status: hydra_status::InvalidHandle, text: format!("no such {}: it has been freed", name::<T>()) }
}

/// The object inside a mutex, for one call at a time.
pub(crate) fn exclusive<'a, T>(what: &str, mutex: &'a Mutex<T>) -> Result<MutexGuard<'a, T>> {
    use std::sync::TryLockError::{Poisoned, WouldBlock};
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(WouldBlock) => {
            let text = format!("another call is using the {what}: use each from one thread at a time");
            Err(Failure { status: hydra_status::Busy, text })
        }
        Err(Poisoned(_)) => {
            let text = format!("a mistake inside Hydra ended an earlier call: free the {what}");
            Err(Failure { status: hydra_status::Panic, text })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::door;

    #[derive(Debug)]
    struct Number(Mutex<u32>);
    #[derive(Debug)]
    struct Other;

    impl Object for Number {
        const KIND: usize = 1;
        fn table() -> &'static Table<Self> {
            static TABLE: Table<Number> = Table::new();
            &TABLE
        }
    }

    impl Object for Other {
        const KIND: usize = 2;
        fn table() -> &'static Table<Self> {
            static TABLE: Table<Other> = Table::new();
            &TABLE
        }
    }

    #[test]
    fn handles_are_checked_at_every_use() {
        let first = insert(Number(Mutex::new(1))).unwrap();
        let held = get::<Number>(first).unwrap();
        remove::<Number>(first).unwrap();
        assert_eq!(*held.0.lock().unwrap(), 1, "an object in use lives on");
        let second = insert(Number(Mutex::new(2))).unwrap();
        assert_eq!(second as u32, first as u32, "the slot is used again");
        for bad in [first, 0, 7, u64::MAX, first + 1, insert(Other).unwrap()] {
            assert_eq!(get::<Number>(bad).unwrap_err().status, hydra_status::InvalidHandle, "{bad:#x}");
        }
        assert_eq!(remove::<Number>(first).unwrap_err().text, "no such model: it has been freed");
        assert_eq!(get::<Other>(second).unwrap_err().text, "wrong kind of handle: expected adapter, found model");
        assert!(remove::<Number>(0).is_ok() && get_optional::<Number>(0).unwrap().is_none());
        // Every generation but the last leaves the slot to others.
        let slot = second as u32;
        Number::table().lock().slots[slot as usize - 1].generation = GENERATIONS - 1;
        let last = second | u64::from(GENERATIONS - 1) << GENERATION_SHIFT;
        remove::<Number>(last).unwrap();
        assert_ne!(insert(Number(Mutex::new(3))).unwrap() as u32, slot, "a slot that is worn out rests");
        assert!(get::<Number>(last).is_err() && get::<Number>(second).is_err());
    }

    #[test]
    fn one_call_at_a_time_and_none_after_a_panic() {
        let mutex = Mutex::new(0);
        let guard = exclusive("trainer", &mutex).unwrap();
        assert_eq!(exclusive("trainer", &mutex).unwrap_err().status, hydra_status::Busy);
        drop(guard);
        let status = door(|| {
            let _guard = exclusive("trainer", &mutex)?;
            panic!("half-way")
        });
        assert_eq!(status, hydra_status::Panic);
        assert_eq!(exclusive("trainer", &mutex).unwrap_err().status, hydra_status::Panic);
    }
}
