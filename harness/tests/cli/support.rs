//! A scratch folder, the golden cases, and the binary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A golden case's folder: model/, adapter/, data.jsonl.
pub fn golden(method: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(method)
}

/// The demo's folder: model/, corpus/, mmlu/.
pub fn assets(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join(path).display().to_string()
}

/// A file of JSON.
pub fn json(path: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// All files in a folder and in those in it, by their paths there. A folder is there, too, as a name without bytes.
pub fn files(folder: impl AsRef<Path>) -> BTreeMap<String, Vec<u8>> {
    let folder = folder.as_ref();
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            let bytes = if path.is_dir() { Vec::new() } else { std::fs::read(&path).unwrap() };
            found.insert(name, bytes);
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

/// A folder that is removed when its test ends.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new(name: &str) -> Self {
        Self(tempfile::Builder::new().prefix(&format!("hydra-cli-{name}-")).tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self.path(name)
    }

    /// The names of what is in it, or in a folder of it.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path().join(folder)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

pub fn command(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hydra"));
    command.args(arguments.split_whitespace());
    command
}

pub fn hydra(arguments: &str) -> Output {
    command(arguments).output().unwrap()
}

#[track_caller]
pub fn succeeds(arguments: &str) -> String {
    let output = hydra(arguments);
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Fails with `code` and one line that has all of `wanted` in it.
#[track_caller]
pub fn fails(code: i32, arguments: &str, wanted: &[&str]) {
    let output = hydra(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments}: {said}");
    assert!(said.starts_with("error: "), "{said}");
    for word in wanted {
        assert!(said.contains(word), "{word:?} in {said}");
    }
}

/// Ctrl-C and SIGTERM end `line`, which works for seconds on what it writes into the scratch folder's `folder`; nothing is left there.
#[cfg(unix)]
#[track_caller]
pub fn stopped_leaves_nothing(scratch: &Scratch, line: &str) {
    use std::process::Stdio;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut child = command(line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let inside = || std::fs::read_dir(scratch.path("folder")).map_or(0, Iterator::count);
        while inside() == 0 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // It listens from a moment later on.
        std::thread::sleep(std::time::Duration::from_millis(200));
        // SAFETY: kill(2) has no memory to get wrong; the child has not been waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len(), inside()), (Some(130), 0, 0), "{line}");
    }
}

/// A fine-tune of a golden case as PyTorch did it.
pub fn finetune(method: &str, out: &str, more: &str) -> String {
    let case = golden(method);
    let (model, data) = (case.join("model"), case.join("data.jsonl"));
    format!("finetune --model {} --data {} --out {out} {more}", model.display(), data.display())
}

/// The numbers of a key in a file of JSON lines.
pub fn column(path: &str, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()[key].as_f64().unwrap()).collect()
}
