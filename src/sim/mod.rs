//! The simulator: the engine's own scheduler on a virtual clock.
//!
//! [`run`] moves the clock from event to event; a [`Device`] says when submitted work ends. The
//! [`ModelDevice`] takes durations from a calibrated profile, [`replay`] takes them from a decision log.
//! [`Residuals`] holds the one against the other, by what [`LogTimes`] takes from a log.

mod clock;
mod device;
mod front_end;
mod log_times;
mod model_device;
mod recorded;
mod replay;
mod residuals;

pub use clock::{AdapterChange, Input, Observer, Outcome, SimRequest, Totals, run};
pub use device::{Device, Done, Skipped};
pub use front_end::FrontEnd;
pub use log_times::{CopyTime, LogTimes, LogTimesError, StepTime, rate_beside};
pub use model_device::ModelDevice;
pub use recorded::{RecordError, Recorded, RecordedFetch, RecordedStep, RecordedSwap};
pub use replay::{ReplayError, ReplayReport, replay};
pub use residuals::{KindResidual, RangeResidual, Residual, ResidualKind, ResidualReport, Residuals};
