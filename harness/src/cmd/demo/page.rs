//! The demo's report, and the picture that the README shows.

use crate::report::{
    self, Axis, Chart, Kind, Look, Mean, Means, Page, Router, Series, commands, figure, integer, links, paragraph,
    table,
};
use anyhow::Result;
use std::path::Path;

/// The picture's name in the demo's folder.
const PICTURE: &str = "demo.svg";

/// One line of the comparison.
pub struct Row {
    /// The method, or "before".
    pub title: &'static str,
    /// Trainable parameters.
    pub parameters: u64,
    /// Held-out loss of each domain, and of all.
    pub losses: Vec<f64>,
    /// Share of right answers.
    pub accuracy: f64,
    /// Its standard error.
    pub stderr: f64,
}

/// A fine-tune.
pub struct Run {
    /// The method.
    pub title: &'static str,
    /// Its folder in the demo's.
    pub folder: &'static str,
    /// Training loss by step.
    pub training: Vec<(f64, f64)>,
}

/// All that the demo found.
#[derive(Default)]
pub struct Outcome {
    /// Names of the domains.
    pub domains: Vec<String>,
    /// Before, then each method.
    pub rows: Vec<Row>,
    /// The three fine-tunes.
    pub runs: Vec<Run>,
    /// The last method's.
    pub router: Option<Router>,
    /// The command lines that repeat it.
    pub commands: Vec<String>,
    /// Steps of each method.
    pub steps: usize,
    /// Multiple-choice questions asked.
    pub questions: usize,
    /// Seconds that all of it took.
    pub seconds: f64,
}

impl Outcome {
    /// The comparison: head and lines, with `digits` for numbers of parameters.
    pub fn table(&self, digits: fn(u64) -> String) -> (Vec<String>, Vec<Vec<String>>) {
        let loss = |name: &str| format!("loss {name}");
        let mut head = vec!["method".to_string(), "trainable".to_string()];
        head.extend(self.domains.iter().map(|domain| loss(domain)).chain([loss("all"), "accuracy %".to_string()]));
        let cells = self.rows.iter().map(|row| {
            let mut cells = vec![row.title.to_string(), digits(row.parameters)];
            cells.extend(row.losses.iter().map(|loss| format!("{loss:.3}")));
            cells.push(format!("{:.1} ± {:.1}", 100.0 * row.accuracy, 100.0 * row.stderr));
            cells
        });
        (head, cells.collect())
    }

    /// Writes the page and the picture.
    pub fn write(&self, out: &Path) -> Result<()> {
        let mut page = Page::new("LoRA, LoRA-Split and HydraLoRA on four domains", &self.lead());
        self.tiles(&mut page);
        let (head, cells) = self.table(integer);
        let head: Vec<&str> = head.iter().map(String::as_str).collect();
        let before_and_after = table(&head, &cells) + &paragraph(REMARK) + &self.accuracy().figure();
        page.section("Before and after", &before_and_after);
        let training = self.training();
        page.section("Training", &figure(&training, "", ""));
        if let Some(router) = &self.router {
            page.section("HydraLoRA's router", &router.html());
            let title = "HydraLoRA's router: weight of each head";
            report::write_chart_and_router(&out.join(PICTURE), &training, title, &router.routing)?;
        }
        let link = |run: &Run| (format!("{}/{}", run.folder, report::FILE), run.title.to_string());
        let runs = self.runs.iter().map(link);
        page.section("Reports of the three runs", &links(&runs.collect::<Vec<_>>()));
        page.section("Commands that repeat it", &commands(self.commands.iter().map(String::as_str)));
        page.write(out)
    }

    fn lead(&self) -> String {
        format!(
            "Three ways to fine-tune a LLaMA of one million parameters on instructions from four domains, with about \
             the same number of trainable parameters and {} steps each. Loss is measured on held-out records, \
             accuracy on {} multiple-choice questions.",
            self.steps, self.questions
        )
    }

    fn tiles(&self, page: &mut Page) {
        let all = |row: &Row| row.losses.last().copied().unwrap_or(f64::NAN);
        let [before, .., hydra] = self.rows.as_slice() else { return };
        let loss = format!("{:.3} → {:.3}", all(before), all(hydra));
        page.tile("Held-out loss", &loss, "HydraLoRA, nats per token");
        let accuracy = format!("{:.0} % → {:.0} %", 100.0 * before.accuracy, 100.0 * hydra.accuracy);
        page.tile("Accuracy", &accuracy, "HydraLoRA; 25 % by chance");
        page.tile("Trainable parameters", &integer(hydra.parameters), "HydraLoRA; the others within 2 %");
        page.tile("Steps", &self.steps.to_string(), "of 16 records, for each method");
        page.tile("Time", &report::duration(self.seconds), "for everything");
    }

    fn accuracy(&self) -> Means {
        let row = |row: &Row| {
            let (mean, error) = (100.0 * row.accuracy, 100.0 * row.stderr);
            let text = format!("{mean:.1} ± {error:.1}");
            Mean { name: row.title.into(), mean, ends: Some((mean - error, mean + error)), text }
        };
        Means {
            title: "Accuracy on multiple-choice questions".into(),
            axis: "right answers, %, ± standard error; the line is chance".into(),
            rows: self.rows.iter().map(row).collect(),
            origin: Some(25.0),
        }
    }

    fn training(&self) -> Chart {
        let line = |run: &Run| Series::new(run.title, Look::Noisy, run.training.clone());
        let series = self.runs.iter().map(line).collect();
        let y = Axis::new("cross-entropy, nats per token, and its running mean", Kind::Logarithmic);
        Chart { title: "Training loss".into(), x: Axis::steps(), y, series, rule: None }
    }
}

const REMARK: &str = "One seed: this shows that each method learns, not which is best.";
