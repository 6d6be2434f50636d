//! What is wrong with a profile.

use super::{FeatureError, SCHEMA_VERSION};

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("cannot read the profile {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Neither a file nor a shipped profile.
    #[error(
        "there is no profile '{name}': give a file that `lora-hbm calibrate` has made{}",
        shipped_names(shipped)
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        shipped: Vec<String>,
    },
    /// It is not JSON of this form.
    #[error("{path} is not a profile: {source}")]
    Form {
        /// Which file.
        path: String,
        /// What is missing or unknown.
        source: serde_json::Error,
    },
    /// Another version.
    #[error("{path} has schema version {found}; this program reads {SCHEMA_VERSION}: calibrate anew")]
    Schema {
        /// Which file.
        path: String,
        /// Its version.
        found: u64,
    },
    /// Its hash is another.
    #[error("{path} was changed after calibration: its SHA-256 is {found}, it says {said}")]
    Hash {
        /// Which file.
        path: String,
        /// The true hash.
        found: String,
        /// The hash that it names.
        said: String,
    },
    /// A cost that cannot be.
    #[error("the profile's {what} is {value}: {expected}")]
    Value {
        /// Which cost.
        what: String,
        /// Its value.
        value: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// An unknown feature.
    #[error(transparent)]
    Feature(#[from] FeatureError),
    /// A rank outside of what was measured.
    #[error(
        "the profile has ranks {measured:?}, and rank {rank} lies outside: calibrate with --ranks {rank}"
    )]
    Rank {
        /// The rank asked for.
        rank: u32,
        /// What was measured.
        measured: Vec<u32>,
    },
    /// The profile of another model.
    #[error(
        "the profile is of the model '{profile}', not '{asked}': calibrate that one, or name its profile"
    )]
    Model {
        /// The profile's.
        profile: String,
        /// The one asked for.
        asked: String,
    },
    /// Slots and weights leave no memory for the KV cache.
    #[error(
        "{gpu_loras} slots leave no room for one request: required {required_gb:.2} GB, available \
         {available_gb:.2} GB: lower --gpu-loras"
    )]
    Memory {
        /// Slots.
        gpu_loras: usize,
        /// What is needed.
        required_gb: f64,
        /// What there is.
        available_gb: f64,
    },
}

/// The rest of a sentence that names the shipped profiles, if there are any.
fn shipped_names(shipped: &[String]) -> String {
    if shipped.is_empty() { String::new() } else { format!(", or one of {}", shipped.join(", ")) }
}
