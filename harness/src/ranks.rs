//! Ranks: processes that `mpirun` or `srun` starts together, which share the work of `finetune` and `eval`.
//!
//! Every rank reads the options, the model and the data, and takes the same decisions. Rank 0 alone writes files and
//! prints. What may go wrong on one rank only is agreed upon before the next message ([`Ranks::agree`]); where that
//! isn't possible, in the middle of a step, the rank ends all.

#[cfg(feature = "mpi")]
mod mpi;

use crate::{interrupt, output, sha256};
#[cfg(not(feature = "mpi"))]
use anyhow::bail;
use anyhow::{Result, anyhow};
use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::communicator::{self, Alone, Communicator};
use hydra_runtime::model::Model;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Where launchers write the number of ranks: Open MPI; MPICH, Intel MPI and Slurm with PMI.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// Among the ranks of its machine: this one's number, and how many there are.
static ON_THIS_MACHINE: OnceLock<(usize, usize)> = OnceLock::new();

/// Among the ranks of this machine: this one's number, and how many there are.
pub fn on_this_machine() -> (usize, usize) {
    ON_THIS_MACHINE.get().copied().unwrap_or((0, 1))
}

/// This process among those that share its work.
pub struct Ranks {
    messages: Arc<dyn Communicator>,
    /// Ends all ranks.
    abort: fn(i32),
    /// Whether the error that ends this rank's part is known to every rank.
    agreed: AtomicBool,
}

/// An error that has been printed.
#[derive(Debug)]
pub struct Said(pub u8);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("see rank 0")
    }
}

impl std::error::Error for Said {}

/// What went wrong on a rank.
#[derive(Clone, Serialize, Deserialize)]
struct Failure {
    /// It was interrupted.
    stopped: bool,
    text: String,
}

/// Does `command` with the ranks that were started with this process, and ends them all if one of them fails.
pub fn share(command: impl FnOnce(&Ranks) -> Result<()>) -> Result<()> {
    let ranks = Ranks::join()?;
    let result = command(&ranks);
    ranks.leave(result)
}

impl Ranks {
    /// This process alone.
    pub fn alone() -> Self {
        Self { messages: Arc::new(Alone), abort: |_| {}, agreed: AtomicBool::new(false) }
    }

    /// The ranks of the `mpirun` or `srun` that started this process, if one did.
    #[cfg(feature = "mpi")]
    fn join() -> Result<Self> {
        let launched = SIZES.iter().chain(&["PMIX_RANK", "PMI_RANK"]).any(|name| std::env::var_os(name).is_some());
        if !launched {
            return Ok(Self::alone());
        }
        let (world, own) = mpi::World::join()?;
        let _ = ON_THIS_MACHINE.set(own);
        output::be_quiet(world.rank() > 0);
        Ok(Self { messages: Arc::new(world), abort: mpi::abort, agreed: AtomicBool::new(false) })
    }

    /// Fails if this process is one of several.
    #[cfg(not(feature = "mpi"))]
    fn join() -> Result<Self> {
        let size = |name| std::env::var(name).ok()?.parse::<usize>().ok();
        if let Some(ranks) = SIZES.into_iter().find_map(size).filter(|ranks| *ranks > 1) {
            bail!("started as one of {ranks} ranks, and this build has no MPI; build hydra with --features mpi");
        }
        Ok(Self::alone())
    }

    /// How a trainer speaks to the other ranks.
    pub fn messages(&self) -> Arc<dyn Communicator> {
        self.messages.clone()
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.messages.size()
    }

    /// Whether this is rank 0, which writes and prints.
    pub fn is_first(&self) -> bool {
        self.messages.rank() == 0
    }

    /// This rank's part of some items.
    pub fn share_of(&self, items: usize) -> Range<usize> {
        communicator::share(items, self.size(), self.messages.rank())
    }

    /// How many of `all` items are done where this rank has done `own`: the others are about as far.
    pub fn about_done(&self, own: usize, all: usize) -> usize {
        (own * self.size()).min(all)
    }

    /// Each rank's value, in the order of the ranks.
    fn exchange<T: Serialize + DeserializeOwned>(&self, own: T) -> Result<Vec<T>> {
        if self.size() == 1 {
            return Ok(vec![own]);
        }
        // An earlier error has not ended the work.
        self.agreed.store(false, Ordering::SeqCst);
        let text = serde_json::to_vec(&own)?;
        let mut lengths = vec![0; 8 * self.size()];
        self.messages.all_gather(&(text.len() as u64).to_le_bytes(), &mut lengths)?;
        let length = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize;
        let lengths: Vec<usize> = lengths.chunks(8).map(length).collect();
        let most = lengths.iter().copied().max().unwrap_or(0);
        let (mut padded, mut all) = (text, vec![0; most * self.size()]);
        padded.resize(most, 0);
        self.messages.all_gather(&padded, &mut all)?;
        let texts = all.chunks(most).zip(lengths);
        texts.map(|(text, len)| Ok(serde_json::from_slice(&text[..len])?)).collect()
    }

