//! Every run of a comparison with every seed: what is kept is taken over, the rest is trained.

use crate::experiment::kept::{self, Finished, Task};
use crate::experiment::plan::{Plan, Run};
use crate::experiment::stage::{Corpus, Stage};
use crate::experiment::tune::{self, Tuned};
use crate::options::NonNegative;
use crate::run::spec::RunSpec;
use crate::{interrupt, output};
use anyhow::Result;
use hydra_runtime::backend::Backend;
use std::path::Path;

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

    /// Does what is left to do; an interrupt is the error [`interrupt::Stopped`].
    pub fn results<B: Backend>(&self, stage: &Stage<'_, B>) -> Result<Results> {
        let Self { plan, out, .. } = *self;
        let parts = match &plan.tune {
            Some(tune) => Some(tune::split(tune, &self.data.paths, &out.join("tune"))?),
            None => None,
        };
        let mut trials = Vec::new();
        for run in &plan.runs {
            trials.push(match (&plan.tune, &parts) {
                (Some(tune), Some(parts)) if run.spec.training.lr.is_none() => {
                    tune::trials(tune, run, parts, &out.join("tune"))
                }
                _ => Vec::new(),
            });
        }
        self.check_kept(stage, &trials)?;
        let base = kept::base(stage, self.eval_data, &plan.runs[0].spec, &out.join("base"))?;
        interrupt::check()?;
        let mut tuned = Vec::new();
        for (run, trials) in plan.runs.iter().zip(&trials) {
            tuned.push(if trials.is_empty() { None } else { Some(tune::choose(stage, run, trials)?) });
        }
        let runs = self.train(stage, &tuned)?;
        Ok(Results { base, tuned, runs })
    }

    /// Refuses results of other options before anything is added to those that are there.
    fn check_kept<B: Backend>(&self, stage: &Stage<'_, B>, trials: &[Vec<(f64, Task<'_>)>]) -> Result<()> {
        for (run, trials) in self.plan.runs.iter().zip(trials) {
            for (_, trial) in trials {
                trial.kept(stage)?;
            }
            for &seed in self.plan.seeds.iter().filter(|_| trials.is_empty()) {
                self.task(run, run.spec.clone(), seed).kept(stage)?;
            }
        }
        Ok(())
    }

    fn train<B: Backend>(&self, stage: &Stage<'_, B>, tuned: &[Option<Tuned>]) -> Result<Vec<Vec<Finished>>> {
        let Plan { runs, seeds, .. } = self.plan;
        let mut all = Vec::new();
        for (run, tuned) in runs.iter().zip(tuned) {
            let mut spec = run.spec.clone();
            if let Some(tuned) = tuned {
                spec.training.lr = Some(NonNegative::new(tuned.lr));
            }
            let mut of_run = Vec::new();
            for &seed in seeds {
                let place = all.len() * seeds.len() + of_run.len() + 1;
                let total = runs.len() * seeds.len();
                output::say(format_args!("\n{}, seed {seed} ({place} of {total})", run.name));
                of_run.push(self.task(run, spec.clone(), seed).finish(stage)?);
            }
            all.push(of_run);
        }
        Ok(all)
    }
}
