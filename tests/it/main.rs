//! Integration tests: one binary, a file per behaviour.

#[cfg(feature = "server")]
mod bench;
#[cfg(feature = "server")]
mod device_choice;
#[cfg(feature = "engine")]
mod executor;
mod experiment;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "server")]
mod load_commands;
#[cfg(feature = "server")]
mod load_run;
#[cfg(feature = "engine")]
mod load_support;
#[cfg(feature = "engine")]
mod parity;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "server")]
mod replay;
#[cfg(feature = "engine")]
mod rig;
#[cfg(feature = "server")]
mod serve_command;
#[cfg(feature = "server")]
mod server;
mod simulate;
#[cfg(feature = "server")]
mod soak;
#[cfg(feature = "server")]
mod step_loop;
#[cfg(feature = "server")]
mod support;
#[cfg(feature = "server")]
mod traffic;
#[cfg(feature = "engine")]
mod workload;
