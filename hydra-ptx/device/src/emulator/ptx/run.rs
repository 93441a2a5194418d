//! Runs a program's instructions: one thread's registers, and the effect of each operation on them.

use super::arithmetic::{convert, f32_of, set, slot_of, two};
use super::{Instruction, Op, Operand, Special, Type};
use crate::emulator::block::{Place, Request, ask, with_block};
use crate::emulator::wgmma::Operands;
use crate::prelude::pack_bf16;

/// A thread that runs a program.
pub(super) struct Thread<'a> {
    pub registers: Vec<u64>,
    /// The launch's parameters.
    pub slots: &'a [u64],
}

impl Thread<'_> {
    fn get(&self, operand: &Operand) -> u64 {
        match operand {
            Operand::Register(register) => self.registers[*register],
            Operand::Value(value) => *value,
            Operand::Param(param) => self.slots[*param],
            Operand::Special(special) => with_block(|block| {
                u64::from(match special {
                    Special::Thread => block.current,
                    Special::Threads => block.threads,
                    Special::BlockX => block.index[0],
                    Special::BlockY => block.index[1],
                })
            }),
            Operand::Address(base, offset) => self.get(base).wrapping_add_signed(*offset),
            Operand::Group(_) | Operand::Label(_) => panic!("not a value"),
        }
    }

    fn group<const N: usize>(&self, operand: &Operand) -> [u64; N] {
        let Operand::Group(parts) = operand else { panic!("not a group") };
        assert_eq!(parts.len(), N);
        core::array::from_fn(|i| self.get(&parts[i]))
    }

    fn set(&mut self, operand: &Operand, value: u64) {
        let Operand::Register(register) = operand else { panic!("a result that is no register") };
        self.registers[*register] = value;
    }

    /// The parts of an operand, which is one value or a group.
    fn each(operand: &Operand) -> &[Operand] {
        if let Operand::Group(parts) = operand { parts } else { core::slice::from_ref(operand) }
    }

    /// Runs one instruction other than a branch.
    pub fn step(&mut self, instruction: &Instruction) {
        let operands = &instruction.operands;
        let arg = |i: usize| self.get(&operands[i]);
        let place = Place::Line(instruction.line);
        let value = match instruction.op {
            Op::Move => arg(1),
            Op::Two(binary, ty) => two(binary, ty, arg(1), arg(2)),
            Op::MulWide(ty) => (ty.integer(arg(1)) * ty.integer(arg(2))) as u64,
            Op::Mad(ty) => {
                (ty.integer(arg(1)).wrapping_mul(ty.integer(arg(2)))).wrapping_add(ty.integer(arg(3))) as u64
            }
            Op::Fma => slot_of(f32_of(arg(1)).mul_add(f32_of(arg(2)), f32_of(arg(3)))),
            Op::Not(Type::Pred) => arg(1) ^ 1,
            Op::Not(_) => !arg(1),
            Op::Neg(Type::F32) => slot_of(-f32_of(arg(1))),
            Op::Neg(ty) => -ty.integer(arg(1)) as u64,
            Op::Reciprocal => slot_of(1.0 / f32_of(arg(1))),
            Op::Root => slot_of(f32_of(arg(1)).sqrt()),
            Op::Exp2 => slot_of(f32_of(arg(1)).exp2()),
            Op::Bits(ty) => {
                let (position, len) = (arg(2) as u32, arg(3) as u32);
                let field = ty.integer(arg(1)) >> position;
                let field = if matches!(ty, Type::S(_)) { Type::S(len) } else { Type::U(len) }.integer(field as u64);
                field as u64
            }
            Op::Set(compare, unordered, ty) => set(compare, unordered, ty, arg(1), arg(2)),
            Op::Select => arg(if arg(3) & 1 == 1 { 1 } else { 2 }),
            Op::Convert(to, from) => convert(to, from, arg(1)),
            Op::Pack => u64::from(pack_bf16(f32_of(arg(2)), f32_of(arg(1)))),
            Op::Shuffle => {
                let request = Request::Shuffle { value: arg(1) as u32, lanes: arg(2) as u32 };
                u64::from(ask(request, place)[0])
            }
            _ => return self.effect(instruction, place),
        };
        self.set(&operands[0], value);
    }

    /// Instructions with no result or several.
    fn effect(&mut self, instruction: &Instruction, place: Place) {
        let operands = &instruction.operands;
        match instruction.op {
            Op::Repack(bits) => self.repack(bits, operands),
            Op::LoadGlobal(_) | Op::StoreGlobal(_) => self.global(instruction.op, operands),
            Op::LoadShared(_) | Op::StoreShared(_) => self.shared(instruction.op, operands),
            Op::Ldmatrix(_) | Op::Mma => self.matrix(instruction.op, operands, place),
            Op::Wgmma => self.wgmma(operands, place),
            Op::WgmmaFence => {
                ask(Request::WgmmaFence, place);
            }
            Op::WgmmaCommit => {
                ask(Request::WgmmaCommit, place);
            }
            Op::WgmmaWait => {
                ask(Request::WgmmaWait { pending: self.get(&operands[0]) as u32 }, place);
            }
            Op::ProxyFence => with_block(|block| block.proxy_fence()),
            Op::Barrier => {
                ask(Request::Barrier, place);
            }
            Op::CopyAsync => {
                let (to, from, size) = (self.get(&operands[0]), self.get(&operands[1]), self.get(&operands[3]) as u32);
                assert!(self.get(&operands[2]) == 16 && (size == 0 || size == 16));
                with_block(|block| block.copy_async(to as u32, from as usize as *const u8, size == 16));
            }
            Op::CopyCommit => with_block(|block| block.copy_commit()),
            Op::CopyWait => {
                let pending = self.get(&operands[0]) as usize;
                with_block(|block| block.copy_wait(pending));
            }
            Op::Nothing => {}
            other => unreachable!("{other:?} has one result"),
        }
    }

    /// Splits a value into parts, or joins parts.
    fn repack(&mut self, bits: u32, operands: &[Operand]) {
        let (to, from) = (Self::each(&operands[0]), Self::each(&operands[1]));
        let part = Type::U(bits / from.len() as u32);
        let all = from.iter().rev().fold(0, |all: i128, from| all << part.bits() | part.integer(self.get(from)));
        let part = Type::U(bits / to.len() as u32);
        for (i, to) in to.iter().enumerate() {
            self.set(to, part.integer((all >> (i as u32 * part.bits())) as u64) as u64);
        }
    }

    /// Loads or stores one or several values in the device's memory.
    fn global(&mut self, op: Op, operands: &[Operand]) {
        if let Op::LoadGlobal(bytes) = op {
            let (to, at, bytes) = (Self::each(&operands[0]), self.get(&operands[1]) as usize, bytes as usize);
            let len = bytes * to.len();
            with_block(|block| block.check_global(at, len, len, false));
            for (i, to) in to.iter().enumerate() {
                let (mut value, from) = ([0; 8], (at + i * bytes) as *const u8);
                // SAFETY: checked to be inside an allocation.
                unsafe { from.copy_to(value.as_mut_ptr(), bytes) };
                self.set(to, u64::from_le_bytes(value));
            }
        } else if let Op::StoreGlobal(bytes) = op {
            let (at, from, bytes) = (self.get(&operands[0]) as usize, Self::each(&operands[1]), bytes as usize);
            let len = bytes * from.len();
            with_block(|block| block.check_global(at, len, len, true));
            for (i, from) in from.iter().enumerate() {
                let (value, to) = (self.get(from).to_le_bytes(), (at + i * bytes) as *mut u8);
                // SAFETY: checked to be inside an allocation.
                unsafe { to.copy_from(value.as_ptr(), bytes) };
            }
        }
    }

    /// Loads or stores one or several values in shared memory.
    fn shared(&mut self, op: Op, operands: &[Operand]) {
        if let Op::LoadShared(bytes) = op {
            let (to, at) = (Self::each(&operands[0]), self.get(&operands[1]) as u32);
            for (i, to) in to.iter().enumerate() {
                let at = at + i as u32 * bytes;
                let value = match bytes {
                    4 => u64::from(u32::from_le_bytes(with_block(|block| block.shared_load(at)))),
                    8 => u64::from_le_bytes(with_block(|block| block.shared_load(at))),
                    _ => panic!("{bytes} bytes of shared memory"),
                };
                self.set(to, value);
            }
        } else if let Op::StoreShared(bytes) = op {
            let (at, from) = (self.get(&operands[0]) as u32, Self::each(&operands[1]));
            let value = |from| self.get(from).to_le_bytes();
            let all: Vec<u8> = from.iter().flat_map(|from| value(from)[..bytes as usize].to_vec()).collect();
            with_block(|block| block.shared_store(at, &all));
        }
    }

    /// Matrix instructions of a warp.
    fn matrix(&mut self, op: Op, operands: &[Operand], place: Place) {
        let request = if let Op::Ldmatrix(transposed) = op {
            Request::Ldmatrix { address: self.get(&operands[1]) as u32, transposed }
        } else {
            let a = self.group::<4>(&operands[1]).map(|word| word as u32);
            let b = self.group::<2>(&operands[2]).map(|word| word as u32);
            Request::Mma { a, b, c: self.group::<4>(&operands[3]).map(f32_of) }
        };
        let words = ask(request, place);
        Self::each(&operands[0]).iter().zip(words).for_each(|(to, word)| self.set(to, u64::from(word)));
    }

    /// An asynchronous product, whose result is added at once: the compiler must not read it before the wait.
    fn wgmma(&mut self, operands: &[Operand], place: Place) {
        let [sums, a, b, adds, scale_a, scale_b, transposed_a, transposed_b] = operands else {
            panic!("wgmma with {} operands", operands.len())
        };
        let fixed = [adds, scale_a, scale_b, transposed_a].map(|operand| self.get(operand));
        assert_eq!(fixed, [1, 1, 1, 0], "wgmma accumulates, and A is not transposed");
        let (a, b, transposed) = (self.get(a), self.get(b), self.get(transposed_b) == 1);
        ask(Request::Wgmma(Operands { a, b, transposed }), place);
        let part = with_block(|block| block.parts[block.current as usize]);
        let sums = Self::each(sums);
        assert_eq!(sums.len(), 128);
        for (register, more) in sums.iter().zip(part.as_flattened()) {
            self.set(register, slot_of(f32_of(self.get(register)) + more));
        }
    }
}
