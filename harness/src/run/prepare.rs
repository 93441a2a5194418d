//! From options to a run: everything is read and checked before the model is loaded.

use super::folder::{RunDir, claim, vacant};
use super::manifest::{self, Manifest, Parts, inputs};
use super::schedule::TrainConfig;
use super::spec::RunSpec;
use super::start::Start;
use super::train::{EvalSet, Trained, Training, train};
use crate::cluster::Clustering;
use crate::data::encode::{Encoded, Encoder};
use crate::data::records::{CATEGORY, Record, names};
use crate::data::template::Template;
use crate::device::{on_device, open_model};
use crate::eval::accuracy::Answers;
use crate::eval::accuracy::report::Report;
use crate::eval::health;
use crate::hub::{locate_data, locate_file};
use crate::options::Count;
use crate::ranks::{Ranks, digest_of, fact};
use crate::report::{self, Router};
use crate::{interrupt, memory, output};
use anyhow::{Context, Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::model::Model;
use hydra_runtime::tokenizer::Tokenizer;

/// A run that is over.
pub struct Done {
    /// Its adapter, steps and measurements.
    pub trained: Trained,
    /// Number of trainable parameters.
    pub trainable: u64,
    /// What the router does, where there is one.
    pub router: Option<Router>,
    /// Accuracy on the records of `--accuracy-data`, with the adapter before the first step and after the last.
    pub accuracy: Option<[Report; 2]>,
}

/// Trains, saves, and writes the report; on rank 0, with the work of all.
pub fn finetune(mut spec: RunSpec, resume: bool, ranks: &Ranks) -> Result<Done> {
    ranks.agree(check(&mut spec, resume, ranks))?;
    on_device!(spec.device, ranks, device => finetune_on(device, spec, resume, ranks))
}

/// Checks the options, and downloads what they name on the hub.
fn check(spec: &mut RunSpec, resume: bool, ranks: &Ranks) -> Result<()> {
    spec.check()?;
    if ranks.is_first() {
        check_folder(spec, resume)?;
    }
    spec.data.data = locate_data(&spec.data.data)?;
    spec.evaluation.eval_data = spec.evaluation.eval_data.as_deref().map(locate_file).transpose()?;
    Ok(())
}

/// All that a run needs, read and checked.
struct Ready {
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prepared: Prepared,
    answers: Option<Answers>,
}

impl Ready {
    fn new<B: Backend>(device: &B, spec: RunSpec, ranks: &Ranks) -> Result<Self> {
        let checkpoint = open_model(spec.model())?;
        let tokenizer = checkpoint.tokenizer()?;
        let prepared = Prepared::new(spec, &checkpoint, &tokenizer, device, ranks)?;
        let answers = prepared.answers()?;
        if let Some(answers) = &answers {
            answers.check(&tokenizer, checkpoint.config().context)?;
        }
        Ok(Self { checkpoint, tokenizer, prepared, answers })
    }
}

fn finetune_on<B: Backend>(device: B, spec: RunSpec, resume: bool, ranks: &Ranks) -> Result<Done> {
    let Ready { checkpoint, tokenizer, prepared, answers } = ranks.agree(Ready::new(&device, spec, ranks))?;
    ranks.same(|| prepared.shared(resume))?;
    ranks.warn_unless_alike(&device)?;
    let dir = prepared.open_dir(resume, ranks)?;
    interrupt::listen()?;
    let model = ranks.agree(Model::load(device, &checkpoint).map_err(Into::into))?;
    let done = prepared.train(&model, prepared.eval_set(), &dir, ranks, true)?;
    let stopped = ranks.any(interrupt::requested())?;
    let Some(answers) = answers.filter(|_| !stopped) else { return Ok(done) };
    let measured = || -> Result<[Report; 2]> {
        output::say("answering the records of --accuracy-data, before and after training");
        // As for the eval loss, "before" is with the adapter that training starts from.
        let before = answers.of(&model, Some(&prepared.adapter), &tokenizer, ranks)?;
        let after = answers.of(&model, Some(&done.trained.adapter), &tokenizer, ranks)?;
        Ok([before, after].map(|outcome| Report::new(&outcome, answers.metric)))
    };
    let accuracy = interrupt::unless_stopped(measured())?;
    let done = Done { accuracy, ..done };
    if let Some([before, after]) = done.accuracy.as_ref().filter(|_| ranks.is_first()) {
        output::write_json(&dir.path.join(ACCURACY), &serde_json::json!({"before": before, "after": after}))?;
        prepared.report(&done, &dir)?;
    }
    Ok(done)
}

/// Accuracy before and after, in the run's folder.
const ACCURACY: &str = "accuracy.json";

/// A run of which everything is known and checked, before the model is loaded.
pub struct Prepared {
    spec: RunSpec,
    /// The adapter before the first step.
    pub adapter: Adapter,
    /// The training set.
    pub data: Encoded,
    /// The eval set.
    pub eval_data: Option<Encoded>,
    /// How to train.
    pub config: TrainConfig,
    /// Number of trainable parameters.
    pub trainable: u64,
    /// Their share of all parameters.
    pub share: f64,
    manifest: Manifest,
}

impl Prepared {
    /// Reads and checks everything that the options name.
    pub fn new<B: Backend>(
        spec: RunSpec,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        device: &B,
        ranks: &Ranks,
    ) -> Result<Self> {
        let model = checkpoint.config();
        let seq_len = spec.data.encoding.seq_len(model.context)?;
        let template = Template::new(&spec.data.encoding, tokenizer)?;
        let encoder = Encoder { template: &template, seq_len };

        let start = Start::read(&spec, model)?;
        let (adapter, clustering) = start.adapter(&start.records)?;
        if let Some(found) = &clustering {
            describe_clusters(found);
        }
        let data = encode(&encoder, &format!("--data {}", names(&spec.data.data)), &start.records, &adapter)?;
        let eval_data = match (&spec.evaluation.eval_data, &start.eval_records) {
            (Some(path), Some(records)) => {
                Some(encode(&encoder, &format!("--eval-data {}", path.display()), records, &adapter)?)
            }
            _ => None,
        };
        drop(start);
        let config = TrainConfig::new(&spec, data.sequences.len())?;
        warn_about(&config, &adapter);
        let eval_set = eval_data.as_ref().map(|data| EvalSet { data, every: None });
        let training = Training { adapter: &adapter, data: &data, config: &config, eval_set };
        memory::require_on(device, training.bytes(&training.plan()?, device, model, ranks)?, "training")?;
        let manifest = Manifest::new(&Parts {
            spec: &spec,
            checkpoint,
            adapter: &adapter,
            config: &config,
            data: &data,
            seq_len,
            clustering: clustering.as_ref(),
        })?;
        let (trainable, frozen) = (adapter.parameters(), checkpoint.parameters());
        let share = trainable as f64 / (trainable + frozen) as f64;
        Ok(Self { spec, adapter, data, eval_data, config, trainable, share, manifest })
    }

    /// What must be the same on every rank: names with values.
    fn shared(&self, resume: bool) -> Result<Vec<(String, String)>> {
        let accuracy = self.spec.evaluation.accuracy().as_ref().map(inputs).transpose()?;
        let facts = [
            fact("--accuracy-data", accuracy.unwrap_or_default()),
            fact("adapter before the first step", digest_of(Some(&self.adapter))),
            fact("training set", self.data.digest()),
            fact("eval set", self.eval_data.as_ref().map_or_else(String::new, Encoded::digest)),
            fact("--resume", resume),
        ];
        Ok(self.manifest.shared().chain(facts).collect())
    }

    /// Makes and locks the run's folder, and writes down what was chosen; on rank 0.
    pub fn open_dir(&self, resume: bool, ranks: &Ranks) -> Result<RunDir> {
        let path = self.spec.out().to_path_buf();
        let mut lock = None;
        let resume = ranks.by_first(|| {
            lock = Some(claim(&path)?);
            // Another process may have run there since the folder was checked.
            check_folder(&self.spec, resume)?;
            let resume = resume && self.manifest.resumes(&path)?;
            self.manifest.write(&path)?;
            Ok(resume)
        })?;
        let (every, run) = (self.spec.output.save_every.map(Count::get), self.manifest.identity()?);
        Ok(RunDir::new(path, every, resume, run, lock))
    }

    /// The records to answer before and after training, if the options name some.
    fn answers(&self) -> Result<Option<Answers>> {
        let field = self.adapter.config.label_field.as_deref().unwrap_or(CATEGORY);
        let options = self.spec.evaluation.accuracy();
        options.map(|options| Answers::read(&options, &self.spec.data.encoding, field)).transpose()
    }

    /// The eval set, and when the options have it measured.
    pub fn eval_set(&self) -> Option<EvalSet<'_>> {
        let every = self.spec.evaluation.eval_every.map(Count::get);
        self.eval_data.as_ref().map(|data| EvalSet { data, every })
    }

    /// Trains in the folder that [`Prepared::open_dir`] made, and writes the report, with the router's weights if `watch` is set.
    pub fn train<B: Backend>(
        &self,
        model: &Model<B>,
        eval_set: Option<EvalSet<'_>>,
        dir: &RunDir,
        ranks: &Ranks,
        watch: bool,
    ) -> Result<Done> {
        let Self { adapter, data, config, .. } = self;
        let (trainable, share) = (self.trainable, 100.0 * self.share);
        let count = data.sequences.len();
        output::say(format_args!(
            "{count} records, {} steps; {trainable} trainable parameters, {share:.3} % of all",
            config.steps
        ));
        let trained = train(model, Training { adapter, data, config, eval_set }, dir, ranks)?;
        if !ranks.is_first() {
            return Ok(Done { trained, trainable, router: None, accuracy: None });
        }
        let eval_data = self.eval_data.as_ref().map(|data| (data, "held-out records"));
        let watched = eval_data.unwrap_or((data, "training records"));
        let steps = trained.steps.len();
        let router = match watch {
            true => {
                let found = health::for_report(model, [&trained.adapter, adapter], watched, steps);
                interrupt::unless_stopped(found)?.flatten()
            }
            false => None,
        };
        if let Some(warning) = router.as_ref().and_then(|router| router.warning.as_ref()) {
            output::warn(warning);
        }
        let done = Done { trained, trainable, router, accuracy: None };
        self.report(&done, dir)?;
        Ok(done)
    }

    /// Writes the report of what is known so far.
    fn report(&self, done: &Done, dir: &RunDir) -> Result<()> {
        let Done { trained, router, accuracy, .. } = done;
        let (options, facts) = (&self.manifest.options, &self.manifest.facts);
        report::Run { options, facts, trained, router: router.as_ref(), accuracy: accuracy.as_ref() }.write(&dir.path)
    }
}

