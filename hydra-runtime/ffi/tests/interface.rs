//! The C interface against the crates beneath it, as far as C programs don't show it.

use half::bf16;
use hydra::*;
use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::batch::Sequence;
use hydra_runtime::evaluate::Evaluator;
use hydra_runtime::generate::Sampling;
use hydra_runtime::hydra_kernels::hydra::{
    AdapterGradients, BackwardArgs, ForwardArgs, Gradients, HydraLayer, backward, backward_scratch, forward,
    forward_scratch,
};
use hydra_runtime::hydra_kernels::random::SplitMix64;
use hydra_runtime::hydra_kernels::{
    Accumulate, AdapterRef, Bf16Isa, Dropout, Dropouts, Element, Gate, HydraShape, Isa, Routing, Weight, Workspace,
};
use hydra_runtime::model::Model;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

/// Counts this thread's allocations.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's word.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        // SAFETY: the caller's word.
        unsafe { System.dealloc(data, layout) }
    }
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hydra").join(name)
}

fn c_path(path: impl AsRef<Path>) -> CString {
    CString::new(path.as_ref().to_str().unwrap()).unwrap()
}

#[track_caller]
fn done(status: hydra_status) {
    // SAFETY: a C string that lives until this thread's next error.
    let text = unsafe { CStr::from_ptr(hydra_last_error()) };
    assert_eq!(status, hydra_status::Ok, "{text:?}");
}

/// A model with its adapter, opened through the interface.
fn opened() -> (hydra_model, hydra_adapter) {
    let (mut model, mut adapter) = (0, 0);
    let options = hydra_model_options { threads: 2, ..hydra_model_options_default() };
    // SAFETY: paths and places to write to.
    unsafe {
        done(hydra_model_open(c_path(case("model")).as_ptr(), &options, &mut model));
        done(hydra_adapter_load(model, c_path(case("adapter")).as_ptr(), &mut adapter));
    }
    (model, adapter)
}

unsafe extern "C" fn collect(text: *const c_char, len: usize, user: *mut c_void) -> i32 {
    // SAFETY: `user` is the text that is collected; `text` is as the interface says.
    unsafe {
        assert_eq!(*text.add(len), 0);
        let piece = std::slice::from_raw_parts(text.cast::<u8>(), len);
        (*user.cast::<String>()).push_str(std::str::from_utf8(piece).unwrap());
    }
    0
}

#[test]
fn text_logits_and_steps_are_the_runtimes() {
    let (model, adapter) = opened();
    let own = Model::open(case("model")).unwrap();
    let attached = own.load_adapter(case("adapter")).unwrap();

    let prompt = "Name the capital";
    let mut options = hydra_generate_options { adapter, max_tokens: 24, ..hydra_generate_options_default() };
    (options.temperature, options.top_p, options.seed) = (0.9, 0.95, 7);
    (options.top_k, options.min_p, options.repetition_penalty) = (200, 0.001, 1.1);
    (options.presence_penalty, options.frequency_penalty) = (0.1, 0.2);
    let (mut text, mut result) = (String::new(), hydra_generation { tokens: 0, finish: -1 });
    let user = (&raw mut text).cast();
    // SAFETY: as the interface says.
    done(unsafe {
        hydra_generate(model, prompt.as_ptr().cast(), prompt.len(), &options, Some(collect), user, &mut result)
    });
    let penalties =
        Sampling { repetition_penalty: 1.1, presence_penalty: 0.1, frequency_penalty: 0.2, ..Sampling::default() };
    let sampling = Sampling { temperature: 0.9, top_k: 200, top_p: 0.95, min_p: 0.001, seed: 7, ..penalties };
    let want = own.generate(prompt).adapter(&attached).sampling(sampling).max_tokens(24);
    assert_eq!(text, want.text().unwrap());
    assert!(result.tokens > 0 && result.finish >= 0);

    let tokens = own.tokenizer().unwrap().encode_prompt(prompt).unwrap();
    let (mut generator, mut logits) = (0, vec![f32::NAN; own.config().vocab]);
    // SAFETY: as the interface says.
    unsafe {
        done(hydra_generator_new(model, adapter, 64, &mut generator));
        done(hydra_generator_feed(generator, tokens.as_ptr(), tokens.len(), logits.as_mut_ptr(), logits.len()));
    }
    let mut own_generator = hydra_runtime::generate::Generator::attached(&own, Some(&attached), 64).unwrap();
    assert_eq!(logits, own_generator.feed(&tokens).unwrap());
    // The model and the adapter may go before what was made of them.
    done(hydra_adapter_free(adapter));
    done(hydra_model_free(model));
    // SAFETY: as the interface says.
    done(unsafe { hydra_generator_feed(generator, tokens.as_ptr(), 1, null_mut(), 0) });
    done(hydra_generator_free(generator));
}

