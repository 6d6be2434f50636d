//! Workloads: traces, where lengths come from, arrival processes, adapter popularity, prompts.

pub mod data_folder;
#[cfg(feature = "engine")]
pub mod tokenizer;
pub mod trace;
