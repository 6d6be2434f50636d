//! The engine: model families over a backend trait, executors, the step loop and the HTTP server.

pub mod executor;
