//! One block: its threads as coroutines, its shared memory, and the collectives that bring threads together.

use super::collectives::{ldmatrix, mma, shuffle};
use super::memory::{self, Stamp, Touched};
use super::wgmma::{Operands, Part, Products};
use super::{Grid, memory::check};
use crate::prelude::SHARED_BASE;
use core::mem::discriminant;
use core::panic::Location;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

/// Bytes of a thread's stack: a kernel's arrays may lie there.
const STACK: usize = 256 * 1024;

pub(crate) const LANES: usize = 32;

/// A collective for which a thread waits.
#[derive(Clone, Copy)]
pub(crate) enum Request {
    Barrier,
    Shuffle {
        value: u32,
        lanes: u32,
    },
    Ldmatrix {
        address: u32,
        transposed: bool,
    },
    Mma {
        a: [u32; 4],
        b: [u32; 2],
        c: [f32; 4],
    },
    WgmmaFence,
    /// The result is in [`Block::parts`].
    Wgmma(Operands),
    WgmmaCommit,
    WgmmaWait {
        pending: u32,
    },
}

/// What a thread gets from a collective.
pub(crate) type Reply = [u32; 4];
type Asked = (Request, Place);
type Thread = Coroutine<Reply, Asked, (), DefaultStack>;

/// The work of one thread.
pub(crate) type Body = Rc<dyn Fn()>;

/// A thread's position.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Place {
    /// In a kernel's source.
    Source(&'static Location<'static>),
    /// At a line of PTX.
    Line(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Source(place) => place.fmt(f),
            Place::Line(line) => write!(f, "PTX line {line}"),
        }
    }
}

/// An asynchronous copy that hasn't arrived.
struct Copy {
    to: u32,
    from: usize,
    /// Whether it copies bytes; else zeros.
    inside: bool,
    place: &'static Location<'static>,
}

/// One thread's copies: committed groups in order, and the open group.
#[derive(Default)]
struct Copies {
    groups: VecDeque<Vec<Copy>>,
    open: Vec<Copy>,
}

/// What the running thread can see.
pub(crate) struct Block {
    pub current: u32,
    pub threads: u32,
    pub index: [u32; 2],
    linear: u32,
    epoch: u32,
    yielders: Vec<*const Yielder<Reply, Asked>>,
    shared: Vec<u8>,
    touched: Vec<Touched>,
    copies: Vec<Copies>,
    /// A thread's part of its latest asynchronous product.
    pub parts: Vec<Part>,
    /// The asynchronous products of each warp.
    pub products: Vec<Products>,
    /// The number of stores to shared memory so far; the number of the last one at each two bytes; and the number at
    /// each thread's last fence for the asynchronous proxy.
    stores: u64,
    stored: Vec<u64>,
    fenced: Vec<u64>,
}

