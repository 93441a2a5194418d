//! A kill before every system call that changes files: the next run ends in the same bytes, and nothing is left lying about.
//!
//! The process runs under ptrace(2) and is killed as it enters its n-th such call. A few n are tried by default;
//! `HYDRA_CRASH_POINTS=all` tries all of them.

use super::support::{Scratch, assets, command, files, finetune, golden, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

/// Points that are tried of each command without `HYDRA_CRASH_POINTS`.
const POINTS: usize = 40;

/// ptrace's `struct ptrace_syscall_info`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    op: u8,
    padding: [u8; 3],
    arch: u32,
    instruction: u64,
    stack: u64,
    number: u64,
    arguments: [u64; 6],
    rest: [u64; 2],
}

/// From linux/ptrace.h.
const GET_SYSCALL_INFO: libc::c_uint = 0x420E;
const ENTRY: u8 = 1;

impl SyscallInfo {
    /// Whether this is the entry of a call that changes files.
    fn changes_files(&self) -> bool {
        let [first, second, third, ..] = self.arguments;
        let creates = |flags: u64| flags & libc::O_CREAT as u64 != 0;
        let number = self.number as libc::c_long;
        self.op == ENTRY
            && match number {
                libc::SYS_open => creates(second),
                libc::SYS_openat => creates(third),
                libc::SYS_write | libc::SYS_writev | libc::SYS_pwrite64 | libc::SYS_sendfile => first > 2,
                _ => CHANGING.contains(&number),
            }
    }
}

const CHANGING: [libc::c_long; 23] = [
    libc::SYS_creat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_copy_file_range,
    libc::SYS_pwritev,
    libc::SYS_flock,
];

/// What a traced process came to.
enum Traced {
    /// It succeeded, after this many calls that change files.
    Done(usize),
    /// It was killed.
    Killed,
    /// ptrace isn't permitted here.
    Refused,
}

fn ptrace(request: libc::c_uint, process: libc::pid_t, address: usize, data: usize) -> libc::c_long {
    // SAFETY: all requests used here take numbers, but GET_SYSCALL_INFO, whose caller gives a place of the size it says.
    unsafe { libc::ptrace(request, process, address, data) }
}

/// Waits for any process or thread that this thread traces. Other tests run in threads of their own.
fn wait() -> (libc::pid_t, libc::c_int) {
    let mut status = 0;
    // SAFETY: `status` is a place for the status.
    let process = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
    (process, status)
}

/// Runs a command line, and kills it before its `kill_at`-th call that changes files, from 0.
fn traced(line: &str, kill_at: Option<usize>) -> Traced {
    let mut command = command(line);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: ptrace may be called between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let Ok(child) = command.spawn() else { return Traced::Refused };
    let main = child.id() as libc::pid_t;
    let (mut calls, mut begun, mut killed) = (0, false, false);
    loop {
        let (process, status) = wait();
        assert!(process > 0, "{line}: {}", std::io::Error::last_os_error());
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            match process == main {
                true if killed => return Traced::Killed,
                true => {
                    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{line}: status {status}");
                    return Traced::Done(calls);
                }
                false => continue,
            }
        }
        let mut signal = libc::WSTOPSIG(status);
        if !begun {
            // After exec.
            begun = true;
            let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
            if ptrace(libc::PTRACE_SETOPTIONS, main, 0, options as usize) != 0 {
                ptrace(libc::PTRACE_KILL, main, 0, 0);
                return Traced::Refused;
            }
            signal = 0;
        } else if signal == libc::SIGTRAP | 0x80 {
            signal = 0;
            let mut info = SyscallInfo::default();
            let place = (&raw mut info) as usize;
            if ptrace(GET_SYSCALL_INFO, process, size_of::<SyscallInfo>(), place) > 0 && info.changes_files() {
                if kill_at == Some(calls) && !killed {
                    killed = true;
                    // SAFETY: the process is this function's own and has not been waited for.
                    unsafe { libc::kill(main, libc::SIGKILL) };
                }
                calls += 1;
            }
        } else if status >> 16 != 0 || signal == libc::SIGSTOP {
            // A new thread, told by its parent and by its first stop.
            signal = 0;
        }
        ptrace(libc::PTRACE_SYSCALL, process, 0, signal as usize);
    }
}

/// Kills `line` at each point, runs what `again` says until it succeeds, and passes the files in `folder` to `check`.
fn sweep(name: &str, line: &str, folder: &str, again: impl Fn() -> Option<String>, check: impl Fn(&str)) {
    let clear = || {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).unwrap();
    };
    clear();
    let total = match traced(line, None) {
        Traced::Done(total) => total,
        _ => return println!("{name}: skipped, because ptrace isn't permitted here"),
    };
    check("without a kill");
    let all = std::env::var("HYDRA_CRASH_POINTS").is_ok_and(|points| points == "all");
    assert!(total > 0, "{name}: no file was written");
    let step = if all { 1 } else { total.div_ceil(POINTS) };
    let mut points: Vec<usize> = (0..total).step_by(step).collect();
    if points.last() != Some(&(total - 1)) {
        points.push(total - 1);
    }
    for &point in &points {
        clear();
        assert!(matches!(traced(line, Some(point)), Traced::Killed), "{name}: point {point} of {total}");
        if let Some(again) = again() {
            super::support::succeeds(&again);
        }
        check(&format!("{name}: killed before call {point} of {total}"));
    }
    println!("{name}: killed at {} of {total} points", points.len());
}

