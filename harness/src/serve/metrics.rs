//! Counters of the server, in Prometheus' text format.

use hydra_runtime::serve::Stats;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the engine's thread publishes after each step.
#[derive(Default)]
pub struct EngineGauges {
    running: AtomicU64,
    queued: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    prefix_hit_tokens: AtomicU64,
    steps: AtomicU64,
}

impl EngineGauges {
    /// Takes the engine's state after a step.
    pub fn set(&self, running: usize, queued: usize, stats: &Stats) {
        for (gauge, value) in [
            (&self.running, running as u64),
            (&self.queued, queued as u64),
            (&self.prompt_tokens, stats.prompt_tokens),
            (&self.generated_tokens, stats.generated_tokens),
            (&self.prefix_hit_tokens, stats.prefix_hit_tokens),
            (&self.steps, stats.steps),
        ] {
            gauge.store(value, Ordering::Relaxed);
        }
    }
}

/// Upper bounds of the histograms' buckets, in seconds.
const BOUNDS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

/// Durations by bucket.
#[derive(Default)]
struct Histogram {
    /// Of each bound; the last one is of what exceeds them all.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

impl Histogram {
    fn add(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.counts[BOUNDS.iter().position(|&bound| seconds <= bound).unwrap_or(BOUNDS.len())] += 1;
        self.sum += seconds;
    }

    fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn write(&self, page: &mut Text, name: &str, help: &str) {
        page.head(name, "histogram", help);
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().zip(self.counts) {
            below += count;
            page.line(format_args!("{name}_bucket{{le=\"{bound}\"}} {below}"));
        }
        page.line(format_args!("{name}_bucket{{le=\"+Inf\"}} {}", self.count()));
        page.line(format_args!("{name}_sum {}", self.sum));
        page.line(format_args!("{name}_count {}", self.count()));
    }
}

/// What is measured about requests.
#[derive(Default)]
struct Requests {
    /// By path and status.
    answered: BTreeMap<(&'static str, u16), u64>,
    first_token: Histogram,
    generation: Histogram,
    disconnected: u64,
}

/// All counters.
#[derive(Default)]
pub struct Metrics {
    /// The engine's.
    pub engine: Arc<EngineGauges>,
    requests: Mutex<Requests>,
}

impl Metrics {
    fn change<T>(&self, change: impl FnOnce(&mut Requests) -> T) -> T {
        change(&mut self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A request has got its status.
    pub fn answered(&self, path: &'static str, status: u16) {
        self.change(|requests| *requests.answered.entry((path, status)).or_default() += 1);
    }

    /// The first token of a request has come.
    pub fn first_token(&self, after: Duration) {
        self.change(|requests| requests.first_token.add(after));
    }

    /// A request has its whole answer.
    pub fn generated(&self, after: Duration) {
        self.change(|requests| requests.generation.add(after));
    }

    /// A client has gone before its answer was complete.
    pub fn disconnected(&self) {
        self.change(|requests| requests.disconnected += 1);
    }

    /// The mean time of a generation so far; one second before the first.
    pub fn mean_generation(&self) -> Duration {
        self.change(|requests| match requests.generation.count() {
            0 => Duration::from_secs(1),
            count => Duration::from_secs_f64(requests.generation.sum / count as f64),
        })
    }

    /// The page that Prometheus reads.
    pub fn page(&self, adapters: usize) -> String {
        let mut page = Text::default();
        let engine = &self.engine;
        for (name, kind, help, value) in [
            ("hydra_requests_running", "gauge", "Sequences that are being generated.", &engine.running),
            ("hydra_requests_queued", "gauge", "Sequences that wait for a slot.", &engine.queued),
            ("hydra_prompt_tokens_total", "counter", "Tokens of prompts.", &engine.prompt_tokens),
            ("hydra_generated_tokens_total", "counter", "Tokens generated.", &engine.generated_tokens),
            (
                "hydra_prefix_hit_tokens_total",
                "counter",
                "Tokens of prompts whose keys and values were there already.",
                &engine.prefix_hit_tokens,
            ),
            ("hydra_steps_total", "counter", "Passes over the model.", &engine.steps),
        ] {
            page.head(name, kind, help);
            page.line(format_args!("{name} {}", value.load(Ordering::Relaxed)));
        }
        page.head("hydra_adapters", "gauge", "Adapters that are loaded.");
        page.line(format_args!("hydra_adapters {adapters}"));
        self.change(|requests| {
            let name = "hydra_http_requests_total";
            page.head(name, "counter", "Requests answered, by path and status.");
            for ((path, status), count) in &requests.answered {
                page.line(format_args!("{name}{{path=\"{path}\",status=\"{status}\"}} {count}"));
            }
            let name = "hydra_disconnected_total";
            page.head(name, "counter", "Requests whose client went away before the answer was complete.");
            page.line(format_args!("{name} {}", requests.disconnected));
            let help = "Time from a request to its first token.";
            requests.first_token.write(&mut page, "hydra_time_to_first_token_seconds", help);
            requests.generation.write(
                &mut page,
                "hydra_generation_seconds",
                "Time from a request to its whole answer.",
            );
        });
        page.0
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments) {
        // Writing to a string can't fail.
        let _ = writeln!(self.0, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_what_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.answered("/v1/models", 200);
        metrics.answered("/v1/models", 200);
        for milliseconds in [5, 20, 200_000] {
            metrics.generated(Duration::from_millis(milliseconds));
        }
        let page = metrics.page(3);
        for line in [
            "hydra_adapters 3",
            "hydra_http_requests_total{path=\"/v1/models\",status=\"200\"} 2",
            "hydra_generation_seconds_bucket{le=\"0.01\"} 1",
            "hydra_generation_seconds_bucket{le=\"120\"} 2",
            "hydra_generation_seconds_bucket{le=\"+Inf\"} 3",
            "hydra_generation_seconds_count 3",
        ] {
            assert!(page.lines().any(|there| there == line), "{line:?} in {page}");
        }
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("hydra_") && value.parse::<f64>().is_ok(), "{line}");
        }
        assert_eq!(metrics.mean_generation().as_secs(), 66);
    }
}
