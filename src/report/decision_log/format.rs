//! The lines of a decision log.

use lora_sched::{AdapterSpec, Config, Ended, Nanos, SeqStep};
use serde::{Deserialize, Serialize};

/// The version of this format. 2 added adapters that come, go, are pinned and are read from disk; logs of
/// version 1 have none of these and are read as well.
pub const SCHEMA: u32 = 2;

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogHeader {
    /// Version of the format: [`SCHEMA`].
    pub schema: u32,
    /// The program that wrote it.
    pub tool: String,
    /// The model that was served.
    pub model: String,
    /// Seed of weights, adapters and unseeded sampling.
    pub seed: u64,
    /// What the scheduler was made with.
    pub config: LoggedConfig,
}

impl LogHeader {
    /// The header of a log of `config`'s scheduler.
    pub fn new(model: &str, seed: u64, config: &Config) -> Self {
        Self {
            schema: SCHEMA,
            tool: concat!("lora-hbm ", env!("CARGO_PKG_VERSION")).to_owned(),
            model: model.to_owned(),
            seed,
            config: LoggedConfig::from(config),
        }
    }
}

/// [`Config`] as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggedConfig {
    /// Rank, bytes of a swap, and whether the user pinned it, for each adapter.
    pub adapters: Vec<(u32, u64, bool)>,
    /// Slots.
    pub gpu_loras: usize,
    /// Adapters in host memory, at most; none is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_loras: Option<usize>,
    /// Running sequences, at most.
    pub max_num_seqs: usize,
    /// Tokens a step, at most.
    pub max_num_batched_tokens: usize,
    /// Tokens a request, at most.
    pub max_model_len: usize,
    /// Tokens a KV block.
    pub block_size: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Whether prompts are split.
    pub chunked_prefill: bool,
    /// Admission policy.
    pub policy: String,
    /// Eviction rule.
    pub evict: String,
    /// Swap mode.
    pub swap_mode: String,
    /// Requests that are swapped for ahead of demand.
    pub prefetch: usize,
    /// The age bound.
    pub max_skip_age_ns: Nanos,
    /// Waiting requests, at most; none is no bound.
    pub max_queue: Option<usize>,
}

impl From<&Config> for LoggedConfig {
    fn from(c: &Config) -> Self {
        Self {
            adapters: c.adapters.iter().map(|a| (a.rank, a.bytes, a.pinned)).collect(),
            gpu_loras: c.gpu_loras,
            host_loras: c.host_loras,
            max_num_seqs: c.max_num_seqs,
            max_num_batched_tokens: c.max_num_batched_tokens,
            max_model_len: c.max_model_len,
            block_size: c.block_size,
            kv_blocks: c.kv_blocks,
            chunked_prefill: c.chunked_prefill,
            policy: c.policy.to_string(),
            evict: c.evict.to_string(),
            swap_mode: c.swap_mode.to_string(),
            prefetch: c.prefetch,
            max_skip_age_ns: c.max_skip_age,
            max_queue: (c.max_queue != usize::MAX).then_some(c.max_queue),
        }
    }
}

impl TryFrom<&LoggedConfig> for Config {
    type Error = lora_sched::UnknownChoice;

    fn try_from(c: &LoggedConfig) -> Result<Self, Self::Error> {
        Ok(Self {
            adapters: c
                .adapters
                .iter()
                .map(|&(rank, bytes, pinned)| AdapterSpec { pinned, ..AdapterSpec::new(rank, bytes) })
                .collect(),
            gpu_loras: c.gpu_loras,
            host_loras: c.host_loras,
            max_num_seqs: c.max_num_seqs,
            max_num_batched_tokens: c.max_num_batched_tokens,
            max_model_len: c.max_model_len,
            block_size: c.block_size,
            kv_blocks: c.kv_blocks,
            chunked_prefill: c.chunked_prefill,
            policy: c.policy.parse()?,
            evict: c.evict.parse()?,
            swap_mode: c.swap_mode.parse()?,
            prefetch: c.prefetch,
            max_skip_age: c.max_skip_age_ns,
            max_queue: c.max_queue.unwrap_or(usize::MAX),
        })
    }
}

