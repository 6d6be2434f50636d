//! The kernels' twins: plain functions on the host that say what each kernel computes.

pub mod attention;
pub mod draw;
pub mod gemm;
pub mod lora;
pub mod rope_kv;
pub mod rows;
pub mod sample;
