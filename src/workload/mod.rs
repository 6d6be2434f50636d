//! Traces: what is sent and what is replayed.

pub mod trace;
