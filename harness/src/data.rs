//! From files to token sequences: records, templates, the order they are taken in.

pub mod encode;
pub mod order;
pub mod records;
pub mod template;
