//! The operator on arrays, which `hydra.torch` calls: libhydra's `hydra_forward` and `hydra_backward`, one call a thread.
//!
//! Arrays are contiguous; their memory is used in place. bf16 values come as u16, for NumPy has no such type.

use crate::error::{Whole, wrong};
use hydra::{
    HYDRA_NO_LORA_HEAD, hydra_backward, hydra_backward_args, hydra_backward_scratch, hydra_forward, hydra_forward_args,
    hydra_forward_scratch, hydra_gate, hydra_last_error, hydra_layer, hydra_status, hydra_thread, hydra_type,
};
use numpy::{Element, PyArrayDyn, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};

/// An adapted linear layer's sizes and gate. The matrices are given with each call.
#[pyclass(module = "hydra._hydra", frozen)]
pub struct Layer {
    d_in: usize,
    d_out: usize,
    rank: usize,
    lora_heads: usize,
    per_head_a: bool,
    gate: hydra_gate,
    temperature: f32,
    top_k: usize,
    scale: f32,
    /// Weights of 16 bits are f16, and not bf16.
    f16: bool,
    /// Products are of bf16.
    bf16: bool,
    threads: usize,
}

/// What `Layer` is given, as a dictionary.
#[derive(FromPyObject)]
struct Settings {
    #[pyo3(item)]
    d_in: Whole<usize>,
    #[pyo3(item)]
    d_out: Whole<usize>,
    #[pyo3(item)]
    rank: Whole<usize>,
    #[pyo3(item)]
    lora_heads: Whole<usize>,
    #[pyo3(item)]
    per_head_a: bool,
    #[pyo3(item)]
    gate: String,
    #[pyo3(item)]
    temperature: f32,
    #[pyo3(item)]
    top_k: Option<Whole<usize>>,
    #[pyo3(item)]
    scale: f32,
    #[pyo3(item)]
    f16: bool,
    #[pyo3(item)]
    bf16: bool,
    #[pyo3(item)]
    threads: Whole<usize>,
}

/// Values that are read: f32, or the bits of bf16 (u16).
#[derive(FromPyObject)]
enum Values<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

/// Values that are written.
#[derive(FromPyObject)]
enum ValuesMut<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    Bf16(PyReadwriteArrayDyn<'py, u16>),
}

/// The parameters: W (the bits of f16 if the layer says so), \[A; R\], B.
type Parameters<'py> = (Values<'py>, PyReadonlyArrayDyn<'py, f32>, PyReadonlyArrayDyn<'py, f32>);

/// Dropout on A's input: probability and seed.
type Mask = (f32, u64);

/// An error unless the array's memory is its values in order, row by row, and at addresses of their type: NumPy has others.
fn contiguous<T: Element>(what: &str, array: &Bound<'_, PyArrayDyn<T>>) -> PyResult<()> {
    match (array.is_c_contiguous(), array.is_aligned()) {
        (true, true) => Ok(()),
        (false, _) => Err(wrong(format!("{what}: expected a contiguous array in C's order"))),
        (true, false) => Err(wrong(format!("{what}: expected an aligned array"))),
    }
}

/// The memory of an array of exactly `len` values.
fn read<'a, T: Element>(what: &str, array: &'a PyReadonlyArrayDyn<'_, T>, len: usize) -> PyResult<&'a [T]> {
    contiguous(what, array)?;
    let values = array.as_slice()?;
    length(what, values.len(), len)?;
    Ok(values)
}

fn write<'a, T: Element>(what: &str, array: &'a mut PyReadwriteArrayDyn<'_, T>, len: usize) -> PyResult<&'a mut [T]> {
    contiguous(what, array)?;
    let values = array.as_slice_mut()?;
    length(what, values.len(), len)?;
    Ok(values)
}

fn length(what: &str, found: usize, expected: usize) -> PyResult<()> {
    if found == expected { Ok(()) } else { Err(wrong(format!("{what}: expected {expected} values, found {found}"))) }
}

impl Values<'_> {
    fn get(&self, what: &str, len: usize) -> PyResult<(*const c_void, hydra_type)> {
        Ok(match self {
            Self::F32(array) => (read(what, array, len)?.as_ptr().cast(), hydra_type::F32),
            Self::Bf16(array) => (read(what, array, len)?.as_ptr().cast(), hydra_type::Bf16),
        })
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(array) => array.len(),
            Self::Bf16(array) => array.len(),
        }
    }
}

impl ValuesMut<'_> {
    /// The memory, of the type `element`.
    fn get(&mut self, what: &str, len: usize, element: hydra_type) -> PyResult<*mut c_void> {
        let (data, own): (*mut c_void, _) = match self {
            Self::F32(array) => (write(what, array, len)?.as_mut_ptr().cast(), hydra_type::F32),
            Self::Bf16(array) => (write(what, array, len)?.as_mut_ptr().cast(), hydra_type::Bf16),
        };
        if own as i32 == element as i32 { Ok(data) } else { Err(wrong(format!("{what}: expected the type of x"))) }
    }
}

