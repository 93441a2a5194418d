//! `hydra finetune`: one run, from the command line or a file.

use crate::eval::loss::{EvalLoss, Loss};
use crate::ranks::{self, Ranks};
use crate::run::prepare::{Done, finetune};
use crate::run::spec::RunSpec;
use crate::{interrupt, output};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

/// Options of `finetune`. The defaults are the published settings.
#[derive(Args, Clone)]
#[command(
    override_usage = "hydra finetune --model <PATH> --data <FILE>... --out <DIR> [OPTIONS]\n       \
    hydra finetune --config <FILE> [OPTIONS]",
    after_help = "Under mpirun or srun, all ranks share the work, and the result is bit-identical to that of one process. This needs a build \
    with the feature `mpi`."
)]
pub struct Arguments {
    /// Read options from a TOML file, or from the run.json of an earlier run to repeat it; the command line takes precedence
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    spec: RunSpec,
    /// Continue the run in --out, which must have the same options
    #[arg(long, help_heading = "Output")]
    resume: bool,
}

/// Trains, and shows the eval loss before and after.
pub fn run(arguments: Arguments) -> Result<()> {
    ranks::share(|ranks| run_on(arguments, ranks))
}

fn run_on(arguments: Arguments, ranks: &Ranks) -> Result<()> {
    let spec = match &arguments.config {
        Some(path) => ranks.agree(RunSpec::read(path).and_then(|base| arguments.spec.over(&base)))?,
        None => arguments.spec,
    };
    let out = spec.out().to_path_buf();
    let Done { trained, router, accuracy, .. } = finetune(spec, arguments.resume, ranks)?;
    if let [first, .., last] = trained.evals.as_slice() {
        output::print(before_and_after(&first.loss, &last.loss))?;
    }
    if let Some([before, after]) = &accuracy {
        output::print(before.table_beside(after))?;
    }
    if let Some(router) = router {
        output::print(router.text())?;
    }
    let stopped = if interrupt::requested() { ": stopped; --resume continues the run" } else { "" };
    output::print(format_args!("{}{stopped}\n", out.display()))?;
    Ok(())
}

fn before_and_after(before: &EvalLoss, after: &EvalLoss) -> String {
    let rows = before.categories.iter().filter_map(|(name, b)| Some((name.as_str(), *b, *after.categories.get(name)?)));
    let row = |(name, before, after): (&str, Loss, Loss)| {
        let [before_, after] = [before, after].map(|loss| format!("{:.4}", loss.loss));
        vec![output::printable(name), before.records.to_string(), before_, after]
    };
    let rows: Vec<Vec<String>> = rows.chain([("all", before.all, after.all)]).map(row).collect();
    output::text_table(&["eval loss", "records", "before", "after"].map(str::to_owned), &rows)
}
