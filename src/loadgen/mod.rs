//! The load generator: an open-loop HTTP client for `/generate` and `/v1/completions`, and what it says about a run.

pub mod bench;
pub mod endpoint;
pub mod fault;
mod fixed_delay;
pub mod lag;
pub mod openai;
mod piece;
pub mod prepare;
pub mod proof;
pub mod rates;
pub mod run;
pub mod saturation;
mod send;
pub mod smoke;
pub mod status;
mod stream;
pub mod summary;

pub use endpoint::{Endpoint, EndpointError, Health, SwapCounts, SwapStats};
pub use fixed_delay::FixedDelay;
pub use lag::Lag;
pub use openai::{AdapterNames, Completions};
pub use prepare::{Dialect, Interface, PrepareError, PreparedRequest, prepare, prepare_for};
pub use run::{LoadOptions, LoadOutcome, Progress, run_load};
pub use saturation::saturated;
pub use status::RateStatus;
