//! `hydra heterogeneity`: Figure 2 of the paper. The same number of records is drawn from 1, 2, 4, .. categories, each run of a
//! TOML file is trained on each draw, and all are measured on the same eval set.
//!
//! A seed puts the categories in an order of its own and draws from the first k of them, as evenly as possible; the first is in
//! every draw. So there are two curves over k: the loss on the whole eval set, which gains from having seen more of its
//! categories, and the loss on the records of the first category, which become fewer in training while others join them.

pub mod draw;
pub mod outcome;
pub mod results;
