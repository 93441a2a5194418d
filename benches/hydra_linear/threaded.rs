//! The operator's phases on many threads, as an engine calls them.

use crate::{Memory, Problem};
use hydra_kernels::hydra::{
    Backward, BackwardArgs, Block, Forward, ForwardArgs, GRADIENT_COLUMNS, Operand, adapter_rows_scratch, column_block,
    db_columns_scratch, dx_rows_scratch, output_rows_scratch, row_step, stacked_columns_scratch,
};
use hydra_kernels::{Accumulate, Element, Error, PANEL_ALIGN, Scratch, Workspace};
use std::hint::black_box;
use std::ops::Range;
use std::sync::Mutex;

/// Threads that share out a phase's ranges.
#[derive(Clone, Copy)]
pub struct Threads(pub usize);

impl Threads {
    fn each<T: Send>(self, tasks: impl IntoIterator<Item = T>, run: impl Fn(T) -> Result<(), Error> + Sync) {
        let tasks = Mutex::new(tasks.into_iter().collect::<Vec<_>>().into_iter());
        let work = || {
            while let Some(task) = { tasks.lock().unwrap().next() } {
                run(task).unwrap();
            }
        };
        std::thread::scope(|scope| {
            (1..self.0).for_each(|_| drop(scope.spawn(work)));
            work();
        });
    }

    /// Rows of a range: whole steps, two ranges a thread.
    fn rows<E: Element>(self, tokens: usize) -> usize {
        let step = row_step::<E>();
        step * tokens.div_ceil(step).div_ceil(2 * self.0).max(1)
    }

    fn pack<'p, E: Element>(self, operand: Operand<'_, E>, data: &'p mut Vec<E>) -> &'p [E] {
        let columns = operand.columns().div_ceil(PANEL_ALIGN).div_ceil(2 * self.0).max(1) * PANEL_ALIGN;
        data.resize(operand.panels_len(operand.columns()), E::zeroed());
        let parts = data.chunks_mut(operand.panels_len(columns).max(1)).zip(ranges(operand.columns(), columns));
        self.each(parts, |(part, columns)| operand.pack(columns, part));
        data
    }

    fn pack_block<E: Element>(self, block: Block<'_, E>, [frozen, adapter]: &mut [Vec<E>; 2]) {
        self.pack(block.frozen, frozen);
        self.pack(block.adapter, adapter);
    }
}

fn ranges(total: usize, len: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..total).step_by(len).map(move |first| first..total.min(first + len))
}

/// A matrix [rows, width] in parts of `share` rows; `width` may be 0.
fn row_parts(mut data: &mut [f32], rows: usize, share: usize, width: usize) -> impl Iterator<Item = &mut [f32]> {
    (0..rows).step_by(share).map(move |_| {
        let end = data.len().min(share * width);
        let (part, rest) = std::mem::take(&mut data).split_at_mut(end);
        data = rest;
        part
    })
}

