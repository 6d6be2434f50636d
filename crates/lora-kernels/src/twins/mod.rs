//! The kernels' twins: plain functions on the host that say what each kernel computes.

pub mod attention;
pub mod rope_kv;
