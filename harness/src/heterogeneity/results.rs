//! Every run on every draw with every seed: what is kept is taken over, the rest is trained.

use super::draw::Draws;
use crate::experiment::kept::{self, Finished, Task};
use crate::experiment::plan::{Plan, Run};
use crate::experiment::share::{self, ShareArgs};
use crate::experiment::stage::{Corpus, Stage, raw_records, text_of};
use crate::run::folder;
use crate::{interrupt, output};
use anyhow::Result;
use hydra_runtime::atomic::write_atomically;
use hydra_runtime::backend::Backend;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file of each draw, by seed and number of categories.
pub type Files = BTreeMap<(u64, usize), Corpus>;

/// The draws out of the files `data`, as files below `out` that are not written yet.
pub struct Drawn<'a> {
    draws: &'a Draws<'a>,
    records: Vec<Vec<u8>>,
    /// The files.
    pub files: Files,
}

impl<'a> Drawn<'a> {
    /// Draws for each seed.
    pub fn new(draws: &'a Draws<'_>, seeds: &[u64], data: &[PathBuf], out: &Path) -> Result<Self> {
        let mut drawn = Self { draws, records: raw_records(data)?, files: Files::new() };
        for (&seed, &count) in seeds.iter().flat_map(|seed| draws.counts.iter().map(move |count| (seed, count))) {
            let dir = out.join("data").join(format!("seed-{seed}"));
            let path = dir.join(format!("categories-{count}.jsonl"));
            drawn.files.insert((seed, count), Corpus::planned(path, &drawn.text(seed, count)));
        }
        Ok(drawn)
    }

    /// Writes the files.
    pub fn write(&self) -> Result<()> {
        for (&(seed, count), file) in &self.files {
            let path = &file.paths[0];
            path.parent().map_or(Ok(()), folder::make)?;
            write_atomically(path, &self.text(seed, count))?;
        }
        Ok(())
    }

    fn text(&self, seed: u64, count: usize) -> Vec<u8> {
        text_of(self.draws.draw(seed, count).into_iter().map(|i| self.records[i].as_slice()))
    }
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

    /// Refuses results of another configuration before anything is changed or added.
    pub fn check_kept<B: Backend>(&self, stage: &Stage<'_, B>, counts: &[usize], files: &'a Files) -> Result<()> {
        self.tasks(counts, files).iter().try_for_each(|(_, task)| task.kept(stage).map(drop))?;
        kept::kept_base(stage, self.eval_data, &self.plan.runs[0].spec, &self.base_dir()).map(drop)
    }

    /// Does what is left to do; an interrupt is the error [`interrupt::Stopped`].
    pub fn results<B: Backend>(&self, stage: &Stage<'_, B>, counts: &[usize], files: &'a Files) -> Result<Results> {
        let tasks = self.tasks(counts, files);
        let base = self.base(stage)?;
        let mut finished = Vec::new();
        for (place, (title, task)) in tasks.iter().enumerate() {
            interrupt::check()?;
            output::say(format_args!("\n{title} ({} of {})", place + 1, tasks.len()));
            finished.push(task.finish(stage)?);
        }
        let mut finished = finished.into_iter();
        let mut of_count = || finished.by_ref().take(self.plan.seeds.len()).collect::<Vec<_>>();
        let runs = self.plan.runs.iter().map(|_| counts.iter().map(|_| of_count()).collect()).collect();
        Ok(Results { base, runs })
    }

    /// Does a part of it, beside other processes; an interrupt is the error [`interrupt::Stopped`].
    pub fn work<B: Backend>(
        &self,
        stage: &Stage<'_, B>,
        counts: &[usize],
        files: &'a Files,
        share: ShareArgs,
    ) -> Result<()> {
        let tasks = self.tasks(counts, files);
        // The model alone comes first.
        share.work(1 + tasks.len(), |place| {
            let Some(place) = place.checked_sub(1) else { return share::attempt(self.base(stage)) };
            let (title, task) = &tasks[place];
            if task.kept(stage)?.is_none() {
                output::say(format_args!("\n{title}"));
            }
            share::attempt(task.finish(stage))
        })
    }

    /// Fails if a run isn't finished.
    pub fn require_all<B: Backend>(&self, stage: &Stage<'_, B>, counts: &[usize], files: &'a Files) -> Result<()> {
        let mut missing = Vec::new();
        for (title, task) in self.tasks(counts, files) {
            if task.kept(stage)?.is_none() {
                missing.push(title);
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

    /// By run, number of categories and seed, each with what it is.
    fn tasks(&self, counts: &[usize], files: &'a Files) -> Vec<(String, Task<'a>)> {
        let Plan { runs, seeds, .. } = self.plan;
        let mut tasks = Vec::new();
        for (run, &count) in runs.iter().flat_map(|run| counts.iter().map(move |count| (run, count))) {
            for &seed in seeds {
                let title = format!("{}, {count} categories, seed {seed}", output::printable(&run.name));
                tasks.push((title, self.task(run, count, seed, &files[&(seed, count)])));
            }
        }
        tasks
    }
}
