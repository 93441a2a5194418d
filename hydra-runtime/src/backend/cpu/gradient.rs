//! The phases of an adapter's own gradients, shared out by columns.

use super::buffer::{Element, row_parts};
use super::exec::Exec;
use super::workspace::Workspace;
use crate::Result;
use hydra_kernels::gemm::PANEL_ALIGN;
use hydra_kernels::hydra::{
    AdapterGradients, Backward, BackwardArgs, GRADIENT_COLUMNS, StackedPart, db_columns_scratch,
    stacked_columns_scratch,
};

/// Most panels of columns in a task.
const PANELS: usize = GRADIENT_COLUMNS / PANEL_ALIGN;

/// Adds the adapter's gradients. The phases over rows have left the mixed heads and the gradient of the adapter's state
/// in the workspace.
pub(super) fn adapter_gradients<E: Element>(
    exec: Exec<'_, E>,
    backward: &Backward<'_, E>,
    args: &BackwardArgs<'_>,
    AdapterGradients { da, db }: AdapterGradients<'_>,
    workspace: &mut Workspace,
) -> Result<()> {
    let (cpu, shape, tokens) = (exec.cpu, backward.shape(), args.tokens);
    let (d_in, d_out, width) = (shape.d_in, shape.d_out, shape.mixed_width());
    let mixed = &*workspace.mixed.take::<f32>(tokens * width)?;
    let columns = cpu.column_share(d_out, PANELS);
    let scratch = db_columns_scratch::<E>(&shape, tokens, columns);
    cpu.threads.each(row_parts(db, d_out, columns, width), |i, db| {
        let columns = i * columns..d_out.min((i + 1) * columns);
        cpu.with_workspace(scratch, |workspace| Ok(backward.db_columns(columns, mixed, db, workspace)?))
    })?;
    let dropping = args.dropouts.input.is_some();
    let dropped = workspace.dropped.take::<E>(if dropping { tokens * d_in } else { 0 })?;
    if dropping {
        let rows = cpu.row_chunk(tokens);
        cpu.threads.each(row_parts(dropped, tokens, rows, d_in), |i, dropped| {
            Ok(backward.dropped_rows(i * rows..tokens.min((i + 1) * rows), dropped)?)
        })?;
    }
    let d_adapter_state = &*workspace.d_adapter_state.take::<f32>(tokens * shape.state_width())?;
    for part in backward.stacked_parts() {
        let sums = workspace.gradient.take::<f32>(part.rows() * d_in)?;
        add_part(exec, backward, args, (&part, da), (d_adapter_state, dropped), sums)?;
    }
    Ok(())
}

/// Adds the gradient of some rows of \[A; R\].
fn add_part<E: Element>(
    exec: Exec<'_, E>,
    backward: &Backward<'_, E>,
    args: &BackwardArgs<'_>,
    (part, da): (&StackedPart, &mut [f32]),
    (d_adapter_state, dropped): (&[f32], &[E]),
    sums: &mut [f32],
) -> Result<()> {
    let (cpu, d_in) = (exec.cpu, backward.shape().d_in);
    let share = cpu.column_share(d_in, PANELS);
    let scratch = stacked_columns_scratch::<E>(args.tokens, share);
    let columns = |i: usize| i * share..d_in.min((i + 1) * share);
    cpu.threads.each(row_parts(sums, d_in, share, part.rows()), |i, sums| {
        cpu.with_workspace(scratch, |workspace| {
            Ok(backward.stacked_columns(part, columns(i), d_adapter_state, dropped, sums, workspace)?)
        })
    })?;
    for (i, sums) in row_parts(sums, d_in, share, part.rows()).enumerate() {
        part.add_to(da, d_in, columns(i), sums)?;
    }
    Ok(())
}