/// One line after the header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum LogLine {
    /// In: a request, as the scheduler saw it.
    Arrive {
        /// When the scheduler was told.
        t: Nanos,
        /// The request.
        id: u64,
        /// Its adapter.
        adapter: Option<u32>,
        /// When it reached the server.
        received: Nanos,
        /// Prompt length.
        prompt_tokens: u32,
        /// Output length at which it ends.
        max_tokens: u32,
        /// Why the scheduler did not take it, if so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
    },
    /// In: a client has gone, or a stop string was found.
    Cancel {
        /// When the scheduler was told.
        t: Nanos,
        /// The request.
        id: u64,
    },
    /// In: a step has ended.
    StepDone {
        /// When the scheduler was told.
        t: Nanos,
        /// The step.
        step: u64,
        /// Sequences (indices in the step) that end with this token.
        stopped: Vec<u32>,
        /// Slot, and for how long the step waited for its adapter's layers.
        stalled: Vec<(u32, Nanos)>,
    },
    /// In: a swap has ended.
    SwapDone {
        /// When the scheduler was told.
        t: Nanos,
        /// The slot.
        slot: u32,
    },
    /// In: a new adapter.
    AddAdapter {
        /// When the scheduler was told.
        t: Nanos,
        /// The id that it got.
        adapter: u32,
        /// Its rank.
        rank: u32,
        /// Bytes of a swap.
        bytes: u64,
    },
    /// In: no new requests for an adapter.
    RemoveAdapter {
        /// When the scheduler was told.
        t: Nanos,
        /// The adapter.
        adapter: u32,
    },
    /// In: the user's pin.
    PinAdapter {
        /// When the scheduler was told.
        t: Nanos,
        /// The adapter.
        adapter: u32,
        /// Whether it is pinned from now on.
        pinned: bool,
    },
    /// In: an adapter has been read from disk.
    FetchDone {
        /// When the scheduler was told.
        t: Nanos,
        /// The adapter.
        adapter: u32,
        /// Whether it could not be read.
        failed: bool,
    },
    /// In: the scheduler was asked for a plan and had none.
    Idle {
        /// When.
        t: Nanos,
    },
    /// Out: a step, written when it has ended.
    Step {
        /// Its number.
        step: u64,
        /// When it was planned.
        formed: Nanos,
        /// When it was given to the executor.
        submitted: Nanos,
        /// When the device began.
        started: Nanos,
        /// When the device had ended.
        ended: Nanos,
        /// When the scheduler was told; the step's duration for a replay is `done − submitted`.
        done: Nanos,
        /// What it computed, in plan order.
        seqs: Vec<LoggedSeq>,
        /// Slots still loading when it was planned.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        loading: Vec<u32>,
        /// Whether it waited for them before it was submitted.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        waited: bool,
    },
    /// Out: a swap, written when it has ended.
    Swap {
        /// The adapter.
        adapter: u32,
        /// Where to.
        slot: u32,
        /// Whose slot it was.
        evicted: Option<u32>,
        /// Bytes copied.
        bytes: u64,
        /// Whether it went ahead of demand.
        prefetch: bool,
        /// Time of the event or plan that decided it.
        decided: Nanos,
        /// When it was given to the executor.
        submitted: Nanos,
        /// When the first byte moved.
        started: Nanos,
        /// When the last byte had.
        ended: Nanos,
        /// When the scheduler was told; the swap's duration for a replay is `done − submitted`.
        done: Nanos,
    },
    /// Out: a read of an adapter from disk, written when it has ended.
    Fetch {
        /// The adapter.
        adapter: u32,
        /// Whose place in host memory it took.
        evicted: Option<u32>,
        /// Bytes, as they lie in host memory.
        bytes: u64,
        /// Time of the event or plan that decided it.
        decided: Nanos,
        /// When the disk's thread was asked.
        submitted: Nanos,
        /// When it began.
        started: Nanos,
        /// When it had ended.
        ended: Nanos,
        /// When the scheduler was told; the read's duration for a replay is `done − decided`.
        done: Nanos,
    },
    /// Out: a removed adapter holds nothing any more.
    AdapterGone {
        /// When.
        t: Nanos,
        /// The adapter.
        adapter: u32,
    },
    /// Out: a request's first token.
    First {
        /// When, at the scheduler.
        t: Nanos,
        /// The request.
        id: u64,
        /// front, queue, kv, slot, swap and prefill; they sum to `t − received`.
        parts: [Nanos; 6],
    },
    /// Out: a request has ended.
    Ended {
        /// When.
        t: Nanos,
        /// The request.
        id: u64,
        /// `stop`, `length`, `cancelled` or `failed`.
        why: LoggedEnd,
    },
    /// Out: a request lost its blocks and waits again.
    Preempted {
        /// When.
        t: Nanos,
        /// The request.
        id: u64,
    },
}

/// [`Ended`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoggedEnd {
    /// A stop condition.
    Stop,
    /// Its length.
    Length,
    /// A cancel.
    Cancelled,
    /// Its adapter could not be read.
    Failed,
}

impl From<Ended> for LoggedEnd {
    fn from(why: Ended) -> Self {
        match why {
            Ended::Stop => Self::Stop,
            Ended::Length => Self::Length,
            Ended::Cancelled => Self::Cancelled,
            Ended::Failed => Self::Failed,
        }
    }
}

/// One sequence's share of a step, as an array: request, adapter, slot, start, length, decode, samples,
/// new blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedSeq(
    /// The request.
    pub u64,
    /// The adapter.
    pub Option<u32>,
    /// Its slot.
    pub Option<u32>,
    /// Tokens in the KV cache before the step.
    pub u32,
    /// Tokens computed.
    pub u32,
    /// Whether it decodes.
    pub bool,
    /// Whether it samples.
    pub bool,
    /// KV blocks given to it.
    pub u32,
);

impl From<&SeqStep> for LoggedSeq {
    fn from(s: &SeqStep) -> Self {
        let (adapter, slot) = s.adapter.map(|(a, s)| (a.0, s.0)).unzip();
        Self(
            s.id.0,
            adapter,
            slot,
            s.start,
            s.len,
            s.decode,
            s.samples,
            s.new_blocks.end - s.new_blocks.start,
        )
    }
}