/// One pass with its arguments, which its threads share.
struct Pass {
    layer: hydra_layer,
    args: Args,
}

enum Args {
    Forward(hydra_forward_args),
    Backward(hydra_backward_args),
}

// SAFETY: the operator's threads may share its arguments: each writes columns of its own. The arrays are borrowed until the
// pass ends.
unsafe impl Sync for Pass {}

impl Pass {
    /// Runs on `threads` threads; the text says what was wrong.
    fn run(&self, threads: usize) -> Result<(), String> {
        let mut floats = 0;
        // SAFETY: the arguments live in `self`.
        let status = unsafe {
            match &self.args {
                Args::Forward(args) => hydra_forward_scratch(&self.layer, args, threads, &mut floats),
                Args::Backward(args) => hydra_backward_scratch(&self.layer, args, threads, &mut floats),
            }
        };
        outcome(status)?;
        std::thread::scope(|scope| {
            let work = |ith| move || self.share(ith, threads, floats);
            let others: Vec<_> = (1..threads).map(|ith| scope.spawn(work(ith))).collect();
            let own = work(0)();
            let joined = others.into_iter().map(|other| other.join().unwrap_or(Err("a thread panicked".into())));
            joined.fold(own, Result::and)
        })
    }

    fn share(&self, ith: usize, nth: usize, scratch_len: usize) -> Result<(), String> {
        let mut scratch: Vec<f32> = Vec::new();
        let failed = |_| format!("no memory for {scratch_len} floats");
        scratch.try_reserve_exact(scratch_len).map_err(failed)?;
        // Zeroed by the system where it is new; its content doesn't matter.
        scratch.resize(scratch_len, 0.0);
        let thread = hydra_thread { ith, nth, scratch: scratch.as_mut_ptr(), scratch_len };
        // SAFETY: arrays of the lengths that the layer and the tokens say, checked by `Layer`; scratch of this thread.
        outcome(unsafe {
            match &self.args {
                Args::Forward(args) => hydra_forward(&self.layer, args, &thread),
                Args::Backward(args) => hydra_backward(&self.layer, args, &thread),
            }
        })
    }
}

fn outcome(status: hydra_status) -> Result<(), String> {
    if status == hydra_status::Ok {
        return Ok(());
    }
    // SAFETY: a C string that lives until this thread's next error.
    Err(unsafe { CStr::from_ptr(hydra_last_error()) }.to_string_lossy().into_owned())
}

impl Layer {
    fn a_rows(&self) -> usize {
        if self.per_head_a { self.lora_heads * self.rank } else { self.rank }
    }

    fn stacked_rows(&self) -> usize {
        self.a_rows() + if matches!(self.gate, hydra_gate::Router) { self.lora_heads } else { 0 }
    }

    fn a_len(&self) -> usize {
        self.stacked_rows() * self.d_in
    }

    fn b_len(&self) -> usize {
        self.d_out * self.lora_heads * self.rank
    }

    fn layer(&self, (weight, a, b): &Parameters<'_>) -> PyResult<hydra_layer> {
        let len = self.d_out * self.d_in;
        let (data, found) = weight.get("weight", len)?;
        let (weight_type, weight_bytes) = match (found, self.f16) {
            (hydra_type::F32, _) => (hydra_type::F32, 4 * len),
            (_, true) => (hydra_type::F16, 2 * len),
            (_, false) => (hydra_type::Bf16, 2 * len),
        };
        let (a, b) = (read("a", a, self.a_len())?, read("b", b, self.b_len())?);
        Ok(hydra_layer {
            d_in: self.d_in,
            d_out: self.d_out,
            weight: data,
            weight_bytes,
            weight_type: weight_type as i32,
            product_type: if self.bf16 { hydra_type::Bf16 } else { hydra_type::F32 } as i32,
            rank: self.rank,
            lora_heads: self.lora_heads,
            per_head_a: self.per_head_a.into(),
            gate: self.gate as i32,
            temperature: self.temperature,
            top_k: self.top_k,
            scale: self.scale,
            a: a.as_ptr(),
            a_len: a.len(),
            b: b.as_ptr(),
            b_len: b.len(),
        })
    }

    fn tokens(&self, x: &Values<'_>) -> PyResult<usize> {
        match x.len() {
            0 => Ok(0),
            len if self.d_in > 0 && len.is_multiple_of(self.d_in) => Ok(len / self.d_in),
            len => Err(wrong(format!("x: expected rows of {} values, found {len} values", self.d_in))),
        }
    }

    /// More threads than a pass is worth only cost time: a thread takes about as long to start as 2^20 products.
    fn threads(&self, tokens: usize) -> usize {
        let products = tokens.saturating_mul(self.d_in).saturating_mul(self.d_out);
        self.threads.min((products >> 20) + 1)
    }
}

fn labels(labels: Option<&PyReadonlyArrayDyn<'_, u32>>, tokens: usize) -> PyResult<*const u32> {
    labels.map_or(Ok(null()), |labels| Ok(read::<u32>("labels", labels, tokens)?.as_ptr()))
}

