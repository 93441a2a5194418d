//! The operator on the caller's memory and threads: `hydra_kernels::hydra`'s columns, for C.
//!
//! ggml calls a custom operator's function on each of its threads with `ith` and `nth`, without a barrier in between. So a
//! call here does all that thread `ith` has to do: it has its own columns of y, or of dx, and of the gradients, and it
//! computes the adapter's narrow products with x or dy for itself. Nothing is allocated but an error's text.

use crate::adapter::hydra_gate;
use crate::arguments::{Out, check, reference, slice, slice_mut};
use crate::error::{Result, door, hydra_status, invalid};
use half::bf16;
use hydra_runtime::hydra_kernels::hydra::{
    BackwardArgs, ColumnGradients, ForwardArgs, HydraLayer, ThreadColumns, backward_columns, backward_columns_scratch,
    forward_columns, forward_columns_scratch,
};
use hydra_runtime::hydra_kernels::{
    AdapterRef, Bf16Isa, Dropout, Dropouts, Element, Float, Format, Gate, HydraShape, Isa, Routing, RowOrder, Scratch,
    Values, ValuesMut, Weight, Workspace,
};
use std::ffi::c_void;
use std::ops::Range;

/// How values are stored. The numbers are those of ggml_type.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_type {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// Blocks of 32 values of 4 bits, with a scale.
    Q4_0 = 2,
    /// Blocks of 32 values of 4 bits, with a scale and a minimum.
    Q4_1 = 3,
    /// Blocks of 32 values of 5 bits, with a scale.
    Q5_0 = 6,
    /// Blocks of 32 values of 5 bits, with a scale and a minimum.
    Q5_1 = 7,
    /// Blocks of 32 values of 8 bits, with a scale.
    Q8_0 = 8,
    /// Blocks of 256 values of 4 bits.
    Q4_K = 12,
    /// Blocks of 256 values of 5 bits.
    Q5_K = 13,
    /// Blocks of 256 values of 6 bits.
    Q6_K = 14,
    /// bfloat16.
    Bf16 = 30,
}

const FORMATS: [(hydra_type, Format); 11] = [
    (hydra_type::F32, Format::F32),
    (hydra_type::F16, Format::F16),
    (hydra_type::Q4_0, Format::Q4_0),
    (hydra_type::Q4_1, Format::Q4_1),
    (hydra_type::Q5_0, Format::Q5_0),
    (hydra_type::Q5_1, Format::Q5_1),
    (hydra_type::Q8_0, Format::Q8_0),
    (hydra_type::Q4_K, Format::Q4K),
    (hydra_type::Q5_K, Format::Q5K),
    (hydra_type::Q6_K, Format::Q6K),
    (hydra_type::Bf16, Format::Bf16),
];

fn format(number: i32) -> Result<Format> {
    let found = FORMATS.iter().find(|(name, _)| *name as i32 == number);
    found.map(|&(_, format)| format).ok_or_else(|| invalid(format!("weight_type: {number} is no hydra_type")))
}

/// f32 or bf16.
#[derive(Clone, Copy, PartialEq)]
enum Plain {
    F32,
    Bf16,
}

fn plain(what: &str, number: i32) -> Result<Plain> {
    match number {
        n if n == hydra_type::F32 as i32 => Ok(Plain::F32),
        n if n == hydra_type::Bf16 as i32 => Ok(Plain::Bf16),
        n => Err(invalid(format!("{what}: expected HYDRA_TYPE_F32 or HYDRA_TYPE_BF16, found {n}"))),
    }
}

