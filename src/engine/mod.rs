//! The engine: model families over a backend trait, executors, the step loop and the HTTP server.

pub mod adapters;
pub mod backend;
pub mod batch;
mod channel;
pub mod clock;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod emulated;
#[cfg(feature = "server")]
pub mod emulation;
pub mod executor;
mod facade;
mod fetcher;
mod gauges;
mod handle;
mod life;
pub mod memory;
pub mod model;
mod output;
mod request;
#[cfg(feature = "server")]
pub mod server;
pub mod setup;
mod step_loop;
mod warm_up;
mod watch;

pub use facade::{Engine, EngineConfig, StartError};
pub use gauges::{EngineStats, SlotView, SwapCounts, SwapStats};
pub use handle::GenerateHandle;
pub use life::{AdapterError, Made, Pending};
pub use request::{Delta, Finish, FirstToken, GenerateParams, GenerateRequest, Generated, SubmitError};
pub use step_loop::LoopError;
