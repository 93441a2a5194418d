//! Decodes a module's text. Only the instructions that our modules contain are known; any other is an error.

use super::{Binary, Compare, Instruction, Kind, Op, Operand, Program, Special, Type};
use crate::prelude::SHARED_BASE;
use std::collections::HashMap;

/// The number of line breaks.
fn count(texts: &[&str]) -> u32 {
    texts.iter().map(|text| text.matches('\n').count() as u32).sum()
}

/// The parts between commas outside of braces.
fn split_operands(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

#[derive(Default)]
struct Names {
    registers: HashMap<String, usize>,
    labels: HashMap<String, usize>,
}

impl Names {
    fn register(&mut self, name: &str) -> usize {
        let next = self.registers.len();
        *self.registers.entry(name.to_string()).or_insert(next)
    }

    fn operand(&mut self, text: &str) -> Operand {
        if let Some(inner) = text.strip_prefix('{') {
            let parts = split_operands(inner.trim_end_matches('}'));
            return Operand::Group(parts.into_iter().map(|part| self.operand(part)).collect());
        }
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.trim_end_matches(']');
            if let Some((_, number)) = inner.split_once("_param_") {
                return Operand::Param(number.parse().expect("a parameter's number"));
            }
            let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
            return Operand::Address(Box::new(self.operand(base)), offset.parse().expect("an offset"));
        }
        match text {
            "%tid.x" => return Operand::Special(Special::Thread),
            "%ntid.x" => return Operand::Special(Special::Threads),
            "%ctaid.x" => return Operand::Special(Special::BlockX),
            "%ctaid.y" => return Operand::Special(Special::BlockY),
            "dynamic_shared" => return Operand::Value(u64::from(SHARED_BASE)),
            _ => {}
        }
        if text.starts_with('%') || matches!(text, "tmp" | "add" | "_") {
            return Operand::Register(self.register(text));
        }
        if text.starts_with('$') {
            return Operand::Label(*self.labels.get(text).unwrap_or_else(|| panic!("no label {text}")));
        }
        let value = if let Some(bits) = text.strip_prefix("0f").or(text.strip_prefix("0d")) {
            u64::from_str_radix(bits, 16).ok()
        } else {
            text.parse::<i128>().ok().map(|value| value as u64)
        };
        Operand::Value(value.unwrap_or_else(|| panic!("operand {text}")))
    }
}

/// A module's kernels: names and programs.
pub(super) fn programs(text: &str) -> impl Iterator<Item = (&str, Program)> {
    let mut line = text.lines().take_while(|line| !line.starts_with(".visible .entry")).count() as u32 + 1;
    text.split(".visible .entry ").skip(1).map(move |entry| {
        let (name, rest) = entry.split_once('(').expect("a parameter list");
        let (params, body) = rest.split_once(')').expect("the list's end");
        let (head, body) = body.split_once('{').expect("a body");
        let body = body.rsplit_once("\n}").expect("the body's end").0;
        let program = Program::new(params, body, line + count(&[params, head]));
        line += count(&[entry]);
        (name, program)
    })
}

impl Type {
    fn parse(text: &str) -> Self {
        let bits = || text[1..].parse().unwrap_or_else(|_| panic!("type {text}"));
        match text {
            "pred" => Type::Pred,
            "f32" => Type::F32,
            "f64" => Type::F64,
            _ if text.starts_with('s') => Type::S(bits()),
            _ => Type::U(bits()),
        }
    }
}

impl Program {
    fn new(params: &str, body: &str, first_line: u32) -> Self {
        let kinds = params.lines().filter_map(|line| line.trim().strip_prefix(".param "));
        let kind = |param: &str| match param.split(' ').next() {
            Some(".u64") => Kind::U64,
            Some(".u32") => Kind::U32,
            Some(".f32") => Kind::F32,
            other => panic!("parameter type {other:?}"),
        };
        // Statements with their lines. Labels are collected first, because branches may go forward.
        let (mut names, mut statements, mut line) = (Names::default(), Vec::new(), first_line);
        // Blocks around a few instructions, with which LLVM drops half of a register and our assembly names a
        // predicate.
        let body = body.replace("{ .reg .b32 tmp;", "").replace("{ .reg .pred add;", "").replace("; }", ";");
        let body = body.replace("} wgmma", "wgmma");
        let without_comments: String =
            body.lines().map(|line| line.split("//").next().unwrap_or("").to_string() + "\n").collect();
        for piece in without_comments.split(';') {
            let mut statement = piece;
            while let Some((label, rest)) = statement.split_once(':').filter(|(label, _)| label.trim().starts_with('$'))
            {
                names.labels.insert(label.trim().to_string(), statements.len());
                statement = rest;
            }
            let text = statement.trim();
            if !text.is_empty() && !text.starts_with('.') {
                let leading = count(&[piece]) - count(&[statement.trim_start()]);
                statements.push((text, line + leading));
            }
            line += count(&[piece]);
        }
        let mut code: Vec<Instruction> =
            statements.into_iter().map(|(text, line)| Instruction::new(text, line, &mut names)).collect();
        code.push(Instruction { guard: None, op: Op::Return, operands: Vec::new(), line });
        Self { params: kinds.map(kind).collect(), code, registers: names.registers.len() }
    }
}

