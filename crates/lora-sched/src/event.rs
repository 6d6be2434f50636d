//! What a driver tells the scheduler, and what the scheduler tells back.

use std::fmt;

use crate::AdapterSpec;
use crate::parts::Parts;
use crate::plan::{FetchPlan, SwapPlan};
use crate::types::{AdapterId, Nanos, PlaceId, RequestId, SlotId};

/// A request as it enters the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The driver's number for it; higher than every earlier one.
    pub id: RequestId,
    /// The adapter, or none for the base model.
    pub adapter: Option<AdapterId>,
    /// When the request reached the server; the time from then to the event is the front-end part.
    pub received: Nanos,
    /// Prompt length, at least 1.
    pub prompt_tokens: u32,
    /// Output length at which the request ends if nothing stops it earlier, at least 1.
    pub max_tokens: u32,
}

/// Something that happened. Time is passed beside it and never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A request enters the queue.
    Arrive(Arrival),
    /// A client has gone, or a request is not wanted any more. Unknown and ended ids are ignored:
    /// a cancel may cross the request's own end.
    Cancel(RequestId),
    /// The step of the last plan has ended.
    StepDone {
        /// Indices into the plan's sequences of those whose new token ends them (stop strings, EOS).
        /// Ends by length are counted by the scheduler.
        stopped: &'a [u32],
        /// How long the step waited for layers of the adapter in each slot (`layered` only).
        stalled: &'a [(SlotId, Nanos)],
    },
    /// The copy into this slot has ended.
    SwapDone(SlotId),
    /// A new adapter, which gets the next id ([`Scheduler::next_adapter`](crate::Scheduler::next_adapter)).
    /// Where host memory does not hold all, its bytes are on disk.
    AddAdapter(AdapterSpec),
    /// No new requests for this adapter; when the ones it has have ended it gives up its slot
    /// ([`Notice::AdapterGone`]).
    RemoveAdapter(AdapterId),
    /// Pin an adapter for good, or let go of it again. One that has no slot is given the next that can
    /// be had.
    PinAdapter(AdapterId, bool),
    /// A [`FetchPlan`] has been carried out, or could not be. In that case every waiting request of the
    /// adapter ends ([`Ended::Failed`]) and new ones are refused until it is removed.
    FetchDone {
        /// The adapter.
        adapter: AdapterId,
        /// Whether its bytes could not be had.
        failed: bool,
    },
}

/// An event that could not be taken. The scheduler's state is as before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventError {
    /// The waiting queue is full.
    QueueFull {
        /// Its bound.
        max_queue: usize,
    },
    /// No such adapter, or it has been removed.
    UnknownAdapter(AdapterId),
    /// Prompt and output together exceed `max_model_len`.
    TooLong {
        /// Prompt plus output tokens.
        tokens: usize,
        /// The bound.
        max_model_len: usize,
    },
    /// An empty prompt or no output asked for.
    Empty(RequestId),
    /// An id that does not rise.
    IdOrder {
        /// The id given.
        id: RequestId,
        /// The least that would have been taken.
        at_least: RequestId,
    },
    /// `StepDone` without a step.
    NoStep,
    /// `SwapDone` for a slot that is not loading.
    NotLoading(SlotId),
    /// The pin would leave no slot for other adapters, or the adapter would find every slot pinned.
    AllPinned,
    /// The adapter's bytes could not be read.
    AdapterFailed(AdapterId),
    /// `FetchDone` for an adapter that is not being read.
    NotFetching(AdapterId),
    /// An index in `stopped` outside the plan.
    NoSuchSequence(u32),
}

impl fmt::Display for EventError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::QueueFull { max_queue } => write!(f, "the waiting queue is full ({max_queue} requests)"),
            Self::UnknownAdapter(id) => write!(f, "there is no adapter {id}"),
            Self::TooLong { tokens, max_model_len } => {
                write!(f, "prompt and output of {tokens} tokens exceed the model's {max_model_len}")
            }
            Self::Empty(id) => write!(f, "request {id} has no prompt tokens or asks for no output"),
            Self::IdOrder { id, at_least } => write!(f, "request id {id} comes after {at_least} was due"),
            Self::NoStep => write!(f, "no step is running"),
            Self::NotLoading(slot) => write!(f, "slot {slot} is not loading"),
            Self::AllPinned => {
                write!(f, "pinned adapters would leave no slot for the others: unpin one first")
            }
            Self::AdapterFailed(id) => {
                write!(f, "adapter {id} could not be read: unload it and load it again")
            }
            Self::NotFetching(id) => write!(f, "adapter {id} is not being read"),
            Self::NoSuchSequence(i) => write!(f, "the running step has no sequence {i}"),
        }
    }
}

impl std::error::Error for EventError {}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// A stop condition, told by the driver.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// Cancelled.
    Cancelled,
    /// Its adapter could not be read.
    Failed,
}

/// Something that a driver may want to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The request has its first token.
    FirstToken {
        /// The request.
        id: RequestId,
        /// Where the time since [`Arrival::received`] went; sums to it.
        parts: Parts,
    },
    /// The request has ended and everything that it held is free.
    Ended {
        /// The request.
        id: RequestId,
        /// Its place, if it was running.
        place: Option<PlaceId>,
        /// Why.
        why: Ended,
    },
    /// The request lost its blocks and waits again; it will be computed anew.
    Preempted {
        /// The request.
        id: RequestId,
        /// The place that it lost.
        place: PlaceId,
    },
    /// A removed adapter holds nothing any more.
    AdapterGone(AdapterId),
}

/// What comes out of the scheduler; the driver drains it.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    /// Copies to start, in order.
    pub swaps: Vec<SwapPlan>,
    /// Reads to start, in order.
    pub fetches: Vec<FetchPlan>,
    /// News, in order.
    pub notices: Vec<Notice>,
}

impl Outbox {
    /// Empties the lists and keeps their memory.
    pub fn clear(&mut self) {
        self.swaps.clear();
        self.fetches.clear();
        self.notices.clear();
    }
}
