//! What a scheduler is made with, and what it refuses.

use std::fmt;
use std::str::FromStr;

use crate::types::Nanos;

/// Everything that a scheduler's decisions depend on, besides the events.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The adapters, in id order. An empty list serves the base model alone.
    pub adapters: Vec<AdapterSpec>,
    /// Slots in device memory. Adapters `0..gpu_loras` are resident from the start.
    pub gpu_loras: usize,
    /// Adapters in host memory, at most; the others are read from disk when they are wanted. None: all
    /// are in host memory. Adapters `0..host_loras` are there from the start.
    pub host_loras: Option<usize>,
    /// Running sequences at once, at most.
    pub max_num_seqs: usize,
    /// Tokens in one step, at most.
    pub max_num_batched_tokens: usize,
    /// Prompt and output tokens of one request, at most.
    pub max_model_len: usize,
    /// Tokens in one KV block.
    pub block_size: usize,
    /// KV blocks in the pool.
    pub kv_blocks: usize,
    /// Whether a prompt may be spread over several steps.
    pub chunked_prefill: bool,
    /// Who is admitted when the oldest waiting request lacks only a slot.
    pub policy: Policy,
    /// Which resident adapter gives up its slot.
    pub evict: Evict,
    /// How a swap and the step that needs it are ordered.
    pub swap_mode: SwapMode,
    /// Start swaps ahead of demand for this many requests from the head of the queue.
    pub prefetch: usize,
    /// Nothing that needs a slot goes past a request that has waited for a slot longer than this.
    pub max_skip_age: Nanos,
    /// Waiting requests, at most; further arrivals are refused.
    pub max_queue: usize,
}

impl Default for Config {
    /// The reference experiment's limits, with no adapters and a pool of 4,112 blocks of 16 tokens
    /// (16 sequences of 4,112 tokens).
    fn default() -> Self {
        Self {
            adapters: Vec::new(),
            gpu_loras: 0,
            host_loras: None,
            max_num_seqs: 16,
            max_num_batched_tokens: 4096,
            max_model_len: 4352,
            block_size: 16,
            kv_blocks: 4112,
            chunked_prefill: true,
            policy: Policy::Skip,
            evict: Evict::Lru,
            swap_mode: SwapMode::Layered,
            prefetch: 0,
            max_skip_age: 2_000_000_000,
            max_queue: usize::MAX,
        }
    }
}

impl Config {
    /// `total` equal adapters of `rank` and `bytes`, the rest as in [`Config::default`].
    pub fn with_adapters(total: usize, gpu_loras: usize, rank: u32, bytes: u64) -> Self {
        Self { adapters: vec![AdapterSpec::new(rank, bytes); total], gpu_loras, ..Self::default() }
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Says what is impossible about this configuration.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |name, value: usize| if value == 0 { Err(ConfigError::Zero(name)) } else { Ok(()) };
        positive("max_num_seqs", self.max_num_seqs)?;
        positive("max_num_batched_tokens", self.max_num_batched_tokens)?;
        positive("max_model_len", self.max_model_len)?;
        positive("block_size", self.block_size)?;
        positive("kv_blocks", self.kv_blocks)?;
        if !self.adapters.is_empty() {
            positive("gpu_loras", self.gpu_loras)?;
        }
        if self.gpu_loras > self.adapters.len() {
            return Err(ConfigError::MoreSlotsThanAdapters {
                gpu_loras: self.gpu_loras,
                total: self.adapters.len(),
            });
        }
        if let Some(host_loras) = self.host_loras.filter(|&host| host < self.gpu_loras.max(1)) {
            return Err(ConfigError::HostSmallerThanSlots { host_loras, gpu_loras: self.gpu_loras });
        }
        if self.blocks_for(self.max_model_len) > self.kv_blocks {
            return Err(ConfigError::KvTooSmall {
                needed: self.blocks_for(self.max_model_len),
                available: self.kv_blocks,
                max_model_len: self.max_model_len,
            });
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(ConfigError::BatchSmallerThanSeqs {
                tokens: self.max_num_batched_tokens,
                seqs: self.max_num_seqs,
            });
        }
        if !self.chunked_prefill && self.max_num_batched_tokens < self.max_model_len {
            return Err(ConfigError::PromptsDoNotFit {
                tokens: self.max_num_batched_tokens,
                max_model_len: self.max_model_len,
            });
        }
        if self.prefetch > 0 && self.swap_mode == SwapMode::Blocking {
            return Err(ConfigError::PrefetchWhileBlocking);
        }
        let user_pinned = self.adapters.iter().filter(|a| a.pinned).count();
        if user_pinned > 0 && user_pinned >= self.gpu_loras && self.adapters.len() > self.gpu_loras {
            return Err(ConfigError::AllPinned { pinned: user_pinned, gpu_loras: self.gpu_loras });
        }
        Ok(())
    }
}

/// What the scheduler knows about one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterSpec {
    /// LoRA rank.
    pub rank: u32,
    /// Bytes that a swap copies.
    pub bytes: u64,
    /// Pinned by the user: never evicted once resident.
    pub pinned: bool,
}

