//! Runs compiled PTX on the emulator: the compiler's output instead of the source.
//!
//! The text is decoded once (`parse.rs`). Each emulated thread then interprets its program (`run.rs`), with the same
//! memory, collectives and checks as the source. Values are 64-bit slots that are read in the width of an instruction's
//! type.

mod arithmetic;
mod parse;
mod run;

use super::{Grid, Kind, block, memory};
use run::Thread;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A module's kernels by name.
pub struct Module(BTreeMap<String, Rc<Program>>);

struct Program {
    params: Vec<Kind>,
    code: Vec<Instruction>,
    registers: usize,
}

struct Instruction {
    /// The instruction runs only if this register is true, or false if the flag is set.
    guard: Option<(usize, bool)>,
    op: Op,
    operands: Vec<Operand>,
    line: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    Pred,
    U(u32),
    S(u32),
    F32,
    F64,
}

#[derive(Clone, Debug)]
enum Operand {
    Register(usize),
    Value(u64),
    Param(usize),
    Special(Special),
    Address(Box<Operand>, i64),
    Group(Vec<Operand>),
    Label(usize),
}

#[derive(Clone, Copy, Debug)]
enum Special {
    Thread,
    Threads,
    BlockX,
    BlockY,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Move,
    /// A move of this number of bits, of which each side may be a group of parts.
    Repack(u32),
    Two(Binary, Type),
    MulWide(Type),
    Mad(Type),
    Fma,
    Not(Type),
    Neg(Type),
    Reciprocal,
    Root,
    Exp2,
    Bits(Type),
    /// The flag says that the result is true where an operand is NaN.
    Set(Compare, bool, Type),
    Select,
    Convert(Type, Type),
    Pack,
    LoadGlobal(u32),
    StoreGlobal(u32),
    LoadShared(u32),
    StoreShared(u32),
    Ldmatrix(bool),
    Mma,
    Shuffle,
    Barrier,
    Nothing,
    CopyAsync,
    CopyCommit,
    CopyWait,
    ProxyFence,
    WgmmaFence,
    Wgmma,
    WgmmaCommit,
    WgmmaWait,
    Branch,
    Return,
}

#[derive(Clone, Copy, Debug)]
enum Binary {
    Add,
    Sub,
    Mul,
    MulHigh,
    Div,
    Rem,
    Min,
    Max,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

impl Module {
    /// Decodes a module.
    ///
    /// # Panics
    /// If an instruction isn't known.
    pub fn new(text: &str) -> Self {
        let program = |(name, program): (&str, Program)| (name.to_string(), Rc::new(program));
        Self(parse::programs(text).map(program).collect())
    }

    /// Whether it has a kernel of this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Runs a kernel over a grid, as [`super::launch`] does.
    ///
    /// # Safety
    /// As of [`super::launch`].
    pub unsafe fn launch(&self, name: &str, grid: Grid, slots: &[u64]) {
        let program = self.0.get(name).unwrap_or_else(|| panic!("no kernel {name}"));
        assert_eq!(program.params.len(), slots.len(), "{name}: parameters");
        let (program, slots) = (program.clone(), slots.to_vec());
        let thread: block::Body = Rc::new(move || program.run(&slots));
        for y in 0..grid.blocks[1] {
            for x in 0..grid.blocks[0] {
                block::run(&thread, grid, [x, y]);
            }
        }
        memory::next_launch();
    }
}

impl Type {
    fn bits(self) -> u32 {
        match self {
            Type::Pred => 1,
            Type::U(bits) | Type::S(bits) => bits,
            Type::F32 => 32,
            Type::F64 => 64,
        }
    }

    /// The integer in a slot, sign- or zero-extended.
    fn integer(self, slot: u64) -> i128 {
        let unused = 64 - self.bits();
        match self {
            Type::S(_) => i128::from((slot << unused) as i64 >> unused),
            _ => i128::from(slot << unused >> unused),
        }
    }
}

impl Program {
    /// Runs one thread.
    fn run(&self, slots: &[u64]) {
        let mut thread = Thread { registers: vec![0; self.registers], slots };
        let mut next = 0;
        loop {
            let instruction = &self.code[next];
            next += 1;
            if let Some((register, negated)) = instruction.guard
                && (thread.registers[register] != 0) == negated
            {
                continue;
            }
            match instruction.op {
                Op::Branch => {
                    let Operand::Label(target) = instruction.operands[0] else { panic!("a branch without a label") };
                    next = target;
                }
                Op::Return => return,
                _ => thread.step(instruction),
            }
        }
    }
}
