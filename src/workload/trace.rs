//! A list of arrivals: what the load generator sends and what the simulator replays.

use serde::{Deserialize, Serialize};

/// One arrival.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Its number, from 0.
    pub id: u64,
    /// Seconds from the trace's start.
    pub arrival_s: f64,
    /// Prompt length in the model's tokens, BOS included.
    pub prompt_tokens: u32,
    /// Output length.
    pub output_tokens: u32,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// The adapter's rank, where the trace knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// The text, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
}

/// The first line of a trace file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceHeader {
    /// Version of the format: 1.
    pub schema: u32,
    /// Where lengths and arrivals come from, with the attribution that their licence asks for.
    pub source: String,
    /// The seed that it was made with.
    pub seed: u64,
    /// How adapters were drawn (`uniform`, `zipf:1.0`, `trace`): synthetic unless it says `trace`.
    pub popularity: String,
}

/// Arrivals in order of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Where it comes from.
    pub header: TraceHeader,
    /// The arrivals; times never go back.
    pub requests: Vec<TraceRequest>,
}