#[test]
fn a_new_adapter_is_the_runtimes() {
    let (model, given) = opened();
    let (own, mut made) = (Model::open(case("model")).unwrap(), 0);
    let (defaults, dir) = (hydra_adapter_options_default(), tempfile::tempdir().unwrap());
    let asked =
        hydra_adapter_options { head_dropout: 0.25, temperature: 0.5, top_k: 2, load_balance: 0.125, ..defaults };
    let config = AdapterConfig {
        head_dropout: 0.25,
        temperature: 0.5,
        top_k: Some(2),
        load_balance: 0.125,
        ..Default::default()
    };
    for (options, config) in [(defaults, AdapterConfig::default()), (asked, config)] {
        // SAFETY: as the interface says.
        unsafe {
            done(hydra_adapter_init(model, &options, 7, &mut made));
            done(hydra_adapter_save(made, c_path(dir.path()).as_ptr()));
        }
        assert_eq!(Adapter::load(dir.path(), own.config()).unwrap(), Adapter::init(own.config(), config, 7).unwrap());
        done(hydra_adapter_free(made));
    }
    done(hydra_adapter_free(given));
    done(hydra_model_free(model));
}

#[test]
fn a_head_alone_is_the_runtimes() {
    let (model, adapter) = opened();
    let (own, mut alone) = (Model::open(case("model")).unwrap(), 0);
    let head = Adapter::load(case("adapter"), own.config()).unwrap().head(1).unwrap();
    let (tokens, mut loss) = ([3, 5, 8, 13], hydra_loss { nll: 0.0, targets: 0 });
    let (data, len, lora_head) = (tokens.as_ptr(), tokens.len(), HYDRA_NO_LORA_HEAD);
    let sequence = hydra_sequence { tokens: data, targets: null(), len, prompt_len: 1, lora_head };
    // SAFETY: as the interface says.
    unsafe {
        done(hydra_adapter_head(adapter, 1, &mut alone));
        done(hydra_evaluate(model, alone, &sequence, 1, 8, &mut loss));
    }
    let evaluator = Evaluator::attached(&own, Some(&own.attach(&head).unwrap()), 8).unwrap();
    let want =
        evaluator.with_cancel(Default::default()).losses(&[Sequence::answer(&tokens[..1], &tokens[1..])]).unwrap();
    assert_eq!((loss.nll, loss.targets), (want[0].nll, want[0].targets));
    for handle in [adapter, alone] {
        done(hydra_adapter_free(handle));
    }
    done(hydra_model_free(model));
}

#[test]
fn a_model_in_memory_and_a_text_there_and_back() {
    let names = ["config.json", "model.safetensors", "tokenizer.json"].map(|name| CString::new(name).unwrap());
    let contents = names.each_ref().map(|name| std::fs::read(case("model").join(name.to_str().unwrap())).unwrap());
    let files: Vec<_> = names
        .iter()
        .zip(&contents)
        .map(|(name, bytes)| hydra_file { name: name.as_ptr(), bytes: bytes.as_ptr(), len: bytes.len() })
        .collect();
    let (mut model, text) = (0, "Tope or rope");
    let (mut tokens, mut count, mut bytes, mut len) = ([0u32; 64], 0, [1u8; 64], 0);
    // SAFETY: as the interface says.
    unsafe {
        done(hydra_model_open_files(files.as_ptr(), files.len(), null(), &mut model));
        drop((files, contents));
        let mut info = std::mem::zeroed();
        done(hydra_model_describe(model, &mut info));
        assert_eq!((info.vocab, info.layers, info.n_heads, info.kv_heads), (512, 2, 4, 2));
        done(hydra_tokenize(model, text.as_ptr().cast(), text.len(), 0, tokens.as_mut_ptr(), 64, &mut count));
        done(hydra_detokenize(model, tokens.as_ptr(), count, bytes.as_mut_ptr().cast(), 64, &mut len));
        let mut eos = 0;
        done(hydra_model_eos(model, &mut eos));
        assert_eq!(eos, 1);
        done(hydra_model_end_tokens(model, tokens.as_mut_ptr(), 64, &mut count));
        assert_eq!(tokens[..count], [1]);
    }
    assert_eq!(&bytes[..len], [text.as_bytes(), &[0]].concat());
    done(hydra_model_free(model));
}

