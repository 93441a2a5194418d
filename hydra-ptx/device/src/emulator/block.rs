//! One block: its threads as coroutines, its shared memory, and the collectives that bring threads together.

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

/// Room for the arrays of a kernel that the compiler hasn't put into registers.
const STACK: usize = 256 * 1024;

pub(crate) const LANES: usize = 32;

/// A thread's wait for others.
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
    /// What it gives is in [`Block::parts`].
    Wgmma(Operands),
    WgmmaCommit,
    WgmmaWait {
        pending: u32,
    },
}

type Reply = [u32; 4];
type Asked = (Request, Place);
type Thread = Coroutine<Reply, Asked, (), DefaultStack>;

/// What one thread does.
pub(crate) type Body = Rc<dyn Fn()>;

/// Where a thread is.
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

/// A copy that is under way.
struct Copy {
    to: u32,
    from: usize,
    there: bool,
    place: &'static Location<'static>,
}

/// One thread's copies: groups in order, and the group that is being filled.
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
    /// By warp.
    pub products: Vec<Products>,
    /// How many stores to shared memory there have been; which was the last at each two bytes; and how many each thread
    /// had seen at its last fence for the asynchronous proxy.
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

/// Waits until the block has brought the others together.
pub(crate) fn ask(request: Request, place: Place) -> Reply {
    let yielder = with_block(|block| block.yielders[block.current as usize]);
    // SAFETY: the running thread's own coroutine put it there, and is alive.
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

    /// The running thread's stores can be seen by asynchronous products.
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
    pub fn copy_async(&mut self, to: u32, from: *const u8, there: bool) {
        if there {
            check(from as usize, 16, 16, self.stamp(), false);
        }
        // From now on anything may be there: a copy arrives as early as here, or as late as it is waited for.
        let at = self.touch_shared(to, 16, 16, true);
        self.shared[at..at + 16].fill(0xff);
        let copy = Copy { to, from: from as usize, there, place: Location::caller() };
        self.copies[self.current as usize].open.push(copy);
    }

    pub fn copy_commit(&mut self) {
        let copies = &mut self.copies[self.current as usize];
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    /// Copies arrive at the last moment, so that a kernel that waits for too few reads what was there before.
    pub fn copy_wait(&mut self, pending: usize) {
        while self.copies[self.current as usize].groups.len() > pending {
            for copy in self.copies[self.current as usize].groups.pop_front().unwrap() {
                let mut bytes = [0; 16];
                if copy.there {
                    // SAFETY: checked when the copy was asked for; memory isn't freed during a launch.
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
    // Shared memory of the block before is another one.
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

// Eight of them a block, and most of the time all run.
#[allow(clippy::large_enum_variant)]
enum Warp {
    /// With what its lanes were told.
    Runs([Reply; LANES]),
    Waits(Place),
    Done,
}

/// Runs a warp's lanes, one after the other, to their next collective.
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

/// With nothing to be told.
const GO_ON: Warp = Warp::Runs([[0; 4]; LANES]);

fn asynchronous(body: impl FnOnce(&mut Block)) -> Warp {
    with_block(body);
    GO_ON
}

/// Lets the block go on if all its warps are at the barrier.
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

fn shuffle(requests: &[Request; LANES]) -> [Reply; LANES] {
    core::array::from_fn(|lane| {
        let Request::Shuffle { lanes, .. } = requests[lane] else { unreachable!("the same place") };
        let Request::Shuffle { value, .. } = requests[lane ^ lanes as usize] else { unreachable!("the same place") };
        [value, 0, 0, 0]
    })
}

/// Lane 8i + r names row r of matrix i.
fn ldmatrix(requests: &[Request; LANES], transposed: bool, warp: usize, place: Place) -> [Reply; LANES] {
    let rows: [[u16; 8]; LANES] = core::array::from_fn(|lane| {
        let Request::Ldmatrix { address, .. } = requests[lane] else { unreachable!("the same place") };
        assert!(address.is_multiple_of(16), "{place}: ldmatrix at {address:#x}, not aligned");
        let bytes: [u8; 16] = with_block(|block| {
            block.current = (warp * LANES + lane) as u32;
            block.shared_load(address)
        });
        core::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
    });
    core::array::from_fn(|lane| {
        core::array::from_fn(|matrix| {
            let element = |row: usize, column: usize| u32::from(rows[8 * matrix + row][column]);
            let (outer, inner) = (lane / 4, 2 * (lane % 4));
            if transposed {
                element(inner, outer) | element(inner + 1, outer) << 16
            } else {
                element(outer, inner) | element(outer, inner + 1) << 16
            }
        })
    })
}

/// With g = lane / 4 and t = lane % 4: a₀ = A[g, 2t..], a₁ = A[g + 8, 2t..], a₂ = A[g, 2t + 8..], a₃ = A[g + 8, 2t +
/// 8..]; b₀ = B[2t.., g], b₁ = B[2t + 8.., g]; c₀, c₁ = C[g, 2t..], c₂, c₃ = C[g + 8, 2t..].
fn mma(requests: &[Request; LANES]) -> [Reply; LANES] {
    let (mut a, mut b, mut c) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
    let half = |word: u32, high: usize| f32::from_bits(if high == 1 { word & 0xffff_0000 } else { word << 16 });
    for (lane, request) in requests.iter().enumerate() {
        let Request::Mma { a: ra, b: rb, c: rc } = request else { unreachable!("the same place") };
        let (g, t) = (lane / 4, 2 * (lane % 4));
        for i in 0..2 {
            for r in 0..4 {
                a[g + r % 2 * 8][t + r / 2 * 8 + i] = half(ra[r], i);
            }
            for r in 0..2 {
                b[t + r * 8 + i][g] = half(rb[r], i);
                c[g + r * 8][t + i] = rc[2 * r + i];
            }
        }
    }
    for (a, c) in a.iter().zip(&mut c) {
        for (a, b) in a.iter().zip(&b) {
            for (c, b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
    core::array::from_fn(|lane| {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        core::array::from_fn(|i| c[g + i / 2 * 8][t + i % 2].to_bits())
    })
}
