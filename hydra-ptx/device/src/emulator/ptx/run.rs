//! Instructions, one after the other: one thread's registers and what each operation does to them.

use super::{Binary, Compare, Instruction, Op, Operand, Special, Type};
use crate::emulator::block::{Place, Request, ask, with_block};
use crate::emulator::wgmma::Operands;
use crate::prelude::pack_bf16;

/// A thread that runs a program.
pub(super) struct Thread<'a> {
    pub registers: Vec<u64>,
    /// The launch's parameters.
    pub slots: &'a [u64],
}

fn f32_of(slot: u64) -> f32 {
    f32::from_bits(slot as u32)
}

fn slot_of(value: f32) -> u64 {
    u64::from(value.to_bits())
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

    /// The values of an operand that is one or a group.
    fn each(operand: &Operand) -> &[Operand] {
        if let Operand::Group(parts) = operand { parts } else { core::slice::from_ref(operand) }
    }

    /// Does one instruction that is no branch.
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
            Op::Repack(bits) => {
                let (to, from) = (Self::each(&operands[0]), Self::each(&operands[1]));
                let part = Type::U(bits / from.len() as u32);
                let all =
                    from.iter().rev().fold(0, |all: i128, from| all << part.bits() | part.integer(self.get(from)));
                let part = Type::U(bits / to.len() as u32);
                for (i, to) in to.iter().enumerate() {
                    self.set(to, part.integer((all >> (i as u32 * part.bits())) as u64) as u64);
                }
            }
            Op::LoadGlobal(bytes) => {
                let (to, at) = (Self::each(&operands[0]), self.get(&operands[1]));
                let len = bytes as usize * to.len();
                with_block(|block| block.check_global(at as usize, len, len, false));
                for (i, to) in to.iter().enumerate() {
                    let mut value = [0; 8];
                    let from = (at as usize + i * bytes as usize) as *const u8;
                    // SAFETY: checked to be inside an allocation.
                    unsafe { from.copy_to(value.as_mut_ptr(), bytes as usize) };
                    self.set(to, u64::from_le_bytes(value));
                }
            }
            Op::StoreGlobal(bytes) => {
                let (at, from) = (self.get(&operands[0]), Self::each(&operands[1]));
                let len = bytes as usize * from.len();
                with_block(|block| block.check_global(at as usize, len, len, true));
                for (i, from) in from.iter().enumerate() {
                    let value = self.get(from).to_le_bytes();
                    let to = (at as usize + i * bytes as usize) as *mut u8;
                    // SAFETY: checked to be inside an allocation.
                    unsafe { to.copy_from(value.as_ptr(), bytes as usize) };
                }
            }
            Op::LoadShared(bytes) => {
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
            }
            Op::StoreShared(bytes) => {
                let (at, from) = (self.get(&operands[0]) as u32, Self::each(&operands[1]));
                let value = |from| self.get(from).to_le_bytes();
                let all: Vec<u8> = from.iter().flat_map(|from| value(from)[..bytes as usize].to_vec()).collect();
                with_block(|block| block.shared_store(at, &all));
            }
            Op::Ldmatrix(transposed) => {
                let address = self.get(&operands[1]) as u32;
                let words = ask(Request::Ldmatrix { address, transposed }, place);
                Self::each(&operands[0]).iter().zip(words).for_each(|(to, word)| self.set(to, u64::from(word)));
            }
            Op::Mma => {
                let a = self.group::<4>(&operands[1]).map(|word| word as u32);
                let b = self.group::<2>(&operands[2]).map(|word| word as u32);
                let c = self.group::<4>(&operands[3]).map(f32_of);
                let words = ask(Request::Mma { a, b, c }, place);
                Self::each(&operands[0]).iter().zip(words).for_each(|(to, word)| self.set(to, u64::from(word)));
            }
            Op::Wgmma => {
                let [sums, a, b, adds, scale_a, scale_b, transposed_a, transposed_b] = operands.as_slice() else {
                    panic!("wgmma with {} operands", operands.len())
                };
                let fixed = [adds, scale_a, scale_b, transposed_a].map(|operand| self.get(operand));
                assert_eq!(fixed, [1, 1, 1, 0], "wgmma that adds, with A's rows as they are");
                let (a, b, transposed) = (self.get(a), self.get(b), self.get(transposed_b) == 1);
                ask(Request::Wgmma(Operands { a, b, transposed }), place);
                let part = with_block(|block| block.parts[block.current as usize]);
                let sums = Self::each(sums);
                assert_eq!(sums.len(), 128);
                for (register, more) in sums.iter().zip(part.as_flattened()) {
                    self.set(register, slot_of(f32_of(self.get(register)) + more));
                }
            }
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
}

fn two(binary: Binary, ty: Type, a: u64, b: u64) -> u64 {
    match ty {
        Type::F32 => {
            let (a, b) = (f32_of(a), f32_of(b));
            slot_of(match binary {
                Binary::Add => a + b,
                Binary::Sub => a - b,
                Binary::Mul => a * b,
                Binary::Div => a / b,
                Binary::Min => a.min(b),
                Binary::Max => a.max(b),
                other => panic!("{other:?} of floats"),
            })
        }
        Type::F64 => {
            let (a, b) = (f64::from_bits(a), f64::from_bits(b));
            match binary {
                Binary::Add => a + b,
                Binary::Mul => a * b,
                other => panic!("{other:?} of doubles"),
            }
            .to_bits()
        }
        _ => {
            // A count of 32 bits; one as large as the type leaves nothing but the sign.
            let shift = (b as u32).min(ty.bits());
            let (a, b) = (ty.integer(a), ty.integer(b));
            (match binary {
                Binary::Add => a + b,
                Binary::Sub => a - b,
                Binary::Mul => a.wrapping_mul(b),
                Binary::MulHigh => a.wrapping_mul(b) >> ty.bits(),
                Binary::Div => a / b,
                Binary::Rem => a % b,
                Binary::Min => a.min(b),
                Binary::Max => a.max(b),
                Binary::And => a & b,
                Binary::Or => a | b,
                Binary::Xor => a ^ b,
                Binary::Shl => a << shift,
                Binary::Shr => a >> shift,
            }) as u64
        }
    }
}

fn set(compare: Compare, unordered: bool, ty: Type, a: u64, b: u64) -> u64 {
    use core::cmp::Ordering::{Equal, Greater, Less};
    let order = match ty {
        Type::F32 => f32_of(a).partial_cmp(&f32_of(b)),
        Type::F64 => f64::from_bits(a).partial_cmp(&f64::from_bits(b)),
        _ => Some(ty.integer(a).cmp(&ty.integer(b))),
    };
    let holds = order.map_or(unordered, |order| match compare {
        Compare::Eq => order == Equal,
        Compare::Ne => order != Equal,
        Compare::Lt => order == Less,
        Compare::Le => order != Greater,
        Compare::Gt => order == Greater,
        Compare::Ge => order != Less,
    });
    u64::from(holds)
}

fn convert(to: Type, from: Type, slot: u64) -> u64 {
    match (to, from) {
        (Type::F64, Type::F32) => f64::from(f32_of(slot)).to_bits(),
        (Type::F32, Type::F64) => slot_of(f64::from_bits(slot) as f32),
        (Type::F32, Type::U(_) | Type::S(_)) => slot_of(from.integer(slot) as f32),
        (Type::U(_) | Type::S(_), Type::U(_) | Type::S(_)) => to.integer(from.integer(slot) as u64) as u64,
        _ => panic!("a conversion from {from:?} to {to:?}"),
    }
}