/// A frozen linear layer and its adapter. Matrices are row-major.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_layer {
    /// Columns of x.
    pub d_in: usize,
    /// Columns of y.
    pub d_out: usize,
    /// W [d_out, d_in], in the format `weight_type`, at any alignment.
    pub weight: *const c_void,
    /// Bytes of `weight`.
    pub weight_bytes: usize,
    /// A hydra_type.
    pub weight_type: i32,
    /// What is multiplied in: HYDRA_TYPE_F32, or HYDRA_TYPE_BF16 with sums in f32.
    pub product_type: i32,
    /// Rank of each head. 0: there is no adapter, and what follows isn't read.
    pub rank: usize,
    /// Number of heads, N.
    pub lora_heads: usize,
    /// Not 0: each head has an A of its own.
    pub per_head_a: i32,
    /// A hydra_gate. Only HYDRA_GATE_ROUTER has the router's rows R.
    pub gate: i32,
    /// The router's logits are divided by it; 1 as published.
    pub temperature: f32,
    /// Only this many of a token's largest logits take part; 0 for all.
    pub top_k: usize,
    /// alpha / rank.
    pub scale: f32,
    /// A over R: [a_rows + N with a router, d_in], where a_rows is rank, or N · rank with an A for each head.
    pub a: *const f32,
    /// Values of `a`.
    pub a_len: usize,
    /// B [d_out, N · rank]: head e has columns e · rank to (e + 1) · rank.
    pub b: *const f32,
    /// Values of `b`.
    pub b_len: usize,
}

/// A forward pass: y = x Wᵀ + scale · Σ gate_e (x Aᵀ) B_eᵀ.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_forward_args {
    /// Rows of x and y.
    pub tokens: usize,
    /// Of x and y: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
    pub element: i32,
    /// [tokens, d_in].
    pub x: *const c_void,
    /// [tokens, d_out], written.
    pub y: *mut c_void,
    /// What a backward pass needs: [tokens, a_rows + N], written; null if it isn't needed.
    pub adapter_state: *mut f32,
    /// For HYDRA_GATE_LABEL: each token's head, or HYDRA_NO_LORA_HEAD.
    pub labels: *const u32,
    /// Probability of dropping a value of A's input; 0 outside of training.
    pub dropout: f32,
    /// Chooses what is dropped.
    pub dropout_seed: u64,
}

/// A backward pass. Its x, labels and dropout are the forward pass's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_backward_args {
    /// Rows of x and y.
    pub tokens: usize,
    /// Of x, dy and dx: HYDRA_TYPE_F32 or HYDRA_TYPE_BF16.
    pub element: i32,
    /// The gradient of y, [tokens, d_out].
    pub dy: *const c_void,
    /// [tokens, d_in].
    pub x: *const c_void,
    /// What the forward pass wrote. Not read without an adapter.
    pub adapter_state: *const f32,
    /// The gradient of x, [tokens, d_in], written; null if it isn't needed.
    pub dx: *mut c_void,
    /// The gradient of A over R, of the size of `a`, added to; null together with `db` if it isn't needed.
    pub da: *mut f32,
    /// The gradient of B, of the size of `b`, added to.
    pub db: *mut f32,
    /// As in the forward pass.
    pub labels: *const u32,
    /// As in the forward pass.
    pub dropout: f32,
    /// As in the forward pass.
    pub dropout_seed: u64,
    /// Weight of the load-balancing loss, whose gradient is added to the router's; 0 for none.
    pub load_balance: f32,
}

/// One of the threads that compute an operation together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_thread {
    /// This thread, from 0 on.
    pub ith: usize,
    /// Number of threads.
    pub nth: usize,
    /// Memory of this thread alone, best aligned to 64 bytes; its content doesn't matter.
    pub scratch: *mut f32,
    /// Floats of `scratch`: at least what hydra_forward_scratch or hydra_backward_scratch say.
    pub scratch_len: usize,
}

