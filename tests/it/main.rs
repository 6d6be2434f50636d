//! Integration tests: one binary, a file per behaviour.

#[cfg(feature = "engine")]
mod parity;
#[cfg(feature = "engine")]
mod rig;
