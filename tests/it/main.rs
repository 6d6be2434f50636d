//! Integration tests: one binary, a file per behaviour.

#[cfg(feature = "server")]
mod adapter_disk;
#[cfg(feature = "server")]
mod adapter_life;
#[cfg(feature = "server")]
mod bench;
#[cfg(feature = "server")]
mod black_box;
#[cfg(feature = "server")]
mod device_choice;
#[cfg(feature = "server")]
mod emulate;
#[cfg(feature = "engine")]
mod executor;
mod experiment;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod gpu_graphs;
#[cfg(feature = "server")]
mod load_commands;
#[cfg(feature = "server")]
mod load_run;
#[cfg(feature = "engine")]
mod load_support;
#[cfg(feature = "server")]
mod measured_sweep;
#[cfg(feature = "engine")]
mod models;
#[cfg(feature = "server")]
mod openai;
#[cfg(feature = "server")]
mod openai_load;
#[cfg(feature = "server")]
mod openai_together;
mod oracles;
#[cfg(feature = "engine")]
mod parity;
mod planning;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "server")]
mod replay;
mod residuals;
#[cfg(feature = "engine")]
mod rig;
#[cfg(feature = "server")]
mod serve_command;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "server")]
mod server_robust;
mod simulate;
mod skipping;
#[cfg(feature = "engine")]
mod smollm2;
#[cfg(feature = "server")]
mod soak;
#[cfg(feature = "server")]
mod step_loop;
#[cfg(feature = "server")]
mod support;
#[cfg(feature = "server")]
mod traffic;
mod validation;
#[cfg(feature = "engine")]
mod workload;