impl AdapterSpec {
    /// An adapter that may be evicted.
    pub fn new(rank: u32, bytes: u64) -> Self {
        Self { rank, bytes, pinned: false }
    }
}

/// A choice that users name on the command line; `ALL` lists the names.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every choice, in the order of the documentation.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The name that users type.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownChoice;

            fn from_str(s: &str) -> Result<Self, UnknownChoice> {
                match s {
                    $($text => Ok($name::$variant),)+
                    _ => Err(UnknownChoice {
                        what: $what,
                        value: s.to_owned(),
                        choices: &[$($text),+],
                    }),
                }
            }
        }
    };
}

choice!(
    /// Who is admitted when a waiting request lacks only a slot.
    Policy, "policy" {
        /// Look further down the queue, up to the age bound.
        Skip = "skip",
        /// Nobody passes the head of the queue.
        Fcfs = "fcfs",
        /// Requests of resident adapters first, up to the age bound.
        Affinity = "affinity",
    }
);
choice!(
    /// Which resident adapter gives up its slot.
    Evict, "eviction rule" {
        /// Least recently used.
        Lru = "lru",
        /// Least frequently used, then least recently.
        Lfu = "lfu",
        /// Fewest waiting requests, then least recently used.
        FewestPending = "fewest-pending",
        /// GreedyDual-Size-Frequency: aged frequency times bytes to copy back.
        Cost = "cost",
        /// Longest resident.
        Fifo = "fifo",
    }
);
choice!(
    /// How a swap and the step that needs it are ordered.
    SwapMode, "swap mode" {
        /// The step waits for its swaps; the device is idle meanwhile.
        Blocking = "blocking",
        /// The request waits for its swap; steps of others go on.
        Overlap = "overlap",
        /// The step starts at once; its layer `k` waits for layer `k` of the adapter.
        Layered = "layered",
    }
);

/// A name that is none of the choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownChoice {
    what: &'static str,
    value: String,
    choices: &'static [&'static str],
}

impl fmt::Display for UnknownChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown {} '{}': use one of {}", self.what, self.value, self.choices.join(", "))
    }
}

impl std::error::Error for UnknownChoice {}

/// A configuration that no scheduler can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// A limit that must be at least 1.
    Zero(&'static str),
    /// More slots than adapters.
    MoreSlotsThanAdapters {
        /// Slots asked for.
        gpu_loras: usize,
        /// Adapters there are.
        total: usize,
    },
    /// Fewer places in host memory than slots, which are filled from there.
    HostSmallerThanSlots {
        /// Places in host memory.
        host_loras: usize,
        /// Slots.
        gpu_loras: usize,
    },
    /// One request of `max_model_len` tokens would not fit.
    KvTooSmall {
        /// Blocks that it needs.
        needed: usize,
        /// Blocks there are.
        available: usize,
        /// The length.
        max_model_len: usize,
    },
    /// A step must be able to hold one token of each running sequence.
    BatchSmallerThanSeqs {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// `max_num_seqs`.
        seqs: usize,
    },
    /// Without chunked prefill the longest prompt must fit in a step.
    PromptsDoNotFit {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// The length.
        max_model_len: usize,
    },
    /// In `blocking` mode nothing is copied ahead of the step that waits for it.
    PrefetchWhileBlocking,
    /// User pins would leave no slot for the other adapters.
    AllPinned {
        /// Adapters pinned by the user.
        pinned: usize,
        /// Slots.
        gpu_loras: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero(name) => write!(f, "{name} must be at least 1"),
            Self::MoreSlotsThanAdapters { gpu_loras, total } => {
                write!(f, "gpu_loras ({gpu_loras}) is greater than total_loras ({total}): lower gpu_loras")
            }
            Self::HostSmallerThanSlots { host_loras, gpu_loras } => write!(
                f,
                "host_loras ({host_loras}) is less than gpu_loras ({gpu_loras}): slots are filled from host memory, \
                 so raise the first or lower the second"
            ),
            Self::KvTooSmall { needed, available, max_model_len } => write!(
                f,
                "a request of max_model_len {max_model_len} tokens needs {needed} KV blocks and there are {available}: \
                 give the KV cache more memory, lower gpu_loras, or lower max_model_len"
            ),
            Self::BatchSmallerThanSeqs { tokens, seqs } => write!(
                f,
                "max_num_batched_tokens ({tokens}) is less than max_num_seqs ({seqs}): raise the first or lower the second"
            ),
            Self::PromptsDoNotFit { tokens, max_model_len } => write!(
                f,
                "without chunked prefill a step must hold the longest prompt: max_num_batched_tokens ({tokens}) \
                 is less than max_model_len ({max_model_len})"
            ),
            Self::PrefetchWhileBlocking => {
                write!(
                    f,
                    "prefetch needs the swap mode overlap or layered: in blocking mode the device idles during a swap"
                )
            }
            Self::AllPinned { pinned, gpu_loras } => write!(
                f,
                "{pinned} adapters pinned for good leave none of the {gpu_loras} slots for the others: pin fewer"
            ),
        }
    }
}

impl std::error::Error for ConfigError {}
