//! The engine: model families over a backend trait, executors, the step loop and the HTTP server.

pub mod adapters;
pub mod backend;
pub mod batch;
pub mod cpu;
pub mod executor;
pub mod model;
