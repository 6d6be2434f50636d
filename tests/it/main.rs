//! Integration tests, one binary: a file per behaviour.

mod experiment;
#[cfg(feature = "plot")]
mod plot;
