//! The binary as its users meet it, on the tiny models of the runtime's golden cases.

#[path = "cli/accuracy.rs"]
mod accuracy;
#[path = "cli/analyze.rs"]
mod analyze;
#[path = "cli/bad_input.rs"]
mod bad_input;
#[path = "cli/browser.rs"]
mod browser;
#[path = "cli/chat.rs"]
mod chat;
#[path = "cli/cluster.rs"]
mod cluster;
#[path = "cli/compare.rs"]
mod compare;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "cli/crash.rs"]
mod crash;
#[path = "cli/data.rs"]
mod data;
#[path = "cli/evaluate.rs"]
mod evaluate;
#[path = "cli/export.rs"]
mod export;
#[path = "cli/heterogeneity.rs"]
mod heterogeneity;
#[path = "cli/hub.rs"]
mod hub;
#[path = "cli/killed.rs"]
mod killed;
#[cfg(target_os = "linux")]
#[path = "cli/limits.rs"]
mod limits;
#[cfg(target_os = "linux")]
#[path = "cli/memory.rs"]
mod memory;
#[path = "cli/merge.rs"]
mod merge;
#[path = "cli/page.rs"]
mod page;
#[cfg(unix)]
#[path = "cli/pipes.rs"]
mod pipes;
#[cfg(not(feature = "mpi"))]
#[path = "cli/ranks.rs"]
mod ranks;
#[path = "cli/readme.rs"]
mod readme;
#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/runs.rs"]
mod runs;
#[path = "cli/serve.rs"]
mod serve;
#[path = "cli/server.rs"]
mod server;
#[path = "cli/sharing.rs"]
mod sharing;
#[path = "cli/support.rs"]
mod support;
#[path = "cli/tables.rs"]
mod tables;