/// Memory that is read or written, as addresses.
struct Span(&'static str, Range<usize>);

impl Span {
    fn new<T>(what: &'static str, data: *const T, bytes: usize) -> Self {
        Span(what, data.addr()..data.addr().saturating_add(if data.is_null() { 0 } else { bytes }))
    }
}

/// An error if what is written overlaps with anything else.
fn disjoint(written: &[Span], read: &[Span]) -> Result<()> {
    let overlap = |a: &Span, b: &Span| a.1.start < b.1.end && b.1.start < a.1.end;
    for (i, a) in written.iter().enumerate() {
        if let Some(b) = written[i + 1..].iter().chain(read).find(|b| overlap(a, b)) {
            return Err(invalid(format!("{} and {} overlap in memory", a.0, b.0)));
        }
    }
    Ok(())
}

/// `rows · columns`, or an error.
fn count(rows: usize, columns: usize) -> Result<usize> {
    let values = rows.checked_mul(columns).filter(|values| *values <= isize::MAX as usize / 4);
    values.ok_or_else(|| invalid(format!("{rows} x {columns} values don't fit into memory")))
}

impl hydra_layer {
    fn gate(&self) -> Result<Gate> {
        let top_k = if self.top_k == 0 { usize::MAX } else { self.top_k };
        match self.gate {
            g if g == hydra_gate::Router as i32 => Ok(Gate::Router(Routing { temperature: self.temperature, top_k })),
            g if g == hydra_gate::Label as i32 => Ok(Gate::Label),
            g if g == hydra_gate::Uniform as i32 => Ok(Gate::Uniform),
            g if g == hydra_gate::One as i32 => Ok(Gate::One),
            g => Err(invalid(format!("gate: {g} is no hydra_gate"))),
        }
    }

    /// The sizes alone; no pointer is read.
    fn shape(&self) -> Result<HydraShape> {
        let &Self { d_in, d_out, rank, lora_heads, .. } = self;
        count(d_in, d_out)?;
        if rank == 0 {
            return Ok(HydraShape::frozen(d_in, d_out));
        }
        let router = matches!(self.gate()?, Gate::Router(_));
        let shape = HydraShape { d_in, d_out, rank, lora_heads, per_head_a: self.per_head_a != 0, router };
        shape.validate(0)?;
        Ok(shape)
    }

    /// # Safety
    /// Pointers are valid for reads of what their lengths say, during `'a`.
    unsafe fn read<'a>(&self) -> Result<HydraLayer<'a>> {
        let shape = self.shape()?;
        // SAFETY: the caller's word.
        let bytes = unsafe { slice("weight", self.weight.cast::<u8>(), self.weight_bytes)? };
        let weight = Weight::new(format(self.weight_type)?, self.d_out, self.d_in, bytes, RowOrder::Natural)?;
        if self.rank == 0 {
            return Ok(HydraLayer { weight, adapter: None });
        }
        if !self.scale.is_finite() {
            return Err(invalid(format!("scale: expected a finite number, found {}", self.scale)));
        }
        // SAFETY: the caller's word.
        let (a, b) = unsafe { (slice("a", self.a, self.a_len)?, slice("b", self.b, self.b_len)?) };
        Ok(HydraLayer { weight, adapter: Some(AdapterRef { shape, a, b, scale: self.scale, gate: self.gate()? }) })
    }

    /// The labels, if they are read.
    fn label_span(&self, data: *const u32, tokens: usize) -> Result<Span> {
        let read = self.rank > 0 && self.gate == hydra_gate::Label as i32;
        Ok(Span::new("labels", data, if read { count(tokens, 4)? } else { 0 }))
    }

    fn spans(&self) -> [Span; 3] {
        let bytes = |len: usize| if self.rank == 0 { 0 } else { len.saturating_mul(4) };
        [
            Span::new("weight", self.weight, self.weight_bytes),
            Span::new("a", self.a, bytes(self.a_len)),
            Span::new("b", self.b, bytes(self.b_len)),
        ]
    }
}

/// # Safety
/// As for [`slice`].
unsafe fn values<'a>(what: &str, plain: Plain, data: *const c_void, len: usize) -> Result<Values<'a>> {
    // SAFETY: the caller's word.
    unsafe {
        Ok(match plain {
            Plain::F32 => Values::F32(slice(what, data.cast::<f32>(), len)?),
            Plain::Bf16 => Values::Bf16(slice(what, data.cast::<bf16>(), len)?),
        })
    }
}

/// # Safety
/// As for [`slice`].
unsafe fn labels<'a>(layer: &HydraLayer<'_>, data: *const u32, tokens: usize) -> Result<&'a [u32]> {
    let read = layer.adapter.is_some_and(|adapter| adapter.gate == Gate::Label);
    // SAFETY: the caller's word.
    if read { unsafe { slice("labels", data, tokens) } } else { Ok(&[]) }
}

