//! From files to token sequences: records, templates, and the order in which they are taken.

pub mod compressed;
pub mod encode;
pub mod file;
pub mod format;
pub mod limit;
pub mod options;
pub mod order;
mod parquet;
pub mod records;
pub mod table;
pub mod template;
