//! Continuous batching with LoRA adapter slots, as one pure state machine.
//!
//! No I/O, no clock, no threads, no randomness and no dependencies: time comes in as an argument,
//! plans go out into the caller's buffers. An engine drives it with the wall clock, a simulator with
//! a virtual one, and both get the same decisions.
//!
//! ```
//! use lora_sched::{AdapterId, Arrival, Config, Event, Outbox, RequestId, Scheduler, StepPlan};
//!
//! // Four adapters, two of them resident.
//! let mut scheduler = Scheduler::new(Config::with_adapters(4, 2, 8, 1 << 20)).unwrap();
//! let (mut plan, mut out) = (StepPlan::default(), Outbox::default());
//! let arrival = Arrival {
//!     id: RequestId(0),
//!     adapter: Some(AdapterId(3)),
//!     received: 0,
//!     prompt_tokens: 100,
//!     max_tokens: 1,
//! };
//! scheduler.handle(10, Event::Arrive(arrival), &mut out).unwrap();
//! assert!(scheduler.plan(10, &mut plan, &mut out));
//! assert_eq!(out.swaps[0].evicted, Some(AdapterId(0)), "the least recently used made room");
//! assert_eq!(plan.seqs[0].len, 100);
//!
//! let slot = out.swaps[0].slot;
//! scheduler.handle(50, Event::SwapDone(slot), &mut out).unwrap();
//! scheduler.handle(90, Event::StepDone { stopped: &[], stalled: &[] }, &mut out).unwrap();
//! assert!(scheduler.is_idle());
//! ```
//!
//! Where to look: `scheduler.rs` takes events, `admit.rs` forms steps, `done.rs` ends them, `policy.rs` says who is
//! admitted, `slots.rs` and `evict.rs` say who is evicted, `adapters.rs` lets adapters come and go,
//! `host.rs` says which are read from disk, `meter.rs` says what a request waited for, `decodes.rs` brings
//! decoding requests further, `skip.rs` takes runs of equal steps at once.

mod adapters;
mod admit;
mod audit;
mod config;
mod decodes;
mod done;
mod event;
pub mod evict;
mod heap;
mod host;
mod kv;
mod meter;
mod parts;
mod plan;
pub mod policy;
mod queue;
mod requests;
mod scheduler;
mod skip;
mod slots;
mod types;

pub use config::{AdapterSpec, Config, ConfigError, Evict, Policy, SwapMode, UnknownChoice};
pub use event::{Arrival, Ended, Event, EventError, Notice, Outbox};
pub use host::HostState;
pub use parts::Parts;
pub use plan::{FetchPlan, Outline, SeqStep, StepPlan, SwapKind, SwapPlan};
pub use scheduler::Scheduler;
pub use skip::SteadyRun;
pub use slots::{SlotState, SlotView};
pub use types::{AdapterId, Nanos, PlaceId, RequestId, SlotId};
