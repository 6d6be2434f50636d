//! Workloads: traces, where lengths come from, arrival processes, adapter popularity, prompts.

pub mod arrivals;
pub mod atomic;
pub mod data_folder;
pub mod popularity;
pub mod regime;
pub mod streams;
#[cfg(feature = "engine")]
pub mod tokenizer;
pub mod trace;
