//! The targets of `harness/fuzz` on stable Rust: their corpora, and seeded mutations of these.
//!
//! `HYDRA_FUZZ_MUTATIONS` is the number of mutations for each target. An input that takes more than 10 seconds or 1 GiB ends
//! the process; it lies in the folder that is named then, as does one that panics.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use hydra_runtime::hydra_kernels::random::SplitMix64;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Mutations without `HYDRA_FUZZ_MUTATIONS`.
const MUTATIONS: u64 = 500;
const MOST_TIME: Duration = Duration::from_secs(10);
const MOST_MEMORY: isize = 1 << 30;
/// Inputs grow up to this length.
const LONGEST: usize = 1 << 14;

/// Counts what a thread has allocated.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static LIMITED: Cell<bool> = const { Cell::new(false) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn hold(bytes: isize) {
    let held = HELD.get().wrapping_add(bytes);
    HELD.set(held);
    if LIMITED.get() && held > MOST_MEMORY {
        LIMITED.set(false);
        eprintln!("{} MiB allocated", held >> 20);
        std::process::abort();
    }
}

// SAFETY: all is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        hold(layout.size() as isize);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        hold(layout.size() as isize);
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        hold(-(layout.size() as isize));
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        hold(size as isize - layout.size() as isize);
        // SAFETY: the caller's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// One target under test.
struct Run {
    name: &'static str,
    target: fn(&[u8]),
    /// Where the input lies that is being tried.
    current: PathBuf,
    /// When it was begun, in milliseconds since `began`; 0 between two.
    since: &'static AtomicU64,
    began: Instant,
}

impl Run {
    fn new(name: &str) -> Self {
        let &(name, target) = targets::TARGETS.iter().find(|(known, _)| *known == name).expect("a target");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        fs::create_dir_all(&folder).unwrap();
        let (current, began) = (folder.join(name), Instant::now());
        // It lives as long as the thread that watches it.
        let since: &'static AtomicU64 = Box::leak(Box::default());
        let watched = current.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(200));
                let begun = since.load(Ordering::SeqCst);
                if begun > 0 && began.elapsed() > Duration::from_millis(begun) + MOST_TIME {
                    eprintln!("{}: not done after {MOST_TIME:?}", watched.display());
                    std::process::abort();
                }
            }
        });
        Self { name, target, current, since, began }
    }

    fn try_one(&self, input: &[u8]) {
        // Before anything can end the process.
        fs::write(&self.current, input).unwrap();
        HELD.set(0);
        LIMITED.set(true);
        self.since.store(self.began.elapsed().as_millis() as u64 + 1, Ordering::SeqCst);
        let done = catch_unwind(AssertUnwindSafe(|| (self.target)(input)));
        self.since.store(0, Ordering::SeqCst);
        LIMITED.set(false);
        if done.is_err() {
            panic!("{} panicked on {}", self.name, self.current.display());
        }
    }

    /// The corpus, then mutations of it.
    fn all(&self) {
        let corpus = self.corpus();
        corpus.iter().for_each(|input| self.try_one(input));
        let words = self.dictionary();
        let mutations =
            std::env::var("HYDRA_FUZZ_MUTATIONS").map_or(MUTATIONS, |count| count.parse().expect("a number"));
        let mut random = Random(SplitMix64::new(
            self.name.bytes().fold(20, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into())),
        ));
        for _ in 0..mutations {
            let mut input = corpus[random.below(corpus.len())].clone();
            for _ in 0..1 << random.below(4) {
                mutate(&mut input, &corpus, &words, &mut random);
            }
            input.truncate(LONGEST);
            self.try_one(&input);
        }
        println!("{}: {} files and {mutations} mutations in {:.1?}", self.name, corpus.len(), self.began.elapsed());
    }

    fn corpus(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(self.name);
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty());
        files.iter().map(|file| fs::read(file).unwrap()).collect()
    }

    /// The words that libFuzzer would put in: the target's own, or JSON's.
    fn dictionary(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/dictionaries");
        let own = fs::read_to_string(folder.join(format!("{}.dict", self.name)));
        let text = own.unwrap_or_else(|_| fs::read_to_string(folder.join("json.dict")).unwrap());
        let quoted = text.lines().filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'));
        quoted.map(unescaped).collect()
    }
}

/// libFuzzer's escapes: `\\`, `\"` and `\xAB`.
fn unescaped(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).expect("two digits");
                bytes.push(u8::from_str_radix(digits, 16).expect("two digits"));
                tail
            }
            (b'\\', [escaped, tail @ ..]) => {
                bytes.push(*escaped);
                tail
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    bytes
}

struct Random(SplitMix64);

impl Random {
    /// A number from 0 to `limit` - 1; 0 if there is none.
    fn below(&mut self, limit: usize) -> usize {
        (self.0.next_u64() % limit.max(1) as u64) as usize
    }

    /// A short range of `length`.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let longest = if self.below(8) == 0 { length } else { 16 };
        start..(start + self.below(longest + 1)).min(length)
    }
}

