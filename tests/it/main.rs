//! Integration tests: one binary, a file per behaviour.

mod experiment;
#[cfg(feature = "engine")]
mod parity;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "engine")]
mod rig;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "server")]
mod step_loop;
#[cfg(feature = "server")]
mod support;