fn dropouts(p: f32, seed: u64) -> Result<Dropouts> {
    if !(0.0..=1.0).contains(&p) {
        return Err(invalid(format!("dropout: expected a probability, found {p}")));
    }
    let mask = Dropout { p, seed, first_row: 0 };
    Ok(Dropouts { input: (p > 0.0).then_some(mask), mixed: None })
}

impl hydra_thread {
    /// # Safety
    /// `scratch` is valid for reads and writes of `scratch_len` floats, and this thread's alone.
    unsafe fn workspace<'a>(&self, need: Scratch) -> Result<Workspace<'a>> {
        // SAFETY: the caller's word.
        let workspace = Workspace::new(unsafe { slice_mut("scratch", self.scratch, self.scratch_len)? });
        workspace.require(need)?;
        Ok(workspace)
    }

    fn columns(&self, shape: &HydraShape) -> Result<ThreadColumns> {
        if self.ith >= self.nth {
            return Err(invalid(format!("thread {} of {}: expected ith below nth", self.ith, self.nth)));
        }
        Ok(ThreadColumns::new(shape, self.ith, self.nth))
    }

    fn span(&self) -> Span {
        Span::new("scratch", self.scratch, self.scratch_len.saturating_mul(4))
    }
}

/// Where a thread computes its columns of a matrix [rows, width]: in place if they lie together, or else in scratch.
enum Part<'a, T> {
    InPlace(&'a mut [T]),
    Apart(&'a mut [T]),
}

/// A matrix of which each thread writes some columns.
struct Shared<T> {
    data: *mut T,
    rows: usize,
    width: usize,
}

impl<T: Float> Shared<T> {
    fn in_place(&self, columns: &Range<usize>) -> bool {
        self.rows == 1 || columns.len() == self.width
    }

    /// # Safety
    /// The matrix is valid for writes, and no other thread uses these columns.
    unsafe fn part<'a>(
        &self,
        what: &str,
        columns: &Range<usize>,
        workspace: &mut Workspace<'a>,
    ) -> Result<Part<'a, T>> {
        let len = self.rows * columns.len();
        if len > 0 {
            check(what, self.data.cast_const(), self.rows * self.width)?;
        }
        if self.in_place(columns) && len > 0 {
            // SAFETY: one row's columns, or all columns of all rows: together in memory, and this thread's alone.
            return Ok(Part::InPlace(unsafe { slice_mut(what, self.data.wrapping_add(columns.start), len)? }));
        }
        Ok(Part::Apart(workspace.take_lines::<T>(len)?))
    }

    /// Puts `part` [rows, columns] into place: each value is what `put` makes of the old one and the part's.
    ///
    /// # Safety
    /// As for [`Self::part`].
    unsafe fn put(&self, columns: &Range<usize>, part: &[T], put: impl Fn(T, T) -> T) {
        for (row, part) in part.chunks_exact(columns.len().max(1)).enumerate() {
            for (column, &value) in columns.clone().zip(part) {
                let at = self.data.wrapping_add(row * self.width + column);
                // SAFETY: inside the matrix; no reference to these columns exists in any thread.
                unsafe { at.write(put(at.read(), value)) };
            }
        }
    }
}

impl<T> Part<'_, T> {
    fn get(&mut self) -> &mut [T] {
        match self {
            Part::InPlace(part) | Part::Apart(part) => part,
        }
    }
}

fn bytes(plain: Plain) -> usize {
    match plain {
        Plain::F32 => 4,
        Plain::Bf16 => 2,
    }
}

/// Floats of a thread's part of a matrix of `rows` rows.
fn part_scratch(plain: Plain, rows: usize, columns: usize) -> Scratch {
    match plain {
        Plain::F32 => Scratch::lines::<f32>(rows.saturating_mul(columns)),
        Plain::Bf16 => Scratch::lines::<bf16>(rows.saturating_mul(columns)),
    }
}