impl Instruction {
    fn new(text: &str, line: u32, names: &mut Names) -> Self {
        let (mut guard, mut text) = (None, text);
        if let Some(guarded) = text.strip_prefix('@') {
            let (register, rest) = guarded.split_once(char::is_whitespace).expect("an instruction after its guard");
            let negated = register.starts_with('!');
            guard = Some((names.register(register.trim_start_matches('!')), negated));
            text = rest.trim();
        }
        let (name, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let operands = split_operands(operands).into_iter().map(|operand| names.operand(operand)).collect();
        let op = Op::parse(name).unwrap_or_else(|| panic!("line {line}: unknown instruction {name}"));
        Self { guard, op, operands, line }
    }
}

impl Op {
    fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('.').collect();
        let last = Type::parse;
        let ty = || last(parts[parts.len() - 1]);
        let two = |binary| Some(Op::Two(binary, ty()));
        Some(match (parts[0], &parts[1..]) {
            ("mov", ["b32" | "b64"]) => Op::Repack(ty().bits()),
            ("mov", _) | ("ld", ["param", _]) => Op::Move,
            // An address of global memory has the same value as a generic one.
            ("cvta", ["global", "u64"] | ["to", "global", "u64"]) => Op::Move,
            ("add", ["rn", _] | [_]) => return two(Binary::Add),
            ("sub", ["rn", _] | [_]) => return two(Binary::Sub),
            ("mul", ["lo" | "rn", _]) => return two(Binary::Mul),
            ("mul", ["hi", _]) => return two(Binary::MulHigh),
            ("mul", ["wide", _]) => Op::MulWide(ty()),
            ("mad", ["lo", _]) => Op::Mad(ty()),
            ("fma", ["rn", "f32"]) => Op::Fma,
            ("div", ["rn", "f32"] | [_]) => return two(Binary::Div),
            ("rem", [_]) => return two(Binary::Rem),
            ("min", [_]) => return two(Binary::Min),
            ("max", [_]) => return two(Binary::Max),
            ("and", [_]) => return two(Binary::And),
            ("or", [_]) => return two(Binary::Or),
            ("xor", [_]) => return two(Binary::Xor),
            ("shl", [_]) => return two(Binary::Shl),
            ("shr", [_]) => return two(Binary::Shr),
            ("not", [_]) => Op::Not(ty()),
            ("neg", [_]) => Op::Neg(ty()),
            ("rcp", ["rn", "f32"]) => Op::Reciprocal,
            ("sqrt", ["rn", "f32"]) => Op::Root,
            ("ex2", ["approx", "ftz", "f32"]) => Op::Exp2,
            ("bfe", [_]) => Op::Bits(ty()),
            ("setp", [compare, _]) => {
                let (compare, unordered) = match *compare {
                    "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" => (&compare[..2], true),
                    ordered => (ordered, false),
                };
                let compare = match compare {
                    "eq" => Compare::Eq,
                    "ne" => Compare::Ne,
                    "lt" => Compare::Lt,
                    "le" => Compare::Le,
                    "gt" => Compare::Gt,
                    "ge" => Compare::Ge,
                    _ => return None,
                };
                Op::Set(compare, unordered, ty())
            }
            ("selp", [_]) => Op::Select,
            ("cvt", ["rn", "bf16x2", "f32"]) => Op::Pack,
            ("cvt", ["rn", to, from] | [to, from]) => Op::Convert(last(to), last(from)),
            ("ld", ["global", _] | ["global", "v2" | "v4", _]) => Op::LoadGlobal(ty().bits() / 8),
            ("st", ["global", _] | ["global", "v2" | "v4", _]) => Op::StoreGlobal(ty().bits() / 8),
            ("ld", ["shared", _] | ["shared", "v2" | "v4", _]) => Op::LoadShared(ty().bits() / 8),
            ("st", ["shared", _] | ["shared", "v2" | "v4", _]) => Op::StoreShared(ty().bits() / 8),
            ("ldmatrix", ["sync", "aligned", "m8n8", "x4", rest @ ..]) => Op::Ldmatrix(rest[0] == "trans"),
            ("mma", ["sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]) => Op::Mma,
            ("shfl", ["sync", "bfly", "b32"]) => Op::Shuffle,
            ("bar", ["sync"]) => Op::Barrier,
            ("bar", ["warp", "sync"]) => Op::Nothing,
            ("cp", ["async", "cg", "shared", "global"]) => Op::CopyAsync,
            ("cp", ["async", "commit_group"]) => Op::CopyCommit,
            ("cp", ["async", "wait_group"]) => Op::CopyWait,
            ("fence", ["proxy", "async", "shared::cta"]) => Op::ProxyFence,
            ("wgmma", ["fence", "sync", "aligned"]) => Op::WgmmaFence,
            ("wgmma", ["mma_async", "sync", "aligned", "m64n256k16", "f32", "bf16", "bf16"]) => Op::Wgmma,
            ("wgmma", ["commit_group", "sync", "aligned"]) => Op::WgmmaCommit,
            ("wgmma", ["wait_group", "sync", "aligned"]) => Op::WgmmaWait,
            ("bra", _) => Op::Branch,
            ("ret", _) => Op::Return,
            _ => return None,
        })
    }
}
