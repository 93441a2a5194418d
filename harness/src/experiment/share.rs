//! An experiment shared among processes, on one machine or several with a common folder: each takes runs whose folders nobody has
//! locked. A lock is the system's, so a process that is killed loses it at once, and another resumes its run.

use crate::options::Usage;
use crate::run::folder::Busy;
use crate::{interrupt, output};
use anyhow::{Result, bail};
use clap::Args;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

/// The time between two looks at runs that others work on.
const LOOK: Duration = Duration::from_secs(1);

/// Which part of an experiment a process does.
#[derive(Args, Clone, Copy)]
pub struct ShareArgs {
    /// Take the runs that no other process works on, and end when all are done. Start as many as you like with the same command;
    /// then --gather
    #[arg(long, conflicts_with_all = ["shard", "gather"], help_heading = "Sharing")]
    worker: bool,
    /// Take each N-th run, beginning with I (from 0); auto: from Slurm's job array. Then --gather
    #[arg(long, value_name = "I/N", conflicts_with = "gather", help_heading = "Sharing")]
    shard: Option<Shard>,
    /// Write the tables of finished runs; train nothing
    #[arg(long, help_heading = "Sharing")]
    gather: bool,
}

/// `--shard`
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shard {
    index: usize,
    count: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shard = match text {
            "auto" => Self::of_slurm(|name| std::env::var(name).ok())?,
            _ => text
                .split_once('/')
                .and_then(|(index, count)| Some(Self { index: index.parse().ok()?, count: count.parse().ok()? }))
                .ok_or("expected I/N, as in 0/4, or auto")?,
        };
        if shard.index < shard.count {
            Ok(shard)
        } else {
            Err(format!("expected I less than N, found {} of {}", shard.index, shard.count))
        }
    }
}

impl Shard {
    /// From the variables that Slurm sets for each job of an array.
    fn of_slurm(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let number = |name: &str| variable(name).and_then(|text| text.parse::<usize>().ok());
        let need = |name: &str| {
            number(name).ok_or(format!("auto: {name} is not set: expected a job of a Slurm array, or I/N"))
        };
        let (id, count) = (need("SLURM_ARRAY_TASK_ID")?, need("SLURM_ARRAY_TASK_COUNT")?);
        let first = number("SLURM_ARRAY_TASK_MIN").unwrap_or(0);
        let step = number("SLURM_ARRAY_TASK_STEP").unwrap_or(1).max(1);
        Ok(Self { index: id.saturating_sub(first) / step, count })
    }
}

/// What came of an attempt to do a job.
#[derive(Clone, Copy, PartialEq)]
pub enum Attempt {
    /// It is done.
    Done,
    /// Another process works on it, or on what it needs.
    Busy,
}

impl ShareArgs {
    /// Whether this process does only a part, so that the tables are not for it to write.
    pub fn is_part(self) -> bool {
        self.worker || self.shard.is_some()
    }

    /// The results of the experiment in `out`. A process that does a part calls `work` and has none; any other one calls
    /// `results`, with --gather after `all_done`, which fails if runs are missing. Where there are none, it says why.
    pub fn results<R>(
        self,
        out: &Path,
        work: impl FnOnce(Self) -> Result<()>,
        all_done: impl FnOnce() -> Result<()>,
        results: impl FnOnce() -> Result<R>,
    ) -> Result<Option<R>> {
        let found = if self.is_part() {
            interrupt::unless_stopped(work(self))?.map(|()| None)
        } else {
            if self.gather {
                all_done()?;
            }
            interrupt::unless_stopped(results())?.map(Some)
        };
        let why = match found {
            Some(Some(results)) => return Ok(Some(results)),
            Some(None) => "this part is done; --gather writes the tables",
            None => "stopped; the same command continues",
        };
        output::print(format_args!("{}: {why}\n", out.display()))?;
        Ok(None)
    }

    fn takes(self, place: usize) -> bool {
        self.shard.is_none_or(|shard| place % shard.count == shard.index)
    }

    /// Does this process's part of `jobs` jobs; `attempt` tries to do one of them. Ends when all of them are done, by whomever; an
    /// interrupt is the error [`interrupt::Stopped`].
    pub fn work(self, jobs: usize, mut attempt: impl FnMut(usize) -> Result<Attempt>) -> Result<()> {
        let mut left: Vec<usize> = (0..jobs).filter(|&place| self.takes(place)).collect();
        while !left.is_empty() {
            let before = left.len();
            let mut busy = Vec::new();
            for place in left {
                interrupt::check()?;
                if attempt(place)? == Attempt::Busy {
                    busy.push(place);
                }
            }
            left = busy;
            if left.len() == before {
                interrupt::check()?;
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }
}

/// [`Attempt::Busy`] if the folder of a job is another process's.
pub fn attempt<T>(job: Result<T>) -> Result<Attempt> {
    match job {
        Ok(_) => Ok(Attempt::Done),
        Err(error) if error.is::<Busy>() => Ok(Attempt::Busy),
        Err(error) => Err(error),
    }
}

/// Fails if runs are missing that `--gather` needs.
pub fn require_all(missing: &[String]) -> Result<()> {
    match missing {
        [] => Ok(()),
        [first, ..] => bail!(Usage(format!(
            "--gather: {} runs are not finished, the first is {first}; start workers, or leave --gather out to do what is left",
            missing.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_read() {
        let shard = |text: &str| text.parse::<Shard>();
        assert_eq!(shard("1/4"), Ok(Shard { index: 1, count: 4 }));
        for bad in ["4/4", "0/0", "1", "/", "a/2", "-1/2", ""] {
            assert!(shard(bad).is_err(), "{bad}");
        }
        let slurm = |id: &'static str| {
            move |name: &str| match name {
                "SLURM_ARRAY_TASK_ID" => Some(id.to_string()),
                "SLURM_ARRAY_TASK_COUNT" => Some("3".into()),
                "SLURM_ARRAY_TASK_MIN" => Some("10".into()),
                "SLURM_ARRAY_TASK_STEP" => Some("5".into()),
                _ => None,
            }
        };
        assert_eq!(["10", "15", "20"].map(|id| Shard::of_slurm(slurm(id)).unwrap().index), [0, 1, 2]);
        assert!(Shard::of_slurm(|_| None).unwrap_err().contains("SLURM_ARRAY_TASK_ID"));
    }

    #[test]
    fn every_job_is_one_shards_and_what_is_busy_is_tried_again() {
        let mut done = [0; 10];
        for index in 0..3 {
            let share = ShareArgs { worker: false, shard: Some(Shard { index, count: 3 }), gather: false };
            let mut tries = [0; 10];
            let attempt = |place: usize| {
                tries[place] += 1;
                // The first attempt at one of them meets another process.
                if place == 3 && tries[place] == 1 {
                    return Ok(Attempt::Busy);
                }
                done[place] += 1;
                Ok(Attempt::Done)
            };
            share.work(10, attempt).unwrap();
        }
        assert_eq!(done, [1; 10]);
    }
}
