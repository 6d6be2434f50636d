//! What a device must be able to do for the models to run on it.
//!
//! The models of [`super::model`] are written once over [`Backend`]. All buffers are made before the
//! first step; an operation writes into buffers that it is given and allocates nothing. What a step
//! computes is described by a [`Batch`], which the device takes in [`StepBackend::run`] and which every
//! later operation of the step refers to. The KV cache and the adapter slots belong to the backend:
//! operations name a layer, and the batch's block tables and segments say where to look.
//!
//! Two kinds of memory: [`Backend::Buffer`] for what flows into matrix products, in the device's own
//! number format, and [`Backend::Wide`] for the residual stream and the logits, in f32. A part's last
//! product adds to the residual stream at once.
//!
//! Operations are asynchronous for all that a caller may assume: only [`StepBackend::sampled`] gives
//! results back.

use lora_sched::{Nanos, SlotId};

use super::batch::Batch;
use super::executor::{Sampling, TokenId, TokenLogprobs};
use super::model::{ModelSpec, Values};

/// A linear module inside a fused projection, for [`Adapted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraTarget {
    /// Its index in [`ModelSpec::modules`].
    pub module: usize,
    /// The first column of its output in the fused output.
    pub column: usize,
}

/// Which rows of the batch an operation's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// Those that sample, in batch order.
    Sampling,
}

/// What adapters may add to a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Adapted<'a> {
    /// The decoder layer.
    pub layer: usize,
    /// The rows that it is applied to.
    pub rows: Rows,
    /// The modules that the linear layer is made of.
    pub targets: &'a [LoraTarget],
}

/// The weight of a linear layer, fused or not, on its way to the device.
#[derive(Debug)]
pub struct HostMatrix {
    /// `[outputs, inputs]`, row-major, in parts that follow one another.
    pub weight: Vec<Values>,
    /// `[outputs]` in parts; empty for none.
    pub bias: Vec<Values>,
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
    /// Device memory in f32: the residual stream, logits.
    type Wide;
    /// The weight of a linear layer with its bias, in the layout that suits the device.
    type Matrix;
    /// A failure of the device.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Memory for `elements` elements, zeroed.
    fn buffer(&mut self, elements: usize) -> Result<Self::Buffer, Self::Error>;

    /// Memory for `elements` f32 elements, zeroed.
    fn wide(&mut self, elements: usize) -> Result<Self::Wide, Self::Error>;

    /// Memory that holds `values`.
    fn upload(&mut self, values: Values) -> Result<Self::Buffer, Self::Error>;

    /// A linear layer's weight.
    fn upload_matrix(&mut self, matrix: HostMatrix) -> Result<Self::Matrix, Self::Error>;

    /// `out[i] = table[token of row i]`; `table` is `[vocab, width]`, `out` `[n, width]`.
    fn embed(
        &mut self,
        n: usize,
        width: usize,
        table: &Self::Buffer,
        out: &mut Self::Wide,
    ) -> Result<(), Self::Error>;

    /// `x[i] += table[position of row i + offset]`; `table` is `[positions + offset, width]`, `x`
    /// `[n, width]`.
    fn add_positions(
        &mut self,
        n: usize,
        width: usize,
        offset: usize,
        table: &Self::Buffer,
        x: &mut Self::Wide,
    ) -> Result<(), Self::Error>;

