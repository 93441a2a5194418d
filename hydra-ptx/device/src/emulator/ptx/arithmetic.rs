//! Arithmetic on 64-bit slots, in the width of an instruction's type.

use super::{Binary, Compare, Type};

pub(super) fn f32_of(slot: u64) -> f32 {
    f32::from_bits(slot as u32)
}

pub(super) fn slot_of(value: f32) -> u64 {
    u64::from(value.to_bits())
}

pub(super) fn two(binary: Binary, ty: Type, a: u64, b: u64) -> u64 {
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
            // The count has 32 bits; one as large as the type leaves only the sign.
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

pub(super) fn set(compare: Compare, unordered: bool, ty: Type, a: u64, b: u64) -> u64 {
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

pub(super) fn convert(to: Type, from: Type, slot: u64) -> u64 {
    match (to, from) {
        (Type::F64, Type::F32) => f64::from(f32_of(slot)).to_bits(),
        (Type::F32, Type::F64) => slot_of(f64::from_bits(slot) as f32),
        (Type::F32, Type::U(_) | Type::S(_)) => slot_of(from.integer(slot) as f32),
        (Type::U(_) | Type::S(_), Type::U(_) | Type::S(_)) => to.integer(from.integer(slot) as u64) as u64,
        _ => panic!("a conversion from {from:?} to {to:?}"),
    }
}
