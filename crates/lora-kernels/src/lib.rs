//! CUDA kernels for serving many LoRA adapters on one base model.
//!
//! A [`Device`] loads every kernel once; launchers check shapes, put work on a [`Stream`] and return at once.
//! Storage is bf16, arithmetic f32. Nothing allocates after the buffers have been made. Each kernel has a
//! plain twin in [`twins`], against which the tests hold it on a GPU.
//!
//! The driver and cuBLASLt are loaded at run time: a program with this crate starts where neither is, and
//! [`Device::open`] says what is missing.

mod device;
mod error;
mod lora;
mod memory;
mod module;
mod stream;
pub mod twins;

pub use device::{Device, DeviceInfo};
pub use error::CudaError;
pub use half::bf16;
pub use lora::{
    Lora, LoraLimits, LoraScratch, LoraStep, Out, SMALL_ROWS, Segment, TILE_ROWS, Target, Tile, large_tiles,
};
pub use memory::{DeviceBuffer, Element, PinnedBuffer, View, ViewMut};
pub use stream::{Event, Graph, Stream};