/// Fails if the run's folder isn't what the command needs: a run to resume, or nothing.
fn check_folder(spec: &RunSpec, resume: bool) -> Result<()> {
    let out = spec.out();
    match (resume, manifest::started(out)) {
        (true, false) => bail!("--resume: no run in {}; leave --resume out to start one", out.display()),
        (false, true) => bail!("--out {} holds a run: give --resume to continue it, or another folder", out.display()),
        (false, false) if !vacant(out)? => bail!("--out {} holds files but no run: give another folder", out.display()),
        _ => Ok(()),
    }
}

/// Options that are allowed, and unlikely to be meant.
fn warn_about(config: &TrainConfig, adapter: &Adapter) {
    let TrainConfig { lr, router_lr, warmup, steps, .. } = *config;
    if adapter.config.alpha == 0.0 {
        output::warn("--alpha 0: the adapter has no effect");
    }
    match router_lr {
        None | Some(0.0) if lr == 0.0 => output::warn("--lr 0: nothing is trained"),
        Some(_) if lr == 0.0 => output::warn("--lr 0: only the routers are trained"),
        _ => {}
    }
    if warmup > steps {
        output::warn(&format!(
            "--warmup {warmup} is longer than the run of {steps} steps: the learning rate never reaches --lr"
        ));
    }
}

fn describe_clusters(found: &Clustering) {
    output::say(format_args!("{} heads: {}", found.k, found.reason));
    for (cluster, (size, terms)) in found.sizes.iter().zip(&found.terms).enumerate() {
        output::say(format_args!("  cluster {cluster}: {size} records, {}", output::escaped(&terms.join(" "))));
    }
}

/// Encodes the records of `what`, and says what is unusual about them.
fn encode(encoder: &Encoder<'_>, what: &str, records: &[Record], adapter: &Adapter) -> Result<Encoded> {
    let encoded = encoder.encode(records, &adapter.config.labels).with_context(|| what.to_string())?;
    if let Some(remark) = encoded.remark(encoder.seq_len) {
        output::say(format_args!("{what}: {remark}"));
    }
    let unlabelled = encoded.sequences.iter().filter(|sequence| sequence.lora_head.is_none()).count();
    if unlabelled > 0 && adapter.config.gate == GateKind::Label {
        let all = encoded.sequences.len();
        output::say(format_args!(
            "{what}: {unlabelled} of {all} records have no label with a head, and get the mean of the heads"
        ));
    }
    Ok(encoded)
}