impl hydra_forward_args {
    /// An error unless what is written is apart from everything else.
    fn check(&self, raw: &hydra_layer, shape: &HydraShape, element: Plain, thread: &hydra_thread) -> Result<()> {
        let written = [
            Span::new("y", self.y, count(self.tokens, shape.d_out)? * bytes(element)),
            Span::new("adapter_state", self.adapter_state, count(self.tokens, shape.state_width())? * 4),
            thread.span(),
        ];
        let x = Span::new("x", self.x, count(self.tokens, shape.d_in)? * bytes(element));
        disjoint(&written, &[x, raw.label_span(self.labels, self.tokens)?])?;
        disjoint(&written, &raw.spans())
    }
}

fn forward_need<E: Element>(shape: &HydraShape, args: &hydra_forward_args, nth: usize) -> Result<Scratch> {
    let (tokens, element) = (args.tokens, plain("element", args.element)?);
    let columns = ThreadColumns::new(shape, 0, nth).y.len();
    let state = Scratch::lines::<f32>(tokens.saturating_mul(shape.state_width()));
    let operator = forward_columns_scratch::<E>(shape, tokens, columns, args.dropout > 0.0);
    Ok(state.and(part_scratch(element, tokens, columns)).and(operator))
}

/// Writes the floats of scratch that each of `nth` threads needs for a forward pass to `floats`. Of `args`, only tokens,
/// element and dropout are read. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_forward_scratch(
    layer: *const hydra_layer,
    args: *const hydra_forward_args,
    nth: usize,
    floats: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let (out, shape) = (Out::new("floats", floats)?, layer.shape()?);
        out.set(match plain("product_type", layer.product_type)? {
            Plain::F32 => forward_need::<f32>(&shape, args, nth)?.0,
            Plain::Bf16 => forward_need::<bf16>(&shape, args, nth)?.0,
        });
        Ok(())
    })
}

/// What thread `ith` of `nth` does of a forward pass. After all of them have returned, y and adapter_state are complete.
///
/// Each of the threads calls it once, with the same layer and args, at the same time or one after the other. Results have
/// the same bits for any number of threads. It allocates nothing, unless for an error's text, and starts no threads. All
/// memory is the caller's; what is written must not overlap with anything else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_forward(
    layer: *const hydra_layer,
    args: *const hydra_forward_args,
    thread: *const hydra_thread,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let thread = reference("thread", thread)?;
        let (element, product) = (plain("element", args.element)?, plain("product_type", layer.product_type)?);
        match (product, element) {
            (Plain::F32, Plain::F32) => forward::<f32, f32>(Isa::detect(), layer, args, thread),
            (Plain::F32, Plain::Bf16) => forward::<f32, bf16>(Isa::detect(), layer, args, thread),
            (Plain::Bf16, Plain::F32) => forward::<bf16, f32>(Bf16Isa::detect(), layer, args, thread),
            (Plain::Bf16, Plain::Bf16) => forward::<bf16, bf16>(Bf16Isa::detect(), layer, args, thread),
        }
    })
}

unsafe fn forward<E: Element, T: Float>(
    isa: E::Isa,
    raw: &hydra_layer,
    args: &hydra_forward_args,
    thread: &hydra_thread,
) -> Result<()>
where
    for<'a> &'a mut [T]: Into<ValuesMut<'a>>,
{
    // SAFETY: the caller's word.
    let (layer, element) = (unsafe { raw.read()? }, plain("element", args.element)?);
    let (shape, tokens) = (layer.shape(), args.tokens);
    args.check(raw, &shape, element, thread)?;
    // SAFETY: the caller's word.
    let (x, labels) = unsafe {
        let x = values("x", element, args.x, count(tokens, shape.d_in)?)?;
        (x, labels(&layer, args.labels, tokens)?)
    };
    let dropouts = dropouts(args.dropout, args.dropout_seed)?;
    let arguments = ForwardArgs { labels, dropouts, ..ForwardArgs::new(tokens, x) };
    let (columns, state_len) = (thread.columns(&shape)?.y, count(tokens, shape.state_width())?);
    // SAFETY: the caller's word.
    let mut workspace = unsafe { thread.workspace(forward_need::<E>(&shape, args, thread.nth)?)? };
    if columns.is_empty() && thread.ith > 0 {
        return Ok(());
    }
    let state = if thread.ith == 0 && !args.adapter_state.is_null() {
        // SAFETY: the caller's word; other threads don't use it.
        unsafe { slice_mut("adapter_state", args.adapter_state, state_len)? }
    } else {
        workspace.take_lines::<f32>(state_len)?
    };
    let y = Shared { data: args.y.cast::<T>(), rows: tokens, width: shape.d_out };
    // SAFETY: the caller's word; other threads have other columns.
    let mut part = unsafe { y.part("y", &columns, &mut workspace)? };
    forward_columns::<E>(isa, &layer, &arguments, columns.clone(), (part.get(), state), &mut workspace)?;
    if let Part::Apart(part) = part {
        // SAFETY: as for `part`.
        unsafe { y.put(&columns, part, |_, new| new) };
    }
    Ok(())
}

