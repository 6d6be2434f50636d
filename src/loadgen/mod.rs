//! The load generator: an open-loop HTTP client for `/generate`, and what it says about a run.

pub mod bench;
pub mod endpoint;
pub mod lag;
pub mod prepare;
pub mod rates;
pub mod run;
pub mod saturation;
pub mod smoke;
pub mod status;
mod stream;
pub mod summary;

pub use endpoint::{Endpoint, EndpointError, Health, SwapCounts, SwapStats};
pub use lag::Lag;
pub use prepare::{PreparedRequest, prepare};
pub use run::{LoadOptions, LoadOutcome, Progress, run_load};
pub use saturation::saturated;
pub use status::RateStatus;
