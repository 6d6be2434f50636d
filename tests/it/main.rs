//! Integration tests: one binary, a file a behaviour.

mod load_commands;
mod load_run;
mod support;
mod workload;
