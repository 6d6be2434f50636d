//! What a device must be able to do for the models to run on it.
//!
//! The models of [`super::model`] are written once over [`Backend`]. All buffers are made before the
//! first step; an operation writes into buffers that it is given and allocates nothing. What a step
//! computes is described by a [`Batch`], which the device takes in [`Backend::begin`] and which every
//! later operation of the step refers to. The KV cache and the adapter slots belong to the backend:
//! operations name a layer, and the batch's block tables and segments say where to look.
//!
//! Operations are asynchronous for all that a caller may assume: only [`Backend::sampled`] gives
//! results back.

use super::batch::Batch;
use super::executor::TokenId;
use super::model::ModelSpec;

/// A linear module inside a fused projection, for [`Backend::lora`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraTarget {
    /// Its index in [`ModelSpec::modules`].
    pub module: usize,
    /// The first column of its output in the fused output.
    pub column: usize,
}

/// The weight of a linear layer, fused or not, on its way to the device.
#[derive(Debug)]
pub struct HostMatrix {
    /// `[outputs, inputs]`, row-major.
    pub weight: Vec<f32>,
    /// `[outputs]`, or none.
    pub bias: Option<Vec<f32>>,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
}

/// A norm's parameters on the device.
#[derive(Debug)]
pub struct Norm<T> {
    /// Columns of a row.
    pub width: usize,
    /// Added to the variance.
    pub eps: f32,
    /// `[width]`.
    pub weight: T,
    /// `[width]`; LayerNorm has one, RMSNorm has none.
    pub bias: Option<T>,
}

/// Operations on one device. `n` is the number of rows that an operation works on; buffers hold at
/// least that many, densely. Shapes are `[rows, columns]`, row-major.
pub trait Backend {
    /// Device memory for activations, norm weights and embedding tables.
    type Buffer;
    /// The weight of a linear layer with its bias, in the layout that suits the device.
    type Matrix;
    /// A failure of the device.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Memory for `elements` elements, zeroed.
    fn buffer(&mut self, elements: usize) -> Result<Self::Buffer, Self::Error>;

    /// Memory that holds `values`.
    fn upload(&mut self, values: Vec<f32>) -> Result<Self::Buffer, Self::Error>;

    /// A linear layer's weight.
    fn upload_matrix(&mut self, matrix: HostMatrix) -> Result<Self::Matrix, Self::Error>;

    /// Takes the step's metadata.
    fn begin(&mut self, batch: &Batch) -> Result<(), Self::Error>;

    /// `out[i] = table[token of row i]`; `table` is `[vocab, width]`, `out` `[n, width]`.
    fn embed(
        &mut self,
        n: usize,
        width: usize,
        table: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `x[i] += table[position of row i + offset]`; `table` is `[positions + offset, width]`, `x`
    /// `[n, width]`.
    fn add_positions(
        &mut self,
        n: usize,
        width: usize,
        offset: usize,
        table: &Self::Buffer,
        x: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `x += y`, both `[n, width]`.
    fn add(
        &mut self,
        n: usize,
        width: usize,
        y: &Self::Buffer,
        x: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = x / sqrt(mean(x²) + eps) · weight` by row; `x` and `out` are `[n, width]`.
    fn rms_norm(
        &mut self,
        n: usize,
        norm: &Norm<Self::Buffer>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `x += y`, then [`Backend::rms_norm`] of `x`; all are `[n, width]`.
    fn add_rms_norm(
        &mut self,
        n: usize,
        norm: &Norm<Self::Buffer>,
        y: &Self::Buffer,
        x: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = (x − mean) / sqrt(variance + eps) · weight + bias` by row; `x` and `out` are
    /// `[n, width]`.
    fn layer_norm(
        &mut self,
        n: usize,
        norm: &Norm<Self::Buffer>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = x · weightᵀ + bias`; `x` is `[n, inputs]`, `out` `[n, outputs]`.
    fn linear(
        &mut self,
        n: usize,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Waits until layer `layer` of every adapter that the batch lists as loading is in its slot.
    fn await_adapters(&mut self, layer: usize) -> Result<(), Self::Error>;

    /// For every segment of the batch and every target that its adapter adapts, adds
    /// `scale · (x · Aᵀ) · Bᵀ` to the target's columns of the segment's rows. `x` is `[n, inputs]`
    /// with the targets' common input width, `out` is `[n, width]`. Its cost follows the segments of
    /// the batch, never the number of slots.
    fn lora(
        &mut self,
        layer: usize,
        targets: &[LoraTarget],
        x: &Self::Buffer,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Turns the query and key columns of `qkv` `[n, q + k + v]` in place by the rows' positions
    /// (halves layout: dimension `i` pairs with `i + head_dim / 2`).
    fn rope(&mut self, n: usize, qkv: &mut Self::Buffer) -> Result<(), Self::Error>;

    /// Writes the key and value columns of `qkv` `[n, q + k + v]` into the cache of `layer`, each
    /// row where the batch says.
    fn write_kv(&mut self, layer: usize, n: usize, qkv: &Self::Buffer) -> Result<(), Self::Error>;

    /// Causal attention of every sequence's rows over its context in the cache of `layer`, scaled by
    /// `head_dim^-½`. The queries are the first columns of `qkv` `[n, q + k + v]`; `out` is `[n, q]`.
    fn attention(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = silu(gate) · up`; `gate_up` is `[n, 2 · width]`, gate first; `out` is `[n, width]`.
    fn silu_mul(
        &mut self,
        n: usize,
        width: usize,
        gate_up: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `x = max(x, 0)`, `[n, width]`.
    fn relu(&mut self, n: usize, width: usize, x: &mut Self::Buffer) -> Result<(), Self::Error>;

    /// `out[j] = x[row that samples j]`; `x` is `[rows, width]`, `out` `[sampling seqs, width]`.
    fn gather_samples(
        &mut self,
        width: usize,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Chooses a token for each sampling sequence from `logits` `[sampling seqs, vocab]` and keeps it
    /// as the last token of the sequence's place.
    fn sample(&mut self, logits: &mut Self::Buffer) -> Result<(), Self::Error>;

    /// The tokens of the last [`Backend::sample`], one for each sampling sequence; waits for them.
    fn sampled(&mut self) -> Result<&[TokenId], Self::Error>;

    /// Copies the first `out.len()` elements of `buffer` to the host; waits for them. For tests and
    /// diagnosis, never for serving.
    fn download(&mut self, buffer: &Self::Buffer, out: &mut [f32]) -> Result<(), Self::Error>;
}

/// What a backend is made for.
#[derive(Clone, Debug)]
pub struct BackendShape {
    /// The model.
    pub spec: ModelSpec,
    /// The largest batch.
    pub limits: super::batch::BatchLimits,
}