#[test]
fn threads_share_models_and_take_turns_with_trainers() {
    let (model, adapter) = opened();
    let mut trainer = 0;
    // SAFETY: as the interface says.
    done(unsafe { hydra_trainer_new(model, adapter, null(), &mut trainer) });
    let tokens: Vec<u32> = (5..200).collect();
    let step = || {
        let (tokens, len) = (tokens.as_ptr(), tokens.len());
        let sequence = hydra_sequence { tokens, targets: null(), len, prompt_len: 1, lora_head: HYDRA_NO_LORA_HEAD };
        // SAFETY: as the interface says.
        unsafe { hydra_trainer_step(trainer, &sequence, 1, 1e-3, null_mut()) }
    };
    let statuses: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| (0..5).map(|_| step()).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(statuses.contains(&hydra_status::Ok));
    assert!(statuses.iter().all(|status| [hydra_status::Ok, hydra_status::Busy].contains(status)), "{statuses:?}");
    // A trainer that is freed while it works is there until the work is done.
    std::thread::scope(|scope| {
        let working = scope.spawn(|| (0..50).map(|_| step()).collect::<Vec<_>>());
        std::thread::sleep(std::time::Duration::from_millis(20));
        done(hydra_trainer_free(trainer));
        let statuses = working.join().unwrap();
        assert!(statuses.iter().all(|s| [hydra_status::Ok, hydra_status::InvalidHandle].contains(s)), "{statuses:?}");
    });
    done(hydra_adapter_free(adapter));
    done(hydra_model_free(model));
}

