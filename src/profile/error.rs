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
    /// Slots leave too little memory for the KV cache: with fewer of them there is room.
    #[error(
        "{gpu_loras} slots leave no room for {}: required {}, available {}: lower --gpu-loras{}",
        if *kv_memory { "a KV cache of --kv-memory" } else { "one request" },
        size(*required),
        size(*available),
        if *kv_memory { " or --kv-memory" } else { "" }
    )]
    Slots {
        /// Slots.
        gpu_loras: usize,
        /// Whether the KV cache has a size that was asked for.
        kv_memory: bool,
        /// Bytes of weights, workspace, slots and KV cache.
        required: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// The KV cache that was asked for has more bytes than any number of slots leaves.
    #[error(
        "--kv-memory {} is more than there is: weights and one slot leave {} of {}: lower --kv-memory",
        size(*asked),
        size(*room),
        size(*available)
    )]
    KvMemoryTooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes beside weights, workspace and one slot.
        room: u64,
        /// Bytes of the whole memory.
        available: u64,
    },
    /// The KV cache that was asked for does not hold one request.
    #[error(
        "--kv-memory {} holds no request of {max_model_len} tokens, which takes {}: raise --kv-memory, or lower \
         --max-model-len",
        size(*asked),
        size(*needed)
    )]
    KvMemoryTooSmall {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of one request's blocks.
        needed: u64,
        /// Tokens of one request, at most.
        max_model_len: usize,
    },
    /// One request is longer than any number of slots leaves room for.
    #[error(
        "a request of {max_model_len} tokens takes {} of KV cache and there is room for {}: lower --max-model-len",
        size(*needed),
        size(*room)
    )]
    ModelLen {
        /// Tokens of one request, at most.
        max_model_len: usize,
        /// Bytes of its blocks.
        needed: u64,
        /// Bytes that the KV cache has, or would have beside one slot.
        room: u64,
    },
}

impl ProfileError {
    /// Whether it is a matter of the budget: fewer slots would fit.
    pub fn is_of_the_budget(&self) -> bool {
        matches!(self, Self::Slots { .. })
    }
}

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    const UNITS: [(f64, &str); 3] = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let bytes = bytes as f64;
    UNITS
        .iter()
        .find(|(unit, _)| bytes >= *unit)
        .map_or_else(|| format!("{bytes} B"), |(unit, name)| format!("{:.2} {name}", bytes / unit))
}

/// The rest of a sentence that names the shipped profiles, if there are any.
fn shipped_names(shipped: &[String]) -> String {
    if shipped.is_empty() { String::new() } else { format!(", or one of {}", shipped.join(", ")) }
}