fn backward_need<E: Element>(shape: &HydraShape, args: &hydra_backward_args, nth: usize) -> Result<Scratch> {
    let (tokens, element) = (args.tokens, plain("element", args.element)?);
    let columns = ThreadColumns::new(shape, 0, nth).x.len();
    let parts = part_scratch(element, tokens, columns).and(part_scratch(Plain::F32, shape.stacked_rows(), columns));
    let dropping = args.dropout > 0.0 && shape.rank > 0;
    Ok(parts.and(backward_columns_scratch::<E>(shape, tokens, columns, dropping)))
}

/// Writes the floats of scratch that each of `nth` threads needs for a backward pass to `floats`. Of `args`, only tokens,
/// element and dropout are read. Any thread may call it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_backward_scratch(
    layer: *const hydra_layer,
    args: *const hydra_backward_args,
    nth: usize,
    floats: *mut usize,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let (out, shape) = (Out::new("floats", floats)?, layer.shape()?);
        out.set(match plain("product_type", layer.product_type)? {
            Plain::F32 => backward_need::<f32>(&shape, args, nth)?.0,
            Plain::Bf16 => backward_need::<bf16>(&shape, args, nth)?.0,
        });
        Ok(())
    })
}

/// What thread `ith` of `nth` does of a backward pass. After all of them have returned, dx, da and db are complete.
///
/// Otherwise as hydra_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_backward(
    layer: *const hydra_layer,
    args: *const hydra_backward_args,
    thread: *const hydra_thread,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let (layer, args) = (reference("layer", layer)?, reference("args", args)?);
        let thread = reference("thread", thread)?;
        let (element, product) = (plain("element", args.element)?, plain("product_type", layer.product_type)?);
        match (product, element) {
            (Plain::F32, Plain::F32) => backward::<f32, f32>(Isa::detect(), layer, args, thread),
            (Plain::F32, Plain::Bf16) => backward::<f32, bf16>(Isa::detect(), layer, args, thread),
            (Plain::Bf16, Plain::F32) => backward::<bf16, f32>(Bf16Isa::detect(), layer, args, thread),
            (Plain::Bf16, Plain::Bf16) => backward::<bf16, bf16>(Bf16Isa::detect(), layer, args, thread),
        }
    })
}