#[pymethods]
impl Layer {
    /// The label of a token without one.
    #[classattr]
    const NO_LORA_HEAD: u32 = HYDRA_NO_LORA_HEAD;

    #[new]
    fn new(settings: Settings) -> PyResult<Self> {
        let gate = match settings.gate.as_str() {
            "router" => hydra_gate::Router,
            "label" => hydra_gate::Label,
            "uniform" => hydra_gate::Uniform,
            "one" => hydra_gate::One,
            other => {
                let expected = "\"router\", \"label\", \"uniform\" or \"one\"";
                return Err(wrong(format!("gate {other:?}: expected {expected}")));
            }
        };
        // Such sizes are mistakes, and below them no product of two overflows.
        let (d_in, d_out) = (settings.d_in.get("d_in")?, settings.d_out.get("d_out")?);
        let (rank, lora_heads) = (settings.rank.get("rank")?, settings.lora_heads.get("lora_heads")?);
        if [d_in, d_out, rank, lora_heads].iter().any(|size| !(1..1 << 28).contains(size)) {
            return Err(wrong(format!("sizes {d_in}, {d_out}, {rank}, {lora_heads}: expected 1 to {}", (1 << 28) - 1)));
        }
        Ok(Self {
            d_in,
            d_out,
            rank,
            lora_heads,
            per_head_a: settings.per_head_a,
            gate,
            temperature: settings.temperature,
            // The C interface's 0 means all heads.
            top_k: match settings.top_k.map(|top_k| top_k.get("top_k")).transpose()? {
                Some(0) => return Err(wrong("top_k 0: expected at least 1, or None for all heads".into())),
                top_k => top_k.unwrap_or(0),
            },
            scale: settings.scale,
            f16: settings.f16,
            bf16: settings.bf16,
            threads: settings.threads.get("threads")?.max(1),
        })
    }

    /// Columns of the adapter's state.
    #[getter]
    fn state_width(&self) -> usize {
        self.a_rows() + self.lora_heads
    }

    fn forward(
        &self,
        py: Python<'_>,
        x: Values<'_>,
        parameters: Parameters<'_>,
        outputs: (ValuesMut<'_>, Option<PyReadwriteArrayDyn<'_, f32>>),
        labels: Option<PyReadonlyArrayDyn<'_, u32>>,
        dropout: Mask,
    ) -> PyResult<()> {
        let ((mut y, mut state), (dropout, dropout_seed)) = (outputs, dropout);
        let (layer, tokens) = (self.layer(&parameters)?, self.tokens(&x)?);
        let (x, element) = x.get("x", tokens * self.d_in)?;
        let state_len = tokens * self.state_width();
        let adapter_state = match &mut state {
            Some(state) => write("state", state, state_len)?.as_mut_ptr(),
            None => null_mut(),
        };
        let args = Args::Forward(hydra_forward_args {
            tokens,
            element: element as i32,
            x,
            y: y.get("y", tokens * self.d_out, element)?,
            adapter_state,
            labels: self::labels(labels.as_ref(), tokens)?,
            dropout,
            dropout_seed,
        });
        let (pass, threads) = (Pass { layer, args }, self.threads(tokens));
        let pass = &pass;
        py.detach(move || pass.run(threads)).map_err(wrong)
    }

    fn backward(
        &self,
        py: Python<'_>,
        inputs: (Values<'_>, Values<'_>, PyReadonlyArrayDyn<'_, f32>),
        parameters: Parameters<'_>,
        gradients: (Option<ValuesMut<'_>>, Option<[PyReadwriteArrayDyn<'_, f32>; 2]>),
        labels: Option<PyReadonlyArrayDyn<'_, u32>>,
        dropout: Mask,
    ) -> PyResult<()> {
        let ((dy, x, state), (mut dx, mut d_adapter), (dropout, dropout_seed)) = (inputs, gradients, dropout);
        let (layer, tokens) = (self.layer(&parameters)?, self.tokens(&x)?);
        let (x, element) = x.get("x", tokens * self.d_in)?;
        let (dy, dy_element) = dy.get("dy", tokens * self.d_out)?;
        if dy_element as i32 != element as i32 {
            return Err(wrong("dy: expected the type of x".into()));
        }
        let dx = match &mut dx {
            Some(dx) => dx.get("dx", tokens * self.d_in, element)?,
            None => null_mut(),
        };
        let [da, db] = match &mut d_adapter {
            Some([da, db]) => {
                [write("da", da, self.a_len())?.as_mut_ptr(), write("db", db, self.b_len())?.as_mut_ptr()]
            }
            None => [null_mut(); 2],
        };
        let args = Args::Backward(hydra_backward_args {
            tokens,
            element: element as i32,
            dy,
            x,
            adapter_state: read("state", &state, tokens * self.state_width())?.as_ptr(),
            dx,
            da,
            db,
            labels: self::labels(labels.as_ref(), tokens)?,
            dropout,
            dropout_seed,
            load_balance: 0.0,
        });
        let (pass, threads) = (Pass { layer, args }, self.threads(tokens));
        let pass = &pass;
        py.detach(move || pass.run(threads)).map_err(wrong)
    }
}
