//! Workloads: traces, where lengths come from, arrival processes, adapter popularity, prompts.

pub mod arrivals;
pub mod atomic;
pub mod data_folder;
#[cfg(feature = "engine")]
pub mod fetch;
#[cfg(feature = "engine")]
pub mod gguf;
pub mod import;
pub mod lengths;
pub mod pool;
pub mod popularity;
#[cfg(feature = "engine")]
pub mod prompts;
pub mod regime;
pub mod replay;
pub mod sharegpt;
pub mod spec;
pub mod streams;
#[cfg(feature = "engine")]
pub mod tokenizer;
pub mod trace;