    /// This rank's value if every rank has one; else an error on every rank, its own or that of the first that failed.
    pub fn agree<T>(&self, result: Result<T>) -> Result<T> {
        if self.size() == 1 {
            return result;
        }
        let failure = result
            .as_ref()
            .err()
            .map(|error| Failure { stopped: error.is::<interrupt::Stopped>(), text: crate::chain(error) });
        let failures = self.exchange(failure)?.into_iter().enumerate();
        let failures: Vec<_> = failures.filter_map(|(rank, failure)| Some((rank, failure?))).collect();
        let Some((rank, failure)) = failures.iter().find(|(_, failure)| !failure.stopped).or(failures.first()) else {
            return result;
        };
        self.agreed.store(true, Ordering::SeqCst);
        match result {
            Err(error) if failure.stopped || !error.is::<interrupt::Stopped>() => Err(error),
            _ if failure.stopped => Err(interrupt::Stopped.into()),
            _ => Err(anyhow!("rank {rank}: {}", failure.text)),
        }
    }

    /// All items, of which each rank has its part, in the order of the ranks. An error of one is an error on every
    /// rank.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, own: Result<Vec<T>>) -> Result<Vec<T>> {
        Ok(self.exchange(self.agree(own)?)?.into_iter().flatten().collect())
    }

    /// What rank 0 makes. An error there is an error on every rank.
    pub fn by_first<T: Serialize + DeserializeOwned>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let own = self.agree(self.is_first().then(make).transpose())?;
        let made = self.exchange(own)?.swap_remove(0);
        made.ok_or_else(|| anyhow!("rank 0 sent nothing"))
    }

    /// Whether a flag is set on any rank.
    pub fn any(&self, flag: bool) -> Result<bool> {
        Ok(self.exchange(flag)?.contains(&true))
    }

    /// An error that every rank has at the same place, for what they compute is the same.
    pub fn common(&self, error: anyhow::Error) -> anyhow::Error {
        self.agreed.store(true, Ordering::SeqCst);
        error
    }

    /// Does something on rank 0 alone. An error there is an error on every rank.
    pub fn on_first(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.agree(if self.is_first() { work() } else { Ok(()) })
    }

    /// Fails, on every rank and naming the first difference, unless all ranks have the same facts: names with values.
    pub fn same(&self, facts: impl FnOnce() -> Result<Vec<(String, String)>>) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let all = self.exchange(self.agree(facts())?)?;
        for (rank, facts) in all.iter().enumerate() {
            let two = all[0].iter().zip(facts).find(|(first, own)| first != own);
            if let Some(((name, expected), (_, found))) = two {
                let [expected, found] = [expected, found].map(|value| output::printable(value));
                return Err(self.common(anyhow!(
                    "rank {rank} has another {name} than rank 0: expected {expected}, found {found}; \
                     give every rank the same options and files"
                )));
            }
        }
        Ok(())
    }

    /// Warns if ranks compute with different instructions or on different devices, so that bits depend on who computes
    /// what.
    pub fn warn_unless_alike<B: Backend>(&self, device: &B) -> Result<()> {
        // Without the number of threads, which changes no result.
        let description = device.describe();
        let kind = description.split(", ").filter(|part| !part.contains("thread")).collect::<Vec<_>>().join(", ");
        let kinds: BTreeSet<String> = self.exchange(kind)?.into_iter().collect();
        if kinds.len() > 1 {
            let kinds = kinds.into_iter().collect::<Vec<_>>().join("; ");
            output::warn(&format!("the ranks differ ({kinds}): results depend on their number and order"));
        }
        Ok(())
    }

    /// The model on `device`. Fails, on every rank, unless all have the same facts, which are its inputs.
    pub fn load<B: Backend>(
        &self,
        device: B,
        checkpoint: &Checkpoint,
        facts: impl FnOnce() -> Result<Vec<(String, String)>>,
    ) -> Result<Model<B>> {
        self.same(facts)?;
        self.warn_unless_alike(&device)?;
        self.agree(Model::load(device, checkpoint).map_err(Into::into))
    }

    /// Ends this rank's part. An error that the others don't know of ends them, too.
    fn leave(self, result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        if self.size() == 1 {
            return Err(error);
        }
        let code = crate::exit_code(&error);
        let agreed = self.agreed.load(Ordering::SeqCst);
        if !agreed {
            output::be_quiet(false);
            output::say(format_args!("error: rank {}: {}", self.messages.rank(), crate::line_of(&error)));
            (self.abort)(code.into());
        } else if !error.is::<interrupt::Stopped>() {
            // Before the ranks end: the launcher may end those that are late.
            output::say(format_args!("error: {}", crate::line_of(&error)));
        }
        Err(Said(code).into())
    }
}

/// A name and a value, for [`Ranks::same`].
pub fn fact(name: &str, value: impl ToString) -> (String, String) {
    (name.into(), value.to_string())
}

/// A digest of an adapter's configuration and values, for [`Ranks::same`].
pub fn digest_of(adapter: Option<&Adapter>) -> String {
    let Some(adapter) = adapter else { return "none".into() };
    let values: Vec<u8> = adapter.tensors().flat_map(|(_, _, values)| values).flat_map(f32::to_le_bytes).collect();
    sha256::of_parts([format!("{:?}", adapter.config).as_bytes(), &values])
}
