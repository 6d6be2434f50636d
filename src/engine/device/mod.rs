//! What executors of real devices share: a compute thread and a copy thread behind `submit` and `wait`,
//! the order of copies, sampling on the host.

mod ceilings;
mod compute;
mod copies;
mod executor;
mod loaded;
mod options;
mod reports;
mod sample;
mod step;

pub use ceilings::{Burst, Ceilings};
pub use executor::DeviceExecutor;
pub use loaded::LoadedModel;
pub use step::StepError;

pub(in crate::engine) use compute::Compute;
#[cfg(feature = "cuda")]
pub(in crate::engine) use copies::Copy;
pub(in crate::engine) use copies::CopyQueue;
pub(in crate::engine) use executor::{Parts, SlotMemory};
pub(in crate::engine) use options::check_options;
pub(in crate::engine) use reports::Reports;
pub(in crate::engine) use sample::SeqSampler;
pub(in crate::engine) use step::{input_ids, wanted};
