//! `hydra compare`: runs of a TOML file on the same records in the same order, each with several seeds, in one table.

pub mod results;
pub mod summary;
