//! Experiments: runs that a TOML file names, each with several seeds, each kept in a folder of its own. `compare` and
//! `heterogeneity` are made of these.

pub mod kept;
pub mod measure;
pub mod plan;
pub mod scores;
pub mod share;
pub mod stage;
pub mod tune;
