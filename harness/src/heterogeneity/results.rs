//! Every run on every draw with every seed: what is kept is taken over, the rest is trained.

use super::draw::Draws;
use crate::experiment::kept::{self, Finished, Task};
use crate::experiment::plan::{Plan, Run};
use crate::experiment::stage::{Corpus, Stage, raw_records, write_records};
use crate::run::folder;
use crate::{interrupt, output};
use anyhow::Result;
use hydra_runtime::backend::Backend;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file of each draw, by seed and number of categories.
pub type Files = BTreeMap<(u64, usize), Corpus>;

/// Writes the draws out of the files `data` below `out`.
pub fn write_draws(draws: &Draws<'_>, seeds: &[u64], data: &[PathBuf], out: &Path) -> Result<Files> {
    let raw = raw_records(data)?;
    let mut files = Files::new();
    for &seed in seeds {
        let dir = out.join("data").join(format!("seed-{seed}"));
        folder::make(&dir)?;
        for &count in &draws.counts {
            let path = dir.join(format!("categories-{count}.jsonl"));
            let drawn: Vec<&[u8]> = draws.draw(seed, count).into_iter().map(|i| raw[i].as_slice()).collect();
            write_records(&path, &drawn)?;
            files.insert((seed, count), Corpus::new(&[path])?);
        }
    }
    Ok(files)
}

/// The experiment's files and folder.
pub struct Inputs<'a> {
    /// Runs and seeds.
    pub plan: &'a Plan,
    /// The eval set.
    pub eval_data: &'a Corpus,
    /// The folder.
    pub out: &'a Path,
}

/// Everything that was found.
pub struct Results {
    /// The model without an adapter.
    pub base: Finished,
    /// By run, number of categories and seed.
    pub runs: Vec<Vec<Vec<Finished>>>,
}

impl<'a> Inputs<'a> {
    /// A run on the draw `data` from `count` categories.
    pub fn task(&self, run: &'a Run, count: usize, seed: u64, data: &'a Corpus) -> Task<'a> {
        let dir = self.out.join("runs").join(&run.folder);
        let dir = dir.join(format!("categories-{count}")).join(format!("seed-{seed}"));
        Task { spec: run.spec.clone(), seed, data, eval_data: self.eval_data, ask: false, dir }
    }

    /// Does what is left to do; an interrupt is the error [`interrupt::Stopped`].
    pub fn results<B: Backend>(&self, stage: &Stage<'_, B>, counts: &[usize], files: &'a Files) -> Result<Results> {
        let Plan { runs, seeds, .. } = self.plan;
        let of_seeds = |run: &'a Run, count: usize| -> Vec<Task<'a>> {
            seeds.iter().map(|&seed| self.task(run, count, seed, &files[&(seed, count)])).collect()
        };
        // What belongs to another configuration is refused before anything is added.
        for (run, &count) in runs.iter().flat_map(|run| counts.iter().map(move |count| (run, count))) {
            for task in of_seeds(run, count) {
                task.kept(stage)?;
            }
        }
        let base = kept::base(stage, self.eval_data, &runs[0].spec, &self.out.join("base"))?;
        let total = runs.len() * counts.len() * seeds.len();
        let (mut place, mut all) = (0, Vec::new());
        for run in runs {
            let mut of_run = Vec::new();
            for &count in counts {
                let mut of_count = Vec::new();
                for task in of_seeds(run, count) {
                    interrupt::check()?;
                    place += 1;
                    let (name, seed) = (&run.name, task.seed);
                    output::say(format_args!("\n{name}, {count} categories, seed {seed} ({place} of {total})"));
                    of_count.push(task.finish(stage)?);
                }
                of_run.push(of_count);
            }
            all.push(of_run);
        }
        Ok(Results { base, runs: all })
    }
}
