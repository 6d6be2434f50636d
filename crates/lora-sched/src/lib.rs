//! Continuous batching with LoRA adapter slots, as one pure state machine.
//!
//! No I/O, no clock, no threads, no randomness and no dependencies: time comes in as an argument,
//! plans go out into the caller's buffers. An engine drives it with the wall clock, a simulator with
//! a virtual one, and both get the same decisions.

mod config;
mod event;
mod parts;
mod plan;
mod types;

pub use config::{AdapterSpec, Config, ConfigError, Evict, Policy, SwapMode, UnknownChoice};
pub use event::{Arrival, Ended, Event, EventError, Notice, Outbox};
pub use parts::Parts;
pub use plan::{SeqStep, StepPlan, SwapKind, SwapPlan};
pub use types::{AdapterId, Nanos, PlaceId, RequestId, SlotId};