impl hydra_backward_args {
    /// # Safety
    /// Pointers are valid for reads of what the layer and `tokens` say.
    unsafe fn read<'a>(&self, layer: &HydraLayer<'_>, element: Plain) -> Result<BackwardArgs<'a>> {
        let (shape, tokens) = (layer.shape(), self.tokens);
        if !self.load_balance.is_finite() {
            return Err(invalid(format!("load_balance: expected a finite number, found {}", self.load_balance)));
        }
        // SAFETY: the caller's word.
        let (dy, x, labels) = unsafe {
            let dy = values("dy", element, self.dy, count(tokens, shape.d_out)?)?;
            let x = values("x", element, self.x, count(tokens, shape.d_in)?)?;
            (dy, x, labels(layer, self.labels, tokens)?)
        };
        let (dropouts, load_balance) = (dropouts(self.dropout, self.dropout_seed)?, self.load_balance);
        Ok(BackwardArgs { tokens, dy, x, labels, dropouts, load_balance })
    }

    /// An error unless what is written is apart from everything else.
    fn check(&self, raw: &hydra_layer, shape: &HydraShape, element: Plain, thread: &hydra_thread) -> Result<()> {
        if self.da.is_null() != self.db.is_null() {
            return Err(invalid("da and db: expected both or neither, found one that is null"));
        }
        let (x, y) = (count(self.tokens, shape.d_in)?, count(self.tokens, shape.d_out)?);
        let (da, db) = (count(shape.stacked_rows(), shape.d_in)?, count(shape.d_out, shape.mixed_width())?);
        let written = [
            Span::new("dx", self.dx, x * bytes(element)),
            Span::new("da", self.da, da * 4),
            Span::new("db", self.db, db * 4),
            thread.span(),
        ];
        let read = [
            Span::new("dy", self.dy, y * bytes(element)),
            Span::new("x", self.x, x * bytes(element)),
            Span::new("adapter_state", self.adapter_state, count(self.tokens, shape.state_width())? * 4),
            raw.label_span(self.labels, self.tokens)?,
        ];
        disjoint(&written, &read)?;
        disjoint(&written, &raw.spans())
    }
}

unsafe fn backward<E: Element, T: Float>(
    isa: E::Isa,
    raw: &hydra_layer,
    args: &hydra_backward_args,
    thread: &hydra_thread,
) -> Result<()>
where
    for<'a> &'a mut [T]: Into<ValuesMut<'a>>,
{
    // SAFETY: the caller's word.
    let (layer, element) = (unsafe { raw.read()? }, plain("element", args.element)?);
    let (shape, tokens, width) = (layer.shape(), args.tokens, layer.shape().mixed_width());
    args.check(raw, &shape, element, thread)?;
    // SAFETY: the caller's word.
    let (arguments, adapter_state) = unsafe {
        let state = slice("adapter_state", args.adapter_state, count(tokens, shape.state_width())?)?;
        (args.read(&layer, element)?, state)
    };
    let columns = thread.columns(&shape)?;
    // SAFETY: the caller's word.
    let mut workspace = unsafe { thread.workspace(backward_need::<E>(&shape, args, thread.nth)?)? };
    if columns.x.is_empty() && columns.y.is_empty() {
        return Ok(());
    }
    let dx = (!args.dx.is_null()).then(|| Shared { data: args.dx.cast::<T>(), rows: tokens, width: shape.d_in });
    let da = (layer.adapter.is_some() && !args.da.is_null()).then(|| Shared {
        data: args.da,
        rows: shape.stacked_rows(),
        width: shape.d_in,
    });
    let (mut dx_part, mut da_part, mut db) = (None, None, &mut [][..]);
    // SAFETY: the caller's word; other threads have other columns. Those of y are rows of B, which lie together.
    unsafe {
        if let Some(dx) = &dx {
            dx_part = Some(dx.part("dx", &columns.x, &mut workspace)?);
        }
        if let Some(da) = &da {
            da_part = Some(da.part("da", &columns.x, &mut workspace)?);
            db = slice_mut("db", args.db.wrapping_add(columns.y.start * width), columns.y.len() * width)?;
        }
    }
    if let Some(Part::Apart(part)) = &mut da_part {
        part.fill(0.0);
    }
    let gradients = ColumnGradients {
        dx: dx_part.as_mut().map(|part| part.get().into()),
        adapter: da_part.as_mut().map(|part| [part.get(), db]),
    };
    backward_columns::<E>(isa, &layer, &arguments, adapter_state, &columns, gradients, &mut workspace)?;
    if let (Some(dx), Some(Part::Apart(part))) = (&dx, dx_part) {
        // SAFETY: as for `part`.
        unsafe { dx.put(&columns.x, part, |_, new| new) };
    }
    if let (Some(da), Some(Part::Apart(part))) = (&da, da_part) {
        // SAFETY: as for `part`.
        unsafe { da.put(&columns.x, part, |old, new| old + new) };
    }
    Ok(())
}
