//! A progress bar on stderr; where stderr is not a terminal, a plain line now and then.

use crate::output;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The shortest time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(20);

/// The progress of a long piece of work.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: u64,
    first: u64,
    started: Instant,
    last_line: Instant,
}

impl Progress {
    /// For `total` items, called `what`, of which `done` are done.
    pub fn new(what: &'static str, total: u64, done: u64) -> Self {
        let bar = (std::io::stderr().is_terminal() && !output::is_quiet()).then(|| {
            let bar = ProgressBar::new(total).with_position(done).with_prefix(what);
            let style = ProgressStyle::with_template("{prefix} {pos}/{len} {wide_bar} {msg}  {eta} left");
            bar.set_style(style.expect("a constant template"));
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Self { bar, what, total, first: done, started: now, last_line: now }
    }

    /// Shows that `done` items are done, and a message.
    pub fn update(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_string());
            bar.set_position(done);
        } else if self.last_line.elapsed() >= PLAIN_INTERVAL {
            self.last_line = Instant::now();
            let (behind, ahead) = ((done - self.first).max(1), self.total.saturating_sub(done));
            let left = self.started.elapsed().as_secs_f64() * ahead as f64 / behind as f64;
            output::say(format_args!("{} {done}/{} {message}  {left:.0} s left", self.what, self.total));
        }
    }

    /// Prints a line above the bar.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::say(text)),
            None => output::say(text),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
