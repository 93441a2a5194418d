//! Every run of a comparison with every seed: what is kept is taken over, the rest is trained.

use crate::experiment::kept::{self, Finished, Task};
use crate::experiment::plan::{Plan, Run};
use crate::experiment::share::{self, Attempt, ShareArgs};
use crate::experiment::stage::{Corpus, Stage};
use crate::experiment::tune::{self, Parts, Tuned};
use crate::options::NonNegative;
use crate::run::spec::RunSpec;
use crate::{interrupt, output};
use anyhow::Result;
use hydra_runtime::backend::Backend;
use std::path::{Path, PathBuf};

/// The comparison's files and folder.
pub struct Inputs<'a> {
    /// Runs and seeds.
    pub plan: &'a Plan,
    /// The training records.
    pub data: &'a Corpus,
    /// The eval set.
    pub eval_data: &'a Corpus,
    /// The folder.
    pub out: &'a Path,
}

/// Everything that was found.
pub struct Results {
    /// The model without an adapter.
    pub base: Finished,
    /// The learning-rate trials, by run.
    pub tuned: Vec<Option<Tuned>>,
    /// By run and seed.
    pub runs: Vec<Vec<Finished>>,
}

impl<'a> Inputs<'a> {
    /// A run with one seed.
    pub fn task(&self, run: &'a Run, spec: RunSpec, seed: u64) -> Task<'a> {
        let dir = self.out.join("runs").join(&run.folder).join(format!("seed-{seed}"));
        Task { spec, seed, data: self.data, eval_data: self.eval_data, ask: true, dir }
    }

    /// Reads the training records and parts them, where rates are to be chosen; [`Parts::write`] writes the parts.
    pub fn parts(&self) -> Result<Option<Parts>> {
        let split = |tune| tune::split(tune, &self.data.paths, &self.tune_dir());
        self.plan.tune.as_ref().map(split).transpose()
    }

    /// Refuses results of other options before anything is changed or added to those that are there.
    pub fn check_kept<B: Backend>(&self, stage: &Stage<'_, B>, parts: Option<&Parts>) -> Result<()> {
        for (run, trials) in self.plan.runs.iter().zip(&self.trials(parts)) {
            for (_, trial) in trials {
                trial.kept(stage)?;
            }
            for &seed in self.plan.seeds.iter().filter(|_| trials.is_empty()) {
                self.task(run, run.spec.clone(), seed).kept(stage)?;
            }
        }
        kept::kept_base(stage, self.eval_data, &self.plan.runs[0].spec, &self.base_dir()).map(drop)
    }

    /// Does what is left to do; an interrupt is the error [`interrupt::Stopped`].
    pub fn results<B: Backend>(&self, stage: &Stage<'_, B>, parts: Option<&Parts>) -> Result<Results> {
        let trials = self.trials(parts);
        let base = self.base(stage)?;
        interrupt::check()?;
        let mut tuned = Vec::new();
        for (run, trials) in self.plan.runs.iter().zip(&trials) {
            tuned.push(if trials.is_empty() { None } else { Some(tune::choose(stage, run, trials)?) });
        }
        let runs = self.train(stage, &tuned)?;
        Ok(Results { base, tuned, runs })
    }

    /// Does a part of it, beside other processes; an interrupt is the error [`interrupt::Stopped`].
    pub fn work<B: Backend>(&self, stage: &Stage<'_, B>, parts: Option<&Parts>, share: ShareArgs) -> Result<()> {
        let trials = self.trials(parts);
        let Plan { runs, seeds, .. } = self.plan;
        // The model alone comes first, then the runs with all their seeds.
        share.work(1 + runs.len() * seeds.len(), |place| {
            let Some(place) = place.checked_sub(1) else { return share::attempt(self.base(stage)) };
            let (run, seed) = (&runs[place / seeds.len()], seeds[place % seeds.len()]);
            let trials = &trials[place / seeds.len()];
            // Each trial that is free is done here, though it is of use to other seeds, too.
            for (_, trial) in trials {
                if trial.kept(stage)?.is_none() {
                    output::say(format_args!(
                        "\n{}: trying lr {:e}",
                        run.name,
                        trial.spec.training.lr.map_or(0.0, NonNegative::get)
                    ));
                }
                share::attempt(trial.finish(stage))?;
            }
            for (_, trial) in trials {
                if trial.kept(stage)?.is_none() {
                    return Ok(Attempt::Busy);
                }
            }
            let tuned = if trials.is_empty() { None } else { Some(tune::choose(stage, run, trials)?) };
            let task = self.task(run, with_rate(run, tuned.as_ref()), seed);
            if task.kept(stage)?.is_none() {
                output::say(format_args!("\n{}, seed {seed}", output::printable(&run.name)));
            }
            share::attempt(task.finish(stage))
        })
    }

    /// Fails if a run isn't finished.
    pub fn require_all<B: Backend>(&self, stage: &Stage<'_, B>, parts: Option<&Parts>) -> Result<()> {
        let trials = self.trials(parts);
        let mut missing = Vec::new();
        for (run, trials) in self.plan.runs.iter().zip(&trials) {
            let before = missing.len();
            for (lr, trial) in trials {
                if trial.kept(stage)?.is_none() {
                    missing.push(format!("{:?}, lr {lr:e}", run.name));
                }
            }
            if missing.len() > before {
                continue;
            }
            let tuned = if trials.is_empty() { None } else { Some(tune::choose(stage, run, trials)?) };
            for &seed in &self.plan.seeds {
                if self.task(run, with_rate(run, tuned.as_ref()), seed).kept(stage)?.is_none() {
                    missing.push(format!("{:?}, seed {seed}", run.name));
                }
            }
        }
        share::require_all(&missing)
    }

    fn base<B: Backend>(&self, stage: &Stage<'_, B>) -> Result<Finished> {
        kept::base(stage, self.eval_data, &self.plan.runs[0].spec, &self.base_dir())
    }

    fn base_dir(&self) -> PathBuf {
        self.out.join("base")
    }

    fn tune_dir(&self) -> PathBuf {
        self.out.join("tune")
    }

    /// The trials of each run; none of one whose rate is given.
    fn trials<'t>(&self, parts: Option<&'t Parts>) -> Vec<Vec<(f64, Task<'t>)>>
    where
        'a: 't,
    {
        let of = |run: &'a Run| match (&self.plan.tune, parts) {
            (Some(tune), Some(parts)) if run.spec.training.lr.is_none() => {
                tune::trials(tune, run, parts, &self.tune_dir())
            }
            _ => Vec::new(),
        };
        self.plan.runs.iter().map(of).collect()
    }

    fn train<B: Backend>(&self, stage: &Stage<'_, B>, tuned: &[Option<Tuned>]) -> Result<Vec<Vec<Finished>>> {
        let Plan { runs, seeds, .. } = self.plan;
        let mut all = Vec::new();
        for (run, tuned) in runs.iter().zip(tuned) {
            let spec = with_rate(run, tuned.as_ref());
            let mut of_run = Vec::new();
            for &seed in seeds {
                let place = all.len() * seeds.len() + of_run.len() + 1;
                let total = runs.len() * seeds.len();
                output::say(format_args!("\n{}, seed {seed} ({place} of {total})", output::printable(&run.name)));
                of_run.push(self.task(run, spec.clone(), seed).finish(stage)?);
            }
            all.push(of_run);
        }
        Ok(all)
    }
}

/// A run's options with the rate that was chosen for it.
fn with_rate(run: &Run, tuned: Option<&Tuned>) -> RunSpec {
    let mut spec = run.spec.clone();
    if let Some(tuned) = tuned {
        spec.training.lr = Some(NonNegative::new(tuned.lr));
    }
    spec
}
