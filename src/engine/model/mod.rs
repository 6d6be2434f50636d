//! Model families, written once over [`Backend`](super::backend::Backend).

mod config;
mod decoder;
mod generation;
mod gguf;
mod llama;
mod opt;
pub mod random;
mod rope;
mod source;
mod spec;
mod weights;

pub use config::{ConfigError, parse};
pub use decoder::{Decoder, Destination, DeviceModel, WorkspaceElements, narrows};
pub use generation::{GenerationConfig, GenerationConfigError, SamplingDefaults};
pub use gguf::GgufWeights;
pub use random::{Uniform, Values};
pub use rope::RopeScaling;
pub use source::{DummyWeights, Model, ModelError, preset, preset_names, resolve};
pub use spec::{Dtype, Family, ModelSpec, Module, OPT_POSITION_OFFSET};
pub use weights::{TensorFiles, WeightError, Weights};
