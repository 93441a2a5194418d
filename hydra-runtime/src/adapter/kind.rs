//! Kinds of adapters, and their names in files and on the command line.

use crate::backend::GateKind;

/// How A is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// One A, a B per head.
    Hydra,
    /// One A, one B.
    Lora,
    /// An A and a B per head.
    Split,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 3] = [Method::Hydra, Method::Lora, Method::Split];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Hydra => "hydra",
            Method::Lora => "lora",
            Method::Split => "split",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// The gate that goes with it unless another is asked for.
    pub const fn default_gate(self) -> GateKind {
        match self {
            Method::Hydra => GateKind::Router,
            Method::Lora => GateKind::One,
            Method::Split => GateKind::Label,
        }
    }
}

/// How the heads' B start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadInit {
    /// At zero.
    Zero,
    /// Apart from each other, with the sum zero ([`super::Adapter::init`]).
    Random,
}

impl HeadInit {
    /// Both.
    pub const ALL: [HeadInit; 2] = [HeadInit::Zero, HeadInit::Random];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            HeadInit::Zero => "zero",
            HeadInit::Random => "random",
        }
    }

    /// From its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|init| init.name() == name)
    }
}
