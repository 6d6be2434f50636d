//! How many LoRA adapters should stay in GPU memory?
//!
//! `lora-hbm` is a calibrated pair: an engine that serves `total_loras` adapters with `gpu_loras`
//! of them resident, and a simulator that runs the same scheduler on a virtual clock with the
//! engine's measured costs. `ARCHITECTURE.md` has the picture of the house.

#[cfg(feature = "server")]
pub mod bench;
#[cfg(feature = "server")]
pub mod calibrate;
pub mod cli;
#[cfg(feature = "engine")]
pub mod engine;
pub mod experiment;
#[cfg(feature = "server")]
pub mod loadgen;
pub mod profile;
pub mod report;
pub mod sim;
pub mod workload;