thread_local! {
    static BLOCK: RefCell<Option<Block>> = const { RefCell::new(None) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

#[track_caller]
pub(crate) fn with_block<R>(body: impl FnOnce(&mut Block) -> R) -> R {
    BLOCK.with_borrow_mut(|block| body(block.as_mut().expect("kernels run inside `emulator::launch`")))
}

/// Waits for a collective, and returns its result.
pub(crate) fn ask(request: Request, place: Place) -> Reply {
    let yielder = with_block(|block| block.yielders[block.current as usize]);
    // SAFETY: the running thread's own coroutine stored it, and is alive.
    unsafe { (*yielder).suspend((request, place)) }
}

impl Block {
    fn stamp(&self) -> Stamp {
        Stamp { launch: memory::launch(), block: self.linear, epoch: self.epoch, thread: self.current }
    }

    #[track_caller]
    fn touch_shared(&mut self, address: u32, len: usize, align: usize, is_store: bool) -> usize {
        let what = if is_store { "store" } else { "load" };
        assert!((address as usize).is_multiple_of(align), "shared {what} of {len} bytes at {address:#x}, not aligned");
        let at = address.checked_sub(SHARED_BASE).expect("an address of shared memory") as usize;
        assert!(at + len <= self.shared.len(), "shared {what} of {len} bytes at {at}, there are {}", self.shared.len());
        let now = self.stamp();
        for half in at / 2..(at + len) / 2 {
            assert!(!self.touched[half].touch(now, is_store), "shared {what} at byte {at}: a race");
        }
        at
    }

    #[track_caller]
    pub fn shared_load<const N: usize>(&mut self, address: u32) -> [u8; N] {
        let at = self.touch_shared(address, N, N, false);
        self.shared[at..at + N].try_into().unwrap()
    }

    #[track_caller]
    pub fn shared_store(&mut self, address: u32, bytes: &[u8]) {
        let at = self.touch_shared(address, bytes.len(), bytes.len(), true);
        self.shared[at..at + bytes.len()].copy_from_slice(bytes);
        self.stores += 1;
        self.stored[at / 2..(at + bytes.len()) / 2].fill(self.stores);
    }

    /// Makes the running thread's stores visible to asynchronous products.
    pub fn proxy_fence(&mut self) {
        self.fenced[self.current as usize] = self.stores;
    }

    /// Two bytes of shared memory as an asynchronous product reads them.
    #[track_caller]
    pub fn proxy_load(&mut self, address: u32) -> u16 {
        let at = self.touch_shared(address, 2, 2, false);
        let writer = self.touched[at / 2].writer();
        assert!(self.stored[at / 2] <= self.fenced[writer], "byte {at}: stored by thread {writer}, which set no fence");
        u16::from_le_bytes([self.shared[at], self.shared[at + 1]])
    }

    #[track_caller]
    pub fn check_global(&mut self, at: usize, len: usize, align: usize, is_store: bool) {
        check(at, len, align, self.stamp(), is_store);
    }

    #[track_caller]
    pub fn copy_async(&mut self, to: u32, from: *const u8, inside: bool) {
        if inside {
            check(from as usize, 16, 16, self.stamp(), false);
        }
        // From now on the contents are undefined: a copy may arrive at once, or when it is waited for.
        let at = self.touch_shared(to, 16, 16, true);
        self.shared[at..at + 16].fill(0xff);
        let copy = Copy { to, from: from as usize, inside, place: Location::caller() };
        self.copies[self.current as usize].open.push(copy);
    }

    pub fn copy_commit(&mut self) {
        let copies = &mut self.copies[self.current as usize];
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    /// Copies arrive as late as possible, so that a kernel that waits for too few of them reads NaN.
    pub fn copy_wait(&mut self, pending: usize) {
        while self.copies[self.current as usize].groups.len() > pending {
            for copy in self.copies[self.current as usize].groups.pop_front().unwrap() {
                let mut bytes = [0; 16];
                if copy.inside {
                    // SAFETY: checked when the copy was started; memory isn't freed during a launch.
                    bytes = unsafe { *(copy.from as *const [u8; 16]) };
                }
                let Copy { to, place, .. } = copy;
                assert!(to.is_multiple_of(16), "{place}: a copy to {to:#x}, not aligned");
                self.shared_store(to, &bytes);
            }
        }
    }
}

/// Runs one block of a grid to its end.
pub(crate) fn run(body: &Body, grid: Grid, index: [u32; 2]) {
    let count = grid.threads as usize;
    BLOCK.set(Some(Block {
        current: 0,
        threads: grid.threads,
        index,
        linear: index[1] * grid.blocks[0] + index[0],
        epoch: 0,
        yielders: vec![core::ptr::null(); count],
        // NaN as f32 and as bf16.
        shared: vec![0xff; grid.shared as usize],
        touched: vec![Touched::default(); grid.shared.div_ceil(2) as usize],
        copies: (0..count).map(|_| Copies::default()).collect(),
        parts: vec![[[0.0; 4]; 32]; count],
        products: (0..count / LANES).map(|_| Products::default()).collect(),
        stores: 0,
        stored: vec![0; grid.shared.div_ceil(2) as usize],
        fenced: vec![0; count],
    }));
    let mut threads: Vec<Thread> = (0..grid.threads).map(|thread| spawn(body, thread)).collect();
    let mut state = grid.seed ^ u64::from(index[0]) << 32 ^ u64::from(index[1]);
    let mut warps: Vec<Warp> = (0..count / LANES).map(|_| GO_ON).collect();
    loop {
        let mut order: Vec<usize> = (0..warps.len()).filter(|&w| matches!(warps[w], Warp::Runs(_))).collect();
        if order.is_empty() {
            break;
        }
        for i in (1..order.len()).rev() {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            order.swap(i, (state >> 33) as usize % (i + 1));
        }
        for w in order {
            warps[w] = resume(&mut threads[w * LANES..(w + 1) * LANES], w, &warps[w]);
        }
        release(&mut warps);
    }
    with_block(|block| block.wgmma_end());
    BLOCK.set(None);
    STACKS.with_borrow_mut(|stacks| stacks.extend(threads.into_iter().map(Coroutine::into_stack)));
}

fn spawn(body: &Body, thread: u32) -> Thread {
    let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| DefaultStack::new(STACK).expect("a stack"));
    let body = body.clone();
    Coroutine::with_stack(stack, move |yielder: &Yielder<Reply, Asked>, _| {
        with_block(|block| block.yielders[thread as usize] = yielder);
        body();
    })
}

// A block has eight of them, and most of the time all run.
#[allow(clippy::large_enum_variant)]
enum Warp {
    /// The results with which its lanes go on.
    Runs([Reply; LANES]),
    Waits(Place),
    Done,
}

/// Runs a warp's lanes one after the other to their next collective, and carries it out unless it is a barrier.
fn resume(threads: &mut [Thread], warp: usize, state: &Warp) -> Warp {
    let Warp::Runs(replies) = state else { unreachable!("a warp that runs") };
    let mut asked = [None; LANES];
    for (lane, thread) in threads.iter_mut().enumerate() {
        if thread.done() {
            continue;
        }
        with_block(|block| block.current = (warp * LANES + lane) as u32);
        if let CoroutineResult::Yield(request) = thread.resume(replies[lane]) {
            asked[lane] = Some(request);
        }
    }
    let Some((first, place)) = asked.iter().flatten().next().copied() else { return Warp::Done };
    let requests = asked.map(|asked| match asked {
        Some((request, at)) if at == place && discriminant(&request) == discriminant(&first) => request,
        Some((_, at)) => panic!("{place}: a collective, and lanes of the same warp are at {at}"),
        None => panic!("{place}: a collective that some lanes of the warp never reach"),
    });
    match first {
        Request::Barrier => Warp::Waits(place),
        Request::Shuffle { .. } => Warp::Runs(shuffle(&requests)),
        Request::Ldmatrix { transposed, .. } => Warp::Runs(ldmatrix(&requests, transposed, warp, place)),
        Request::Mma { .. } => Warp::Runs(mma(&requests)),
        Request::Wgmma(operands) => {
            let same = |request: &Request| matches!(request, Request::Wgmma(other) if *other == operands);
            assert!(requests.iter().all(same), "{place}: lanes of a warp with other descriptors");
            with_block(|block| {
                block.current = (warp * LANES) as u32;
                let parts = block.wgmma(warp, operands);
                block.parts[warp * LANES..][..LANES].copy_from_slice(&parts);
            });
            GO_ON
        }
        Request::WgmmaFence => asynchronous(|block| block.wgmma_fence(warp)),
        Request::WgmmaCommit => asynchronous(|block| block.wgmma_commit(warp)),
        Request::WgmmaWait { pending } => asynchronous(|block| {
            block.current = (warp * LANES) as u32;
            block.wgmma_wait(warp, pending as usize);
        }),
    }
}

/// A warp that runs on without results.
const GO_ON: Warp = Warp::Runs([[0; 4]; LANES]);

fn asynchronous(body: impl FnOnce(&mut Block)) -> Warp {
    with_block(body);
    GO_ON
}

/// Releases the block's warps if all of them have reached the barrier.
fn release(warps: &mut [Warp]) {
    if warps.iter().any(|warp| matches!(warp, Warp::Runs(_))) {
        return;
    }
    let mut places = warps.iter().filter_map(|warp| if let Warp::Waits(place) = warp { Some(*place) } else { None });
    let Some(place) = places.next() else { return };
    assert_eq!(places.count() + 1, warps.len(), "{place}: a barrier, and some warps have ended");
    for warp in warps.iter_mut() {
        if let Warp::Waits(at) = warp {
            assert!(*at == place, "barriers at {at} and {place} at once");
        }
        *warp = GO_ON;
    }
    with_block(|block| block.epoch += 1);
}
