//! `hydra analyze`: adapters from inside. Do the A of separately trained adapters, or of heads, converge while the B differ (the
//! paper's Observation II)? And what does the router do?

pub mod analysis;
pub mod gates;
pub mod matrices;
pub mod similarity;
pub mod tsne;
