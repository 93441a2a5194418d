//! Results in the form of lm-evaluation-harness 0.4, so that its tools read them:
//!
//! ```text
//! DIR/results_hydra.json                    results, groups, n-shot, versions, n-samples, ..
//! DIR/samples_mmlu_{subject}_hydra.jsonl    a line per question: document, prompts, log-likelihoods, accuracy
//! ```

use super::prompts;
use super::questions::{Question, Subject};
use super::score::{Outcome, Prediction};
use super::table::{GROUPS, Report, group};
use super::{Asking, LETTERS};
use crate::sha256::of_text;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// lm-evaluation-harness's versions of the task of a subject, and of a group of subjects.
const TASK_VERSION: f64 = 1.0;
const GROUP_VERSION: f64 = 2.0;

/// What was measured.
pub struct Results<'a> {
    /// The model, as it was named.
    pub model: &'a str,
    /// The questions.
    pub subjects: &'a [Subject],
    /// How they were asked.
    pub asking: Asking,
    /// The most questions of a subject, if there was a limit.
    pub limit: Option<usize>,
    /// What came of it.
    pub outcome: &'a Outcome,
    /// The same, added up.
    pub report: &'a Report,
}

/// A task's accuracy.
struct Task {
    name: String,
    alias: String,
    questions: usize,
    accuracy: f64,
    /// `None` for one question.
    stderr: Option<f64>,
}

impl Results<'_> {
    /// The files' names and contents.
    pub fn files(&self) -> Vec<(String, String)> {
        let results = serde_json::to_string_pretty(&self.results()).expect("a map of strings and numbers") + "\n";
        let mut files = vec![("results_hydra.json".to_string(), results)];
        for subject in self.subjects {
            let own = self.outcome.predictions.iter().filter(|prediction| prediction.subject == subject.name);
            let lines: String = own.map(|prediction| self.sample(subject, prediction).to_string() + "\n").collect();
            files.push((format!("samples_{}_hydra.jsonl", task(&subject.name)), lines));
        }
        files
    }

    fn results(&self) -> Value {
        let subjects = self.report.subjects.iter().map(|(name, score)| Task {
            name: task(name),
            alias: name.replace('_', " "),
            questions: score.questions,
            accuracy: score.accuracy,
            stderr: score.stderr,
        });
        let subjects: Vec<(usize, Task)> = self.report.subjects.keys().map(|name| group(name)).zip(subjects).collect();
        let mut groups: BTreeMap<usize, Vec<&Task>> = BTreeMap::new();
        subjects.iter().for_each(|(group, task)| groups.entry(*group).or_default().push(task));
        let all = pooled("mmlu", "mmlu", &subjects.iter().map(|(_, task)| task).collect::<Vec<_>>());
        let mut subtasks = Map::new();
        let mut pools = vec![all];
        for (group, own) in &groups {
            let (name, _) = GROUPS[*group];
            let pool = pooled(&task(&name.replace(' ', "_").to_lowercase()), name, own);
            subtasks.insert(pool.name.clone(), own.iter().map(|task| task.name.clone()).collect());
            pools.push(pool);
        }
        subtasks.insert("mmlu".into(), pools[1..].iter().map(|pool| pool.name.clone()).collect());
        let own = || subjects.iter().map(|(_, task)| task);
        let entries = |tasks: &mut dyn Iterator<Item = &Task>| tasks.map(entry).collect::<Map<_, _>>();
        let versions = own().map(|task| (task, TASK_VERSION)).chain(pools.iter().map(|pool| (pool, GROUP_VERSION)));
        let shots = self.report.shots;
        json!({
            "results": entries(&mut pools.iter().chain(own())),
            "groups": entries(&mut pools.iter()),
            "group_subtasks": subtasks,
            "configs": of(own(), |task| json!({
                "task": task.name, "task_alias": task.alias, "dataset_path": "cais/mmlu", "output_type": "multiple_choice",
                "num_fewshot": shots, "metadata": {"version": TASK_VERSION},
            })),
            "versions": versions.map(|(task, version)| (task.name.clone(), version.into())).collect::<Map<_, _>>(),
            "n-shot": of(pools.iter().chain(own()), |_| shots.into()),
            "higher_is_better": of(pools.iter().chain(own()), |_| json!({"acc": true})),
            "n-samples": of(own(), |task| json!({"original": task.questions, "effective": task.questions})),
            "config": {"model": "hydra", "model_args": self.model, "limit": self.limit},
            "model_source": "hydra", "model_name": self.model,
            "total_evaluation_time_seconds": self.report.seconds.to_string(),
        })
    }

    fn sample(&self, subject: &Subject, prediction: &Prediction) -> Value {
        let Question { question, choices, answer } = &subject.test[prediction.index];
        let document = json!({"question": question, "subject": subject.name, "choices": choices, "answer": answer});
        let prompt = prompts::text(subject, prediction.index, self.asking);
        let asked = LETTERS
            .iter()
            .enumerate()
            .map(|(i, letter)| (format!("gen_args_{i}"), json!({"arg_0": prompt, "arg_1": format!(" {letter}")})));
        let response = |i: usize| {
            let greedy = if prediction.greedy[i] { "True" } else { "False" };
            json!([prediction.scores[i].to_string(), greedy])
        };
        let written = serde_json::to_string_pretty(&document).expect("a map of strings and numbers");
        json!({
            "doc_id": prediction.index, "doc": document, "target": answer.to_string(),
            "arguments": asked.collect::<Map<_, _>>(),
            "resps": (0..4).map(|i| json!([response(i)])).collect::<Vec<_>>(),
            "filtered_resps": (0..4).map(response).collect::<Vec<_>>(),
            "filter": "none", "metrics": ["acc"], "doc_hash": of_text(&written), "prompt_hash": of_text(&prompt),
            "target_hash": of_text(&answer.to_string()), "acc": f64::from(prediction.answer == prediction.prediction),
        })
    }
}

/// The name of a subject's or group's task.
fn task(name: &str) -> String {
    format!("mmlu_{name}")
}

fn entry(task: &Task) -> (String, Value) {
    let Task { alias, accuracy, stderr, .. } = task;
    // As lm-evaluation-harness has it.
    let stderr = stderr.map_or("N/A".into(), Value::from);
    (task.name.clone(), json!({"alias": alias, "acc,none": accuracy, "acc_stderr,none": stderr}))
}

fn of<'t>(tasks: impl Iterator<Item = &'t Task>, value: impl Fn(&Task) -> Value) -> Map<String, Value> {
    tasks.map(|task| (task.name.clone(), value(task))).collect()
}

/// All questions of some tasks: their mean, and lm-evaluation-harness's pooled standard error.
fn pooled(name: &str, alias: &str, tasks: &[&Task]) -> Task {
    let questions: usize = tasks.iter().map(|task| task.questions).sum();
    let count = questions as f64;
    let accuracy = tasks.iter().map(|task| task.accuracy * task.questions as f64).sum::<f64>() / count.max(1.0);
    let variance = |task: &&Task| {
        let count = task.questions as f64;
        Some((count - 1.0) * task.stderr?.powi(2) * count)
    };
    let degrees = (count - tasks.len() as f64).max(1.0);
    let stderr = tasks.iter().map(variance).sum::<Option<f64>>().map(|sum| (sum / degrees / count.max(1.0)).sqrt());
    Task { name: name.into(), alias: alias.into(), questions, accuracy, stderr }
}
