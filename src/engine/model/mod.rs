//! Model families, written once over [`Backend`](super::backend::Backend).

mod config;
mod decoder;
mod llama;
mod opt;
pub mod random;
mod source;
mod spec;
mod weights;

pub use config::{ConfigError, parse};
pub use decoder::{Decoder, Destination, DeviceModel, WorkspaceElements};
pub use random::{Uniform, Values};
pub use source::{DummyWeights, Model, ModelError, preset, preset_names, resolve};
pub use spec::{Dtype, Family, ModelSpec, Module, OPT_POSITION_OFFSET};
pub use weights::{TensorFiles, WeightError, Weights};