fn no_litter(files: &BTreeMap<String, Vec<u8>>, when: &str) {
    let hidden = |name: &str| name.split('/').any(|part| part.starts_with('.') && part != ".lock");
    let litter: Vec<_> = files.keys().filter(|name| hidden(name)).collect();
    assert!(litter.is_empty(), "{when}: {litter:?}");
}

/// The files that don't hold times.
fn lasting(files: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let same = ["adapter_model.safetensors", "adapter_config.json", "trainer_state.safetensors", "evals.jsonl"];
    files.into_iter().filter(|(name, _)| same.iter().any(|end| name.ends_with(end))).collect()
}

#[test]
fn finetune_killed_anywhere() {
    let scratch = Scratch::new("crash-finetune");
    let data = golden("hydra").join("data.jsonl").display().to_string();
    let options =
        format!("--targets q --batch 2 --steps 2 --save-every 1 --threads 1 --eval-data {data} --eval-every 1");
    let (parent, out) = (scratch.path("parent"), scratch.path("parent/run"));
    let line = finetune("hydra", &out, &options);
    let whole = scratch.path("whole");
    super::support::succeeds(&finetune("hydra", &whole, &options));
    let whole = lasting(files(Path::new(&whole)));
    assert!(whole.len() == 4, "{:?}", whole.keys());
    let again =
        || Some(if Path::new(&out).join("run.json").exists() { format!("{line} --resume") } else { line.clone() });
    sweep("finetune", &line, &parent, again, |when| {
        let found = files(Path::new(&parent));
        no_litter(&found, when);
        assert!(lasting(files(Path::new(&out))) == whole, "{when}: other bytes");
    });
}

#[test]
fn compare_killed_anywhere() {
    let scratch = Scratch::new("crash-compare");
    let case = golden("hydra");
    let (model, data) = (case.join("model").display().to_string(), case.join("data.jsonl").display().to_string());
    let config = scratch.write(
        "c.toml",
        "seeds = [1]\n[defaults]\nsteps = 1\ntargets = 'q'\n[[run]]\nname = 'a'\n\
         [[run]]\nname = 'b'\ngate = 'uniform'\n",
    );
    let line = |out: &str| {
        let files = format!("--model {model} --data {data} --eval-data {data} --config {config}");
        format!("compare {files} --threads 1 --out {out}")
    };
    let rows = |out: &str| {
        let table = json(&format!("{out}/compare.json"));
        table["rows"].as_array().unwrap().iter().map(|row| row["scores"].clone()).collect::<Vec<_>>()
    };
    let whole = scratch.path("whole");
    super::support::succeeds(&line(&whole));
    let (adapters, table) = (lasting(files(Path::new(&whole))), rows(&whole));
    let (parent, out) = (scratch.path("parent"), scratch.path("parent/c"));
    let line = line(&out);
    sweep(
        "compare",
        &line,
        &parent,
        || Some(line.clone()),
        |when| {
            no_litter(&files(Path::new(&parent)), when);
            assert!(rows(&out) == table, "{when}: another table");
            assert!(lasting(files(Path::new(&out))) == adapters, "{when}: other bytes");
        },
    );
}

#[test]
fn merge_export_and_cluster_killed_anywhere() {
    let scratch = Scratch::new("crash-folders");
    let case = golden("lora");
    let (model, adapter) = (case.join("model").display().to_string(), case.join("adapter").display().to_string());
    let data = assets("corpus/test.jsonl");
    let export = format!("export --model {model} --adapter {adapter} --format");
    // What is written is a folder, or a file in one.
    for (name, line, file) in [
        ("merge", format!("merge --model {model} --adapter {adapter}"), ""),
        ("cluster", format!("cluster --data {data} --k 2"), ""),
        ("peft", format!("{export} peft"), ""),
        ("hf", format!("{export} hf"), ""),
        ("gguf", format!("{export} gguf"), "/m.gguf"),
        ("gguf-lora", format!("{export} gguf-lora"), "/lora.gguf"),
    ] {
        let whole = scratch.path(&format!("whole-{name}"));
        super::support::succeeds(&format!("{line} --out {whole}{file}"));
        let whole = files(Path::new(&whole));
        let (parent, out) = (scratch.path(name), scratch.path(&format!("{name}/new")));
        let (line, other) = (format!("{line} --out {out}{file}"), format!("{line} --out {out}/other.gguf"));
        // If it is there, it is complete. Beside a file lies the folder in which it was written, until the next command there.
        let again = || match Path::new(&format!("{out}{file}")).exists() {
            true => (!file.is_empty()).then(|| other.clone()),
            false => Some(line.clone()),
        };
        sweep(name, &line, &parent, again, |when| {
            assert_eq!(scratch.names(name), ["new"], "{when}");
            let _ = fs::remove_file(Path::new(&out).join("other.gguf"));
            let found = files(Path::new(&out));
            no_litter(&found, when);
            let differs = found.keys().chain(whole.keys()).find(|name| found.get(*name) != whole.get(*name));
            assert!(differs.is_none(), "{when}: {differs:?}");
        });
    }
}