/// A task's memory. (A real caller keeps it from one call to the next.)
fn with_scratch(need: Scratch, run: impl FnOnce(&mut Workspace<'_>) -> Result<(), Error>) -> Result<(), Error> {
    run(&mut Workspace::new(&mut vec![0.0; need.0]))
}

impl Problem {
    /// [`Problem::forward`] on many threads.
    pub fn forward_on<E: Element>(&self, threads: Threads, isa: E::Isa, adapted: bool, memory: &mut Memory) {
        let (layer, tokens) = (self.layer(adapted), self.tokens);
        let shape = &layer.shape();
        let (width, mixed_width, d_out) = (shape.state_width(), shape.mixed_width(), shape.d_out);
        let args = ForwardArgs::new(tokens, black_box(&self.x[..]));
        let forward = Forward::<E>::new(isa, layer, args).unwrap();
        let (mut mixed, mut stacked) = (vec![0.0; tokens * mixed_width], Vec::new());
        let [a, router] = forward.stacked();
        let stacked = [a.panels(threads.pack(a, &mut stacked)).unwrap(), router.panels(&[]).unwrap()];
        let (rows, mut panels) = (threads.rows::<E>(tokens), [Vec::new(), Vec::new()]);
        for columns in ranges(d_out, column_block(shape.d_in)) {
            let (first, n) = (columns.start == 0, columns.len());
            let block = forward.block(columns).unwrap();
            threads.pack_block(block, &mut panels);
            let block = block.packed(&panels[0], &panels[1]).unwrap();
            let states = row_parts(&mut memory.adapter_state, tokens, rows, width);
            let states = states.zip(row_parts(&mut mixed, tokens, rows, mixed_width));
            let tasks = ranges(tokens, rows).zip(memory.y.chunks_mut(rows * d_out)).zip(states);
            threads.each(tasks, |((rows, y), (adapter_state, mixed))| {
                let scratch = adapter_rows_scratch::<E>(shape, rows.len(), false);
                with_scratch(scratch.or(output_rows_scratch::<f32>(shape, rows.len(), n)), |scratch| {
                    if first {
                        forward.adapter_rows(rows.clone(), &stacked, adapter_state, mixed, scratch)?;
                    }
                    forward.output_rows(rows, &block, mixed, y, scratch)
                })
            });
        }
    }

    /// [`Problem::backward`] on many threads.
    pub fn backward_on<E: Element>(&self, threads: Threads, isa: E::Isa, adapted: bool, memory: &mut Memory) {
        let (layer, tokens) = (self.layer(adapted), self.tokens);
        let shape = &layer.shape();
        let (width, mixed_width, d_in) = (shape.state_width(), shape.mixed_width(), shape.d_in);
        let args = BackwardArgs::new(tokens, &self.dy[..], black_box(&self.x[..]));
        let backward = Backward::<E>::new(isa, layer, args, &memory.adapter_state[..tokens * width]).unwrap();
        let (mut d_adapter_state, mut mixed) = (vec![0.0; tokens * width], vec![0.0; tokens * mixed_width]);
        let mut lora_up = Vec::new();
        let lora_up = backward.lora_up().panels(threads.pack(backward.lora_up(), &mut lora_up)).unwrap();
        let (rows, mut panels) = (threads.rows::<E>(tokens), [Vec::new(), Vec::new()]);
        for columns in ranges(d_in, column_block(shape.d_out)) {
            let (first, n) = (columns.start == 0, columns.len());
            let block = backward.block(columns).unwrap();
            threads.pack_block(block, &mut panels);
            let block = block.packed(&panels[0], &panels[1]).unwrap();
            let states = row_parts(&mut d_adapter_state, tokens, rows, width);
            let states = states.zip(row_parts(&mut mixed, tokens, rows, mixed_width));
            let tasks = ranges(tokens, rows).zip(memory.dx.chunks_mut(rows * d_in)).zip(states);
            threads.each(tasks, |((rows, dx), (d_adapter_state, mixed))| {
                if first {
                    backward.state_rows(rows.clone(), &lora_up, &[], d_adapter_state, mixed)?;
                }
                with_scratch(dx_rows_scratch::<f32>(shape, rows.len(), n), |scratch| {
                    backward.dx_rows(rows, &block, d_adapter_state, (dx, Accumulate::Overwrite), scratch)
                })
            });
        }
        if !adapted {
            return;
        }
        let columns = ranges(shape.d_out, GRADIENT_COLUMNS);
        threads.each(columns.zip(memory.db.chunks_mut(GRADIENT_COLUMNS * mixed_width)), |(columns, db)| {
            let need = db_columns_scratch::<E>(shape, tokens, columns.len());
            with_scratch(need, |scratch| backward.db_columns(columns, &mixed, db, scratch))
        });
        let [all, _] = backward.stacked_parts();
        let mut sums = vec![0.0; all.rows() * d_in];
        let tasks = ranges(d_in, GRADIENT_COLUMNS).zip(sums.chunks_mut(all.rows() * GRADIENT_COLUMNS));
        threads.each(tasks, |(columns, sums)| {
            with_scratch(stacked_columns_scratch::<E>(tokens, columns.len()), |scratch| {
                backward.stacked_columns(&all, columns, &d_adapter_state, &[], sums, scratch)
            })
        });
        for (columns, sums) in ranges(d_in, GRADIENT_COLUMNS).zip(sums.chunks(all.rows() * GRADIENT_COLUMNS)) {
            all.add_to(&mut memory.da, d_in, columns, sums).unwrap();
        }
    }
}