/// A layer and the inputs of both passes.
struct Problem {
    tokens: usize,
    shape: HydraShape,
    dropout: f32,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

const SCALE: f32 = 2.0;

/// y, adapter_state, dx, da, db.
type Results = [Vec<f32>; 5];

impl Problem {
    fn new(tokens: usize, dropout: f32) -> Self {
        let shape = HydraShape { d_in: 70, d_out: 133, rank: 3, lora_heads: 4, per_head_a: false, router: true };
        let mut random = SplitMix64::new(3);
        let mut values = |len: usize| -> Vec<f32> {
            (0..len).map(|_| (random.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
        };
        let (w, a) = (values(133 * 70), values(shape.stacked_rows() * 70));
        let (b, x, dy) = (values(133 * shape.mixed_width()), values(tokens * 70), values(tokens * 133));
        Self { tokens, shape, dropout, w, a, b, x, dy }
    }

    fn empty(&self) -> Results {
        let nan = |len: usize| vec![f32::NAN; len];
        let state = nan(self.tokens * self.shape.state_width());
        [nan(self.dy.len()), state, nan(self.x.len()), vec![1.0; self.a.len()], vec![1.0; self.b.len()]]
    }

    /// By one call of the kernels.
    fn kernels<E: Element>(&self, isa: E::Isa) -> Results {
        let gate = Gate::Router(Routing::default());
        let adapter = AdapterRef { shape: self.shape, a: &self.a, b: &self.b, scale: SCALE, gate };
        let layer = HydraLayer { weight: Weight::from_f32(133, 70, &self.w).unwrap(), adapter: Some(adapter) };
        let dropping = self.dropout > 0.0;
        let mask = dropping.then_some(Dropout { p: self.dropout, seed: 9, first_row: 0 });
        let dropouts = Dropouts { input: mask, mixed: None };
        let [mut y, mut state, mut dx, mut da, mut db] = self.empty();
        let need = forward_scratch::<E>(&self.shape, self.tokens, dropping);
        let need = need.or(backward_scratch::<E>(&self.shape, self.tokens, dropping));
        let mut memory = vec![0.0; need.0];
        let args = ForwardArgs { dropouts, ..ForwardArgs::new(self.tokens, &self.x[..]) };
        forward::<E>(isa, &layer, &args, &mut y[..], &mut state, &mut Workspace::new(&mut memory)).unwrap();
        let args = BackwardArgs { dropouts, ..BackwardArgs::new(self.tokens, &self.dy[..], &self.x[..]) };
        let gradients = Gradients {
            dx: Some(((&mut dx[..]).into(), Accumulate::Overwrite)),
            adapter: Some(AdapterGradients { da: &mut da, db: &mut db }),
        };
        backward::<E>(isa, &layer, &args, Some(&state), gradients, &mut Workspace::new(&mut memory)).unwrap();
        [y, state, dx, da, db]
    }

    /// Through the interface, on `nth` threads.
    fn interface(&self, product: hydra_type, nth: usize) -> Results {
        let [mut y, mut state, mut dx, mut da, mut db] = self.empty();
        let layer = hydra_layer {
            d_in: 70,
            d_out: 133,
            weight: self.w.as_ptr().cast(),
            weight_bytes: self.w.len() * 4,
            weight_type: hydra_type::F32 as i32,
            product_type: product as i32,
            rank: self.shape.rank,
            lora_heads: self.shape.lora_heads,
            per_head_a: 0,
            gate: hydra_gate::Router as i32,
            temperature: 1.0,
            top_k: 0,
            scale: SCALE,
            a: self.a.as_ptr(),
            a_len: self.a.len(),
            b: self.b.as_ptr(),
            b_len: self.b.len(),
        };
        let (x, element) = (self.x.as_ptr().cast(), hydra_type::F32 as i32);
        let forward = hydra_forward_args {
            tokens: self.tokens,
            element,
            x,
            y: y.as_mut_ptr().cast(),
            adapter_state: state.as_mut_ptr(),
            labels: null(),
            dropout: self.dropout,
            dropout_seed: 9,
        };
        let backward = hydra_backward_args {
            tokens: self.tokens,
            element,
            dy: self.dy.as_ptr().cast(),
            x,
            adapter_state: state.as_ptr(),
            dx: dx.as_mut_ptr().cast(),
            da: da.as_mut_ptr(),
            db: db.as_mut_ptr(),
            labels: null(),
            dropout: self.dropout,
            dropout_seed: 9,
            load_balance: 0.0,
        };
        let (shared, mut floats) = (&Shared(layer, forward, backward), [0; 2]);
        // SAFETY: as the interface says.
        unsafe {
            done(hydra_forward_scratch(&shared.0, &shared.1, nth, &mut floats[0]));
            done(hydra_backward_scratch(&shared.0, &shared.2, nth, &mut floats[1]));
        }
        for (pass, floats) in floats.into_iter().enumerate() {
            std::thread::scope(|scope| {
                (0..nth).for_each(|ith| drop(scope.spawn(move || shared.call(pass, ith, nth, floats))));
            });
        }
        [y, state, dx, da, db]
    }
}

/// What all threads of a call have.
struct Shared(hydra_layer, hydra_forward_args, hydra_backward_args);

// SAFETY: the interface says that threads may call it with the same arguments.
unsafe impl Sync for Shared {}

impl Shared {
    fn call(&self, pass: usize, ith: usize, nth: usize, scratch_len: usize) {
        let mut scratch = vec![f32::NAN; scratch_len];
        let thread = hydra_thread { ith, nth, scratch: scratch.as_mut_ptr(), scratch_len };
        let short = hydra_thread { scratch_len: scratch_len - 1, ..thread };
        // SAFETY: as the interface says.
        let call = |thread: &hydra_thread| unsafe {
            match pass {
                0 => hydra_forward(&self.0, &self.1, thread),
                _ => hydra_backward(&self.0, &self.2, thread),
            }
        };
        assert_eq!(call(&short), hydra_status::InvalidArgument);
        let before = ALLOCATIONS.with(Cell::get);
        let status = call(&thread);
        assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations");
        done(status);
    }
}

#[test]
fn the_operator_has_the_kernels_bits_on_any_number_of_threads_and_allocates_nothing() {
    let bits = |results: &Results| results.each_ref().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    for (tokens, dropout) in [(45, 0.0), (45, 0.2), (1, 0.0), (3, 0.0)] {
        let problem = Problem::new(tokens, dropout);
        let wants = [
            (hydra_type::F32, problem.kernels::<f32>(Isa::detect())),
            (hydra_type::Bf16, problem.kernels::<bf16>(Bf16Isa::detect())),
        ];
        for (product, want) in wants {
            for nth in [1, 2, 3, 8] {
                let got = problem.interface(product, nth);
                assert!(bits(&got) == bits(&want), "{tokens} tokens, dropout {dropout}, {nth} threads");
            }
        }
    }
}