/// Numbers at which something often changes.
const NUMBERS: [u64; 10] = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, u64::MAX];

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], words: &[Vec<u8>], random: &mut Random) {
    let length = input.len();
    let at = random.below(length + 1);
    match random.below(9) {
        0 if at < length => input[at] ^= 1 << random.below(8),
        1 if at < length => input[at] = random.below(256) as u8,
        2 => drop(input.drain(random.range(length))),
        3 => {
            let part = input[random.range(length)].to_vec();
            input.splice(at..at, part);
        }
        4 => {
            let other = &corpus[random.below(corpus.len())];
            let part = other[random.range(other.len())].to_vec();
            input.splice(random.range(length), part);
        }
        5 => {
            let bytes = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
            let end = (at + (1 << random.below(4))).min(length);
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        6 => {
            let digits = NUMBERS[random.below(NUMBERS.len())].to_string();
            let start = input[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
            let count = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            input.splice(start..start + count, digits.into_bytes());
        }
        _ => {
            let word = &words[random.below(words.len())];
            let end = if random.below(2) == 0 { at } else { (at + word.len()).min(length) };
            input.splice(at..end, word.iter().copied());
        }
    }
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            Run::new(stringify!($name)).all();
        })*

        #[test]
        fn every_target_has_a_test_and_a_binary() {
            assert_eq!([$(stringify!($name)),*], targets::TARGETS.map(|(name, _)| name));
            for (name, _) in targets::TARGETS {
                let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
                let binary = fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap();
                assert!(binary.contains(&format!("hydra_fuzz::{name}(bytes)")));
                assert!(fs::read_to_string(folder.join("Cargo.toml")).unwrap().contains(&format!("name = \"{name}\"")));
            }
        }
    };
}

tests!(safetensors gguf tokenizer adapter gguf_lora trainer_state jsonl compressed parquet csv mmlu toml template request);

#[test]
fn the_corpus_is_read_without_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = |target: &str, name: &str| {
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target).join(name)).unwrap()
    };
    for name in ["spm", "bpe"] {
        let checkpoint = hydra_runtime::checkpoint::Checkpoint::from_gguf(corpus("gguf", name)).unwrap();
        checkpoint.tokenizer().unwrap();
    }
    for (target, names) in [("safetensors", ["tiny", "tied", "llama3"].as_slice()), ("adapter", &["hydra", "lora"])] {
        for name in names {
            let bytes = corpus(target, name);
            let end = bytes.iter().position(|&byte| byte == 0).unwrap();
            let files = match target {
                "adapter" => ["adapter_config.json", "adapter_model.safetensors"],
                _ => ["config.json", "model.safetensors"],
            };
            fs::write(dir.path().join(files[0]), &bytes[..end]).unwrap();
            fs::write(dir.path().join(files[1]), &bytes[end + 1..]).unwrap();
            match target {
                "adapter" => drop(hydra_runtime::adapter::Adapter::open(dir.path()).unwrap()),
                _ => drop(hydra_runtime::checkpoint::Checkpoint::open(dir.path()).unwrap()),
            }
        }
    }
    for name in ["bpe", "spm", "unigram", "wordpiece"] {
        fs::write(dir.path().join("tokenizer.json"), corpus("tokenizer", name)).unwrap();
        let tokenizer = hydra_runtime::checkpoint::Checkpoint::open(dir.path()).unwrap().tokenizer().unwrap();
        assert!(!tokenizer.encode("ab").unwrap().is_empty(), "{name}");
        for template in ["chatml", "llama", "generation", "objects"] {
            let text = String::from_utf8(corpus("template", template)).unwrap();
            let chat = hydra_runtime::chat::ChatTemplate::new(&text, &tokenizer).unwrap();
            chat.prompt(&[hydra_runtime::chat::Message::user("a")]).unwrap();
        }
    }
    fs::write(dir.path().join("data"), corpus("jsonl", "dolly")).unwrap();
    assert_eq!(hydra_harness::fuzz::records(&dir.path().join("data")).unwrap(), 3);
    for (target, name, records) in [
        ("jsonl", "messages", 2),
        ("jsonl", "conversations", 2),
        ("jsonl", "text", 2),
        ("compressed", "gzip", 2),
        ("compressed", "zstd", 4),
        ("parquet", "messages", 3),
        ("parquet", "gzip", 3),
        ("parquet", "columns", 60),
        ("parquet", "zstd", 60),
        ("parquet", "zstd_2", 3),
    ] {
        fs::write(dir.path().join("data"), corpus(target, name)).unwrap();
        assert_eq!(hydra_harness::fuzz::records(&dir.path().join("data")).unwrap(), records, "{target} {name}");
    }
    for (name, file) in [("dolly", "data.csv"), ("messages", "data.csv"), ("tabs", "data.tsv")] {
        fs::write(dir.path().join(file), corpus("csv", name)).unwrap();
        let records = hydra_harness::fuzz::records(&dir.path().join(file)).unwrap();
        assert_eq!(records, if name == "messages" { 1 } else { 2 }, "{name}");
    }
    fs::write(dir.path().join("lines"), corpus("mmlu", "lines")).unwrap();
    assert_eq!(hydra_harness::fuzz::questions(&dir.path().join("lines")).unwrap(), 1);
    for split in ["test", "dev"] {
        fs::create_dir(dir.path().join(split)).unwrap();
        fs::write(dir.path().join(format!("{split}/physics_{split}.csv")), corpus("mmlu", "csv")).unwrap();
    }
    assert_eq!(hydra_harness::fuzz::questions(dir.path()).unwrap(), 1);
    fs::write(dir.path().join("e.toml"), corpus("toml", "experiment")).unwrap();
    assert_eq!(hydra_harness::fuzz::experiment(&dir.path().join("e.toml")).unwrap(), 2);
    fs::write(dir.path().join("o.toml"), corpus("toml", "options")).unwrap();
    assert!(!hydra_harness::fuzz::options(&dir.path().join("o.toml")).unwrap().is_empty());
    assert_eq!(hydra_harness::fuzz::request(&corpus("request", "completion")), [true, false]);
    assert_eq!(hydra_harness::fuzz::request(&corpus("request", "chat")), [false, true]);
}
