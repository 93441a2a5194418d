//! Training on several ranks has the bits of training on one, whatever their number and that of their threads; a run
//! may go on with another number of them.

use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::backend::cpu::{Cpu, CpuOptions, Precision};
use hydra_runtime::batch::{NO_TARGET, Sequence};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::communicator::Communicator;
use hydra_runtime::model::Model;
use hydra_runtime::projection::Projection;
use hydra_runtime::train::{STATE_FILE, StepReport, TrainOptions, Trainer};
use hydra_runtime::{Error, Result};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// A rank that is a thread of this process.
struct Thread {
    rank: usize,
    /// To each rank.
    to: Vec<Sender<Vec<u8>>>,
    /// From each rank.
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        self.to[to].send(bytes.into()).map_err(|_| Error::Invalid(format!("rank {to} has ended")))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let message = self.from[from].lock().unwrap().recv();
        bytes.copy_from_slice(&message.map_err(|_| Error::Invalid(format!("rank {from} has ended")))?);
        Ok(())
    }
}

/// Ranks that can send to each other.
fn connected(size: usize) -> Vec<Arc<Thread>> {
    let mut ranks: Vec<_> = (0..size).map(|rank| Thread { rank, to: Vec::new(), from: Vec::new() }).collect();
    for from in 0..size {
        for to in 0..size {
            let (sender, receiver) = channel();
            ranks[from].to.push(sender);
            ranks[to].from.push(Mutex::new(receiver));
        }
    }
    ranks.into_iter().map(Arc::new).collect()
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model")).unwrap()
}

fn sequence(len: usize, seed: u32) -> Sequence {
    let tokens: Vec<u32> = (0..len as u32).map(|i| (i * 131 + seed * 977 + i * i * 7) % 512).collect();
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    Sequence { tokens, targets, lora_head: None }
}

/// A step's sequences: this many passes of at most [`PASS`] tokens, the last one short.
fn step(passes: usize, seed: u32) -> Vec<Sequence> {
    let long = (0..passes as u32 - 1).map(|i| sequence(35 + (i as usize * 7 + seed as usize) % 25, seed + i));
    long.chain([sequence(34, seed + 99)]).collect()
}

/// Less than any two sequences have together.
const PASS: usize = 60;

/// One process of a run: `dir` is where rank 0 keeps the state.
fn work(ranks: Arc<Thread>, threads: usize, precision: Precision, steps: &[usize], dir: &Path) -> Vec<StepReport> {
    let options = CpuOptions { threads: Some(threads), precision, ..CpuOptions::default() };
    let model = Model::load(Cpu::new(options).unwrap(), &checkpoint()).unwrap();
    let config = AdapterConfig {
        rank: 3,
        lora_heads: 2,
        dropout: 0.1,
        load_balance: 0.1,
        targets: Projection::ALL.to_vec(),
        ..AdapterConfig::default()
    };
    let adapter = Adapter::init(model.config(), config, 5).unwrap();
    let options = TrainOptions { max_tokens: PASS, ..TrainOptions::default() };
    let mut trainer = Trainer::new(&model, &adapter, options).unwrap().with_ranks(ranks.clone());
    if ranks.rank() == 0 && dir.join(STATE_FILE).exists() {
        trainer.load_state(dir).unwrap();
    }
    trainer.share_state().unwrap();
    let first = trainer.steps() as usize;
    let reports = steps.iter().zip(first..).map(|(&passes, s)| trainer.step(&step(passes, s as u32), 1e-2).unwrap());
    let reports = reports.collect();
    // Each has the whole state.
    let own = tempfile::tempdir().unwrap();
    trainer.save_state(own.path()).unwrap();
    let state = std::fs::read(own.path().join(STATE_FILE)).unwrap();
    let mut others = vec![0; state.len() * ranks.size()];
    ranks.all_gather(&state, &mut others).unwrap();
    assert!(others.chunks(state.len()).all(|other| other == state));
    if ranks.rank() == 0 {
        trainer.save_state(dir).unwrap();
    }
    reports
}

/// The reports of some steps, of this many passes each, on this many ranks, from the state in `dir`, and the bits of
/// the state after them, which is then there.
fn run(ranks: usize, threads: usize, precision: Precision, steps: &[usize], dir: &Path) -> (Vec<StepReport>, Vec<u8>) {
    let reports = std::thread::scope(|scope| {
        let running: Vec<_> = connected(ranks)
            .into_iter()
            .map(|rank| scope.spawn(move || work(rank, threads, precision, steps, dir)))
            .collect();
        let mut reports: Vec<_> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
        let first = reports.remove(0);
        assert!(reports.into_iter().all(|other| other == first), "each rank has the same results");
        first
    });
    (reports, std::fs::read(dir.join(STATE_FILE)).unwrap())
}

#[test]
fn any_number_of_ranks_gives_the_same_bits() {
    const STEPS: [usize; 5] = [8, 1, 7, 3, 5];
    for precision in [Precision::F32, Precision::Bf16] {
        let new =
            |ranks: usize, threads: usize| run(ranks, threads, precision, &STEPS, tempfile::tempdir().unwrap().path());
        let (reports, state) = new(1, 1);
        assert!(reports.windows(2).any(|two| two[0].loss != two[1].loss));
        for (ranks, threads) in [(1, 3), (2, 1), (3, 1), (4, 2), (5, 1), (8, 1)] {
            let (others, other) = new(ranks, threads);
            assert_eq!(others, reports, "{precision:?}, {ranks} ranks");
            assert!(other == state, "{precision:?}, {ranks} ranks: another state");
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    const STEPS: [usize; 4] = [4, 6, 3, 8];
    let whole = tempfile::tempdir().unwrap();
    let (reports, state) = run(1, 1, Precision::F32, &STEPS, whole.path());
    let parts = tempfile::tempdir().unwrap();
    let (first, _) = run(2, 1, Precision::F32, &STEPS[..1], parts.path());
    let (second, _) = run(3, 1, Precision::F32, &STEPS[1..3], parts.path());
    let (third, resumed) = run(1, 2, Precision::F32, &STEPS[3..], parts.path());
    assert_eq!([first, second, third].concat(), reports);
    assert!(resumed == state);
}

#[test]
fn steps_that_can_not_be_taken_fail_on_every_rank() {
    let fails = |ranks: Arc<Thread>| {
        let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let model = Model::load(Cpu::new(options).unwrap(), &checkpoint()).unwrap();
        let adapter = Adapter::init(model.config(), AdapterConfig::default(), 5).unwrap();
        let options = TrainOptions { max_tokens: PASS, ..TrainOptions::default() };
        let mut trainer = Trainer::new(&model, &adapter, options).unwrap().with_ranks(ranks);
        assert!(matches!(trainer.step(&[sequence(PASS + 1, 1)], 1e-2), Err(Error::SequenceTooLong { .. })));
        trainer.step(&step(3, 1), 1e-3).unwrap();
        let error = trainer.step(&step(3, 2), 1e38).and_then(|_| trainer.step(&step(3, 3), 1e-3)).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert_eq!(trainer.steps(), 1, "the step that led there is undone");
        error.to_string()
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = connected(3).into_iter().map(|rank| scope.spawn(move || fails(rank))).collect();
        let errors: Vec<_> = running.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    });
}
