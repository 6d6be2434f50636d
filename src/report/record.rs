//! One request's outcome: a line of the requests JSONL, and what every statistic is made from.

use serde::{Deserialize, Serialize};

/// TTFT parts in seconds; they sum to the server's TTFT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartsS {
    /// HTTP and tokenising.
    pub front: f64,
    /// No place or token budget, or the running step's end.
    pub queue: f64,
    /// No KV blocks.
    pub kv: f64,
    /// All slots pinned by others.
    pub slot: f64,
    /// Its adapter being copied.
    pub swap: f64,
    /// Its tokens in the running step.
    pub prefill: f64,
    /// First token to first byte out.
    pub deliver: f64,
}

impl PartsS {
    /// The whole.
    pub fn total(&self) -> f64 {
        self.front + self.queue + self.kv + self.slot + self.swap + self.prefill + self.deliver
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All its output came.
    Ok,
    /// The server or the connection failed.
    Error,
    /// It took longer than the time-out.
    Timeout,
}

/// One request, measured or simulated. Times are seconds from the run's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Its number in the trace.
    pub id: u64,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// The adapter's rank.
    pub rank: Option<u32>,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Output length.
    pub output_tokens: u32,
    /// When it was due.
    pub scheduled_s: f64,
    /// When it was sent.
    pub sent_s: f64,
    /// First byte of output at the client.
    pub first_s: Option<f64>,
    /// Last byte.
    pub last_s: Option<f64>,
    /// The server's TTFT.
    pub ttft_s: Option<f64>,
    /// Sent to last byte.
    pub latency_s: Option<f64>,
    /// How it ended.
    pub status: Status,
    /// Where the TTFT went, where the server says.
    pub parts: Option<PartsS>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
