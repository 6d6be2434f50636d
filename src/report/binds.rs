//! Which resource requests wait for.

use serde::Serialize;

use super::results::ResultRow;
use super::stats::mean;

/// What holds a request up longest, on average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Binds {
    /// Sequence places or the batch's tokens, or the running step's end.
    Queue,
    /// KV blocks.
    Kv,
    /// Slots, all pinned.
    Slot,
    /// Copies of adapters.
    Swap,
    /// Its own prefill.
    Prefill,
}

impl Binds {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Kv => "KV",
            Self::Slot => "slot",
            Self::Swap => "swap",
            Self::Prefill => "prefill",
        }
    }

    /// The largest mean part of the TTFT over rows.
    pub fn of<'a>(rows: impl Iterator<Item = &'a ResultRow> + Clone) -> Option<Self> {
        let part = |of: fn(&ResultRow) -> Option<f64>| {
            mean(&rows.clone().filter_map(of).collect::<Vec<_>>()).unwrap_or(0.0)
        };
        let parts = [
            (Self::Queue, part(|r| r.ttft_queue_mean)),
            (Self::Kv, part(|r| r.ttft_kv_mean)),
            (Self::Slot, part(|r| r.ttft_slot_mean)),
            (Self::Swap, part(|r| r.ttft_swap_mean)),
            (Self::Prefill, part(|r| r.ttft_prefill_mean)),
        ];
        parts.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).filter(|p| p.1 > 0.0).map(|p| p.0)
    }
}