    /// `out = x / sqrt(mean(x²) + eps) · weight` by row; `x` and `out` are `[n, width]`.
    fn rms_norm(
        &mut self,
        n: usize,
        norm: &Norm<Self::Buffer>,
        x: &Self::Wide,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// `out = (x − mean) / sqrt(variance + eps) · weight + bias` by row; `x` and `out` are
    /// `[n, width]`.
    fn layer_norm(
        &mut self,
        n: usize,
        norm: &Norm<Self::Buffer>,
        x: &Self::Wide,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Waits until layer `layer` of every adapter that the batch lists as loading is in its slot, unless the operations
    /// that read an adapter do so themselves.
    fn await_adapters(&mut self, layer: usize) -> Result<(), Self::Error>;

    /// `out = x · weightᵀ + bias`, and for every segment of the batch and every target that its adapter
    /// adapts, plus `scale · (x · Aᵀ) · Bᵀ` in the target's columns of the segment's rows. `x` is
    /// `[n, inputs]`, `out` `[n, outputs]`. What adapters cost follows the segments of the batch, never
    /// the number of slots.
    fn linear(
        &mut self,
        n: usize,
        matrix: &Self::Matrix,
        adapted: Adapted<'_>,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// [`Backend::linear`] added to `residual` `[n, outputs]`.
    fn linear_add(
        &mut self,
        n: usize,
        matrix: &Self::Matrix,
        adapted: Adapted<'_>,
        x: &Self::Buffer,
        residual: &mut Self::Wide,
    ) -> Result<(), Self::Error>;

    /// `out = x · weightᵀ + bias`, in f32, without adapters: the output matrix.
    fn linear_wide(
        &mut self,
        n: usize,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Wide,
    ) -> Result<(), Self::Error>;

    /// Turns the query and key columns of `qkv` `[n, q + k + v]` by the rows' positions (halves layout:
    /// dimension `i` pairs with `i + head_dim / 2`), the queries in place, and writes keys and values into
    /// the cache of `layer`, each row where the batch says. What becomes of `qkv`'s other columns is open.
    fn rope_and_write_kv(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// [`Backend::linear`] of queries, keys and values into `qkv`, and [`Backend::rope_and_write_kv`]: one
    /// operation for devices that save a pass over `qkv` by it. What becomes of its key and value columns is open.
    fn linear_rope_kv(
        &mut self,
        n: usize,
        matrix: &Self::Matrix,
        adapted: Adapted<'_>,
        x: &Self::Buffer,
        qkv: &mut Self::Buffer,
    ) -> Result<(), Self::Error> {
        self.linear(n, matrix, adapted, x, qkv)?;
        self.rope_and_write_kv(adapted.layer, n, qkv)
    }

    /// Writes the key and value columns of `qkv` `[n, q + k + v]` into the cache of `layer`, each
    /// row where the batch says.
    fn write_kv(&mut self, layer: usize, n: usize, qkv: &mut Self::Buffer) -> Result<(), Self::Error>;

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

    /// [`Backend::linear`] of gate and up into `gate_up`, and [`Backend::silu_mul`]: one operation for devices
    /// that save a pass over `gate_up` by it. What `gate_up` holds afterwards is open.
    #[expect(clippy::too_many_arguments, reason = "two operations' arguments")]
    fn linear_silu_mul(
        &mut self,
        n: usize,
        width: usize,
        matrix: &Self::Matrix,
        adapted: Adapted<'_>,
        x: &Self::Buffer,
        gate_up: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error> {
        self.linear(n, matrix, adapted, x, gate_up)?;
        self.silu_mul(n, width, gate_up, out)
    }

    /// `x = max(x, 0)`, `[n, width]`.
    fn relu(&mut self, n: usize, width: usize, x: &mut Self::Buffer) -> Result<(), Self::Error>;

    /// `out[j] = x[row that samples j]` for `samples` rows; `x` is `[rows, width]`, `out` `[samples, width]`.
    fn gather_samples(
        &mut self,
        samples: usize,
        width: usize,
        x: &Self::Wide,
        out: &mut Self::Wide,
    ) -> Result<(), Self::Error>;

    /// [`Backend::gather_samples`] of what flows into a product.
    fn gather_sample_inputs(
        &mut self,
        samples: usize,
        width: usize,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), Self::Error>;

    /// Chooses a token for each of `samples` rows of `logits` `[samples, vocab]`, which stay as they are, and
    /// keeps it as the last token of its sequence's place.
    fn sample(&mut self, samples: usize, logits: &Self::Wide) -> Result<(), Self::Error>;
}

/// What an executor needs of a backend besides the operations.
pub trait StepBackend: Backend {
    /// A sequence begins at a place.
    fn begin_sequence(&mut self, place: u32, sampling: Sampling);

    /// Takes the step's metadata and does `work(self, rows, samples)`, where the counts may be rounded up:
    /// rows beyond the batch's write nothing that anyone reads. A backend may record what the work submits
    /// and replay that for later batches of the same shape.
    fn run(
        &mut self,
        batch: &Batch,
        work: impl FnMut(&mut Self, usize, usize) -> Result<(), Self::Error>,
    ) -> Result<(), Self::Error>;

    /// The tokens of the last step, one for each sampling sequence in batch order; waits for the step's end.
    fn sampled(&mut self) -> Result<&[TokenId], Self::Error>;

    /// Of the token that the last step sampled at a place, if its sequence asks for it; [`Self::sampled`] first.
    fn logprobs(&mut self, place: u32) -> Option<Box<TokenLogprobs>>;

    /// How long the last step waited for the adapter in each slot that was loading.
    fn stalled(&mut self, to: &mut Vec<(SlotId, Nanos)>) -> Result<(), Self::Error>;

    /// Copies the first `out.len()` elements of `from` to the host; waits for them. For tests and
    /// diagnosis, never for serving.
    fn download(&mut self, from: &Self::Wide, out: &mut [f32]) -> Result<(), Self::Error>;
}

/// What a backend is made for.
#[derive(Clone, Debug)]
pub struct BackendShape {
    /// The model.
    pub spec: ModelSpec,
    /// The largest batch.
    pub limits: super::batch::BatchLimits,
}
