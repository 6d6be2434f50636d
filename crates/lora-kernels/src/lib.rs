//! CUDA kernels for serving many LoRA adapters on one base model.
//!
//! A [`Device`] loads every kernel once; launchers check shapes, put work on a [`Stream`] and return at once.
//! Storage is bf16, arithmetic f32. Nothing allocates after the buffers have been made. Each kernel has a
//! plain twin in [`twins`], against which the tests hold it on a GPU.
//!
//! The driver and cuBLASLt are loaded at run time: a program with this crate starts where neither is, and
//! [`Device::open`] says what is missing.

mod attention;
mod ceilings;
mod device;
mod draw;
mod elementwise;
mod error;
mod gemm;
mod gemm_small;
mod lora;
mod memory;
mod module;
mod paged;
mod product;
mod rope_kv;
mod sample;
mod stream;
mod tensor_map;
pub mod twins;
mod words;

pub use attention::{Attention, DecodeWorkspace, Queries};
pub use ceilings::{BURSTS, Burst, Ceilings, ceilings, read_bytes_s};
pub use device::{Device, DeviceInfo};
pub use draw::{Draw, Uniform};
pub use elementwise::{Elementwise, WIDEST_NORM};
pub use error::CudaError;
pub use gemm::{Choices, Gemm};
pub use gemm_small::{GemmSmall, SmallForm};
pub use half::bf16;
pub use lora::{
    Lora, LoraLimits, LoraScratch, LoraStep, Out, RopeKvCall, SMALL_ROWS, Segment, Shrink, TILE_ROWS, Target,
    covers, large_tiles,
};
pub use memory::{DeviceBuffer, Element, PinnedBuffer, View, ViewMut, words};
pub use paged::{AttentionShape, KvCache, KvCacheMut, PREFILL_ROWS, Sequences, prefill_tiles};
pub use product::{Product, Weight};
pub use rope_kv::{PADDING_ROW, RopeKv, Rotation, rope_frequencies, rope_table};
pub use sample::Argmax;
pub use stream::{Event, Graph, Stream};
pub use words::HostWords;
