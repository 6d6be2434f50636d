//! Integration tests: one binary, a file per behaviour.

mod experiment;
#[cfg(feature = "engine")]
mod parity;
#[cfg(feature = "engine")]
mod rig;
#[cfg(feature = "plot")]
mod plot;
