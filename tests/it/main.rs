//! Integration tests: one binary, a file per behaviour.

mod experiment;
#[cfg(feature = "engine")]
mod parity;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "engine")]
mod rig;
