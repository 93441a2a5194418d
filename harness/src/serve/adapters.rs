//! The adapters that are served: those of the command line, and those that requests load from `--adapter-dir`.

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::worker::Worker;
use hydra_runtime::adapter::{Adapter, AdapterConfig};
use hydra_runtime::config::Config;
use hydra_runtime::printable;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest name of a model or adapter.
const LONGEST_NAME: usize = 128;
/// The most adapters at a time: each takes memory.
pub const MOST_ADAPTERS: usize = 64;

/// What is known of a served adapter.
#[derive(Clone)]
struct Served {
    /// Seconds since 1970.
    since: u64,
    method: &'static str,
    gate: &'static str,
    heads: usize,
    rank: usize,
}

impl Served {
    fn now(config: &AdapterConfig) -> Self {
        let (method, gate) = (config.method.name(), config.gate.name());
        Self { since: now(), method, gate, heads: config.lora_heads, rank: config.rank }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The adapters by name, and where more may come from.
pub struct Adapters {
    /// The model's name.
    pub model: String,
    config: Config,
    /// Whether the model has a chat template.
    chat: bool,
    /// The most tokens of a request, prompt and answer.
    context: usize,
    since: u64,
    /// The folder that requests may load from.
    root: Option<PathBuf>,
    served: Mutex<BTreeMap<String, Served>>,
    worker: Worker,
    /// Held while an adapter is loaded or unloaded, so that names stay unique.
    changing: Arc<tokio::sync::Mutex<()>>,
}

impl Adapters {
    /// None yet. `root` has to be a canonical path.
    pub fn new(
        model: String,
        config: Config,
        chat: bool,
        context: usize,
        root: Option<PathBuf>,
        worker: Worker,
    ) -> Arc<Self> {
        let (served, changing) = (Mutex::default(), Arc::default());
        Arc::new(Self { model, config, chat, context, since: now(), root, served, worker, changing })
    }

    fn served(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.served().len()
    }

    /// The adapter that a request's `model` names; `None` is the model alone.
    pub fn find(&self, name: &str) -> Result<Option<String>> {
        match name {
            name if name == self.model => Ok(None),
            name if self.served().contains_key(name) => Ok(Some(name.into())),
            name => Err(ApiError::no_model(name)),
        }
    }

    /// Serves an adapter under a name.
    pub async fn add(self: &Arc<Self>, name: String, adapter: Adapter) -> Result<()> {
        check_name(&name)?;
        let alone = self.changing.clone().lock_owned().await;
        if name == self.model || self.served().contains_key(&name) {
            return Err(ApiError::invalid(format!("the name {name:?} is taken: unload it, or choose another one")));
        }
        if self.count() >= MOST_ADAPTERS {
            return Err(ApiError::invalid(format!("{MOST_ADAPTERS} adapters are loaded: unload one first")));
        }
        let served = Served::now(&adapter.config);
        // A task of its own: hyper drops the caller when the client has gone, but what the engine has been given has to be listed.
        let adapters = self.clone();
        let adding = tokio::spawn(async move {
            let _alone = alone;
            adapters.worker.attach(name.clone(), adapter).await?;
            adapters.served().insert(name, served);
            Ok(())
        });
        adding.await.map_err(|_| ApiError::internal("adding the adapter has failed"))?
    }

    /// `POST /v1/load_lora_adapter`, with vLLM's fields.
    pub async fn load(self: &Arc<Self>, body: &[u8]) -> Result<String> {
        let root = self.root()?;
        let mut fields = Fields::parse(body)?;
        let (name, path) = (fields.required("lora_name")?, fields.required("lora_path")?);
        fields.ignore(&["lora_int_id", "base_model_name", "load_inplace"]);
        fields.finish()?;
        check_name(&name)?;
        let found = below(root, &path)?;
        let config = self.config.clone();
        let read = tokio::task::spawn_blocking(move || Adapter::load(found, &config)).await;
        let read = read.map_err(|_| ApiError::internal("reading the adapter has failed"))?;
        let adapter = read.map_err(|error| {
            tracing::warn!("load_lora_adapter {path:?}: {error}");
            ApiError::field("lora_path", "not an adapter of this model; the server's log says why")
        })?;
        self.add(name.clone(), adapter).await?;
        Ok(format!("Success: LoRA adapter '{name}' added successfully."))
    }

    /// `POST /v1/unload_lora_adapter`. Requests that use it go on.
    pub async fn unload(&self, body: &[u8]) -> Result<String> {
        self.root()?;
        let mut fields = Fields::parse(body)?;
        let name = fields.required("lora_name")?;
        fields.ignore(&["lora_int_id"]);
        fields.finish()?;
        let _alone = self.changing.lock().await;
        if self.served().remove(&name).is_none() {
            return Err(ApiError::no_adapter(&name));
        }
        self.worker.detach(name.clone()).await?;
        Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
    }

    fn root(&self) -> Result<&Path> {
        self.root.as_deref().ok_or_else(|| {
            ApiError::forbidden("adapters are loaded and unloaded only if the server was started with --adapter-dir")
        })
    }

    /// `GET /v1/models`.
    pub fn list(&self) -> Value {
        let adapters = self.served().clone();
        let adapters = adapters.iter().map(|(name, served)| self.describe_adapter(name, served));
        let data: Vec<_> = [self.describe_model()].into_iter().chain(adapters).collect();
        json!({ "object": "list", "data": data })
    }

    /// `GET /v1/models/NAME`.
    pub fn describe(&self, name: &str) -> Result<Value> {
        match self.find(name)? {
            None => Ok(self.describe_model()),
            Some(name) => {
                let served = self.served().get(&name).cloned().ok_or_else(|| ApiError::no_model(&name))?;
                Ok(self.describe_adapter(&name, &served))
            }
        }
    }

    fn describe_model(&self) -> Value {
        json!({
            "id": self.model, "object": "model", "created": self.since, "owned_by": "hydra", "root": self.model, "parent": null,
            "max_model_len": self.context, "hydra": { "chat": self.chat },
        })
    }

    fn describe_adapter(&self, name: &str, served: &Served) -> Value {
        let Served { since, method, gate, heads, rank } = served;
        json!({
            "id": name, "object": "model", "created": since, "owned_by": "hydra", "root": name, "parent": self.model,
            "hydra": { "method": method, "gate": gate, "heads": heads, "rank": rank },
        })
    }
}

/// Fails unless a name can stand in a URL and in a log.
pub fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.:/@+".contains(c);
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(allowed) {
        let expected = format!("expected 1 to {LONGEST_NAME} letters, digits or characters of -_.:/@+");
        return Err(ApiError::field("lora_name", format!("{expected}, found {:?}", printable(name))));
    }
    Ok(())
}

/// The adapter's folder, or the GGUF file with a LoRA, that a request's path names below `root`, which is canonical. Nothing
/// outside `root` is read, or is said to exist.
fn below(root: &Path, path: &str) -> Result<PathBuf> {
    let refused = || {
        let expected = "expected the path of an adapter's folder or .gguf file, relative to --adapter-dir";
        ApiError::field("lora_path", expected)
    };
    let relative = Path::new(path);
    let plain = |part: Component| matches!(part, Component::Normal(_));
    if path.is_empty() || path.contains(['\0', '\\']) || !relative.components().all(plain) {
        return Err(refused());
    }
    // Symbolic links are followed first, and then have to be inside.
    let inside = |path: PathBuf| path.canonicalize().ok().filter(|path| path.starts_with(root)).ok_or_else(refused);
    let found = inside(root.join(relative))?;
    if found.is_file() {
        return if found.extension().is_some_and(|end| end == "gguf") { Ok(found) } else { Err(refused()) };
    }
    // What is in the folder has to lie below `root`, too.
    for file in Adapter::files(&found).map_err(|_| refused())? {
        inside(file)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(check_name("org/run-1.2:v3").is_ok());
        for wrong in ["", "a b", "a\nb", "ü", &"x".repeat(129), "<script>"] {
            assert!(check_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_adapter_is_listed_although_its_client_has_gone() {
        use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
        use hydra_runtime::checkpoint::Checkpoint;
        use hydra_runtime::model::Model;
        use hydra_runtime::serve::{Engine, EngineOptions};
        use std::time::{Duration, Instant};

        let checkpoint = Checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model")).unwrap();
        let config = checkpoint.config().clone();
        let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        let model = Model::load(cpu, &checkpoint).unwrap();
        let engine = Engine::new(&model, EngineOptions::default()).unwrap();
        let (worker, _end) = Worker::start(model, engine, Arc::default()).unwrap();
        let adapter = Adapter::init(&config, AdapterConfig::default(), 0).unwrap();
        let adapters = Adapters::new("m".into(), config, false, 512, None, worker);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut adding = Box::pin(adapters.add("a".into(), adapter));
            let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(adding.as_mut().poll(cx).is_pending())).await;
            assert!(waits, "the engine's thread is asked");
            drop(adding);
            let started = Instant::now();
            while adapters.count() == 0 {
                assert!(started.elapsed() < Duration::from_secs(60), "it is not listed");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(adapters.find("a").unwrap().as_deref(), Some("a"));
        });
    }

    #[cfg(unix)]
    #[test]
    fn paths_stay_below_the_folder() {
        use std::os::unix::fs::symlink;
        let scratch = tempfile::tempdir().unwrap();
        let at = |path: &str| scratch.path().join(path);
        const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
        for folder in ["root/good", "root/sub/deep", "root/leaks", "outside"] {
            std::fs::create_dir_all(at(folder)).unwrap();
            for file in FILES {
                if folder != "root/leaks" {
                    std::fs::write(at(folder).join(file), "").unwrap();
                }
            }
        }
        std::fs::write(at("root/lora.gguf"), "").unwrap();
        std::fs::write(at("root/notes.txt"), "").unwrap();
        std::fs::write(at("outside/lora.gguf"), "").unwrap();
        symlink(at("outside/lora.gguf"), at("root/other.gguf")).unwrap();
        symlink(at("outside"), at("root/escape")).unwrap();
        symlink(at("root/good"), at("root/link")).unwrap();
        for file in FILES {
            symlink(at("outside").join(file), at("root/leaks").join(file)).unwrap();
        }
        let root = at("root").canonicalize().unwrap();
        for good in ["good", "sub/deep", "link", "good/", "lora.gguf"] {
            assert!(below(&root, good).unwrap().starts_with(&root), "{good}");
        }
        let absolute = at("root/good").display().to_string();
        for bad in [
            "",
            ".",
            "..",
            "../outside",
            "good/../../outside",
            "/etc",
            &absolute,
            "escape",
            "leaks",
            "other.gguf",
            "notes.txt",
            "good/adapter_config.json",
            "escape/lora.gguf",
            "none",
            "a\0b",
            "a\\b",
        ] {
            let error = below(&root, bad).expect_err(bad);
            assert_eq!((error.status.as_u16(), error.message.contains("outside")), (400, false), "{bad:?}");
        }
    }
}
