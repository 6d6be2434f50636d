//! What the families share: the workspace, loading, and the entry to a step.

use std::sync::Arc;

use super::llama::Llama;
use super::opt::Opt;
use super::spec::{Family, ModelSpec};
use super::weights::{WeightError, Weights};
use crate::engine::backend::{Adapted, Backend, HostMatrix, LoraTarget, Norm, Rows};
use crate::engine::batch::BatchLimits;

/// A model on a device, with the buffers of its step.
pub struct Decoder<B: Backend> {
    model: Arc<DeviceModel<B>>,
    spec: ModelSpec,
    work: Workspace<B>,
}

/// A model's weights on a device: shared by the executors that follow one another on it.
pub struct DeviceModel<B: Backend>(Layers<B>);

enum Layers<B: Backend> {
    Llama(Llama<B>),
    Opt(Opt<B>),
}

/// Where a linear layer's product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A buffer: [`Backend::linear`].
    Buffer,
    /// The residual stream: [`Backend::linear_add`].
    Residual,
    /// Wide memory: [`Backend::linear_wide`].
    Wide,
}

/// Buffers of one step. `rows` is the largest number of rows, `seqs` that of sampling sequences.
pub(super) struct Workspace<B: Backend> {
    /// `[rows, hidden]`: the residual stream.
    pub residual: B::Wide,
    /// `[rows, hidden]`: a norm's output.
    pub normed: B::Buffer,
    /// `[rows, q + k + v]`.
    pub qkv: B::Buffer,
    /// `[rows, q]`.
    pub attended: B::Buffer,
    /// `[rows, 2 · intermediate]` for SwiGLU, `[rows, intermediate]` for ReLU.
    pub up: B::Buffer,
    /// `[rows, intermediate]`; empty for ReLU, which works in place.
    pub act: B::Buffer,
    /// `[seqs, q]`: of rows that sample.
    pub last_attended: B::Buffer,
    /// `[seqs, hidden]`: rows that sample.
    pub last: B::Wide,
    /// `[seqs, hidden]`: their norm.
    pub last_normed: B::Buffer,
    /// `[seqs, vocab]`.
    pub logits: B::Wide,
}

/// Elements of the buffers of `Workspace`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceElements {
    residual: usize,
    normed: usize,
    qkv: usize,
    attended: usize,
    up: usize,
    act: usize,
    last_attended: usize,
    last: usize,
    logits: usize,
}

impl WorkspaceElements {
    /// What a step of up to `limits` takes.
    pub fn new(spec: &ModelSpec, limits: &BatchLimits) -> Self {
        let (rows, seqs) = (limits.max_num_batched_tokens, limits.max_num_seqs);
        let (up, act) = match spec.family {
            Family::Llama => (2 * spec.intermediate, spec.intermediate),
            Family::Opt => (spec.intermediate, 0),
        };
        Self {
            residual: rows * spec.hidden,
            normed: rows * spec.hidden,
            qkv: rows * spec.qkv_dim(),
            attended: rows * spec.q_dim(),
            up: rows * up,
            act: rows * act,
            last_attended: seqs * spec.q_dim(),
            last: seqs * spec.hidden,
            logits: seqs * spec.vocab_size,
        }
    }

    /// Elements in the device's number format.
    pub fn narrow(&self) -> usize {
        self.normed + self.qkv + self.attended + self.up + self.act + self.last_attended + self.last
    }

    /// Elements in f32.
    pub fn wide(&self) -> usize {
        self.residual + self.last + self.logits
    }
}

/// Whether what follows the last layer's attention is computed for the rows that sample alone: nobody reads the
/// others' results. Of `n` rows `samples` sample; where most do, as in a step of decodes, it would save less than
/// gathering them costs.
pub fn narrows(n: usize, samples: usize) -> bool {
    2 * samples <= n
}

/// The rows that a part of a layer works on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub layer: usize,
    pub n: usize,
    pub rows: Rows,
}

impl Span {
    /// All `n` rows.
    pub fn all(layer: usize, n: usize) -> Self {
        Self { layer, n, rows: Rows::All }
    }

    /// The `n` rows that sample.
    pub fn sampling(layer: usize, n: usize) -> Self {
        Self { layer, n, rows: Rows::Sampling }
    }
}

/// A family's layers, in the parts that a step is made of.
pub(super) trait Stack<B: Backend> {
    /// Tokens to the residual stream.
    fn embed(&self, b: &mut B, w: &mut Workspace<B>, n: usize) -> Result<(), B::Error>;

    /// A layer up to its queries, with its keys and values in the cache.
    fn project(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error>;

    /// What follows a layer's attention.
    fn rest(&self, b: &mut B, w: &mut Workspace<B>, at: Span) -> Result<(), B::Error>;

    /// The rows that sample to their logits.
    fn head(&self, b: &mut B, w: &mut Workspace<B>, samples: usize) -> Result<(), B::Error>;
}

/// One step over `n` rows, `samples` of which get logits.
fn forward<B: Backend>(
    stack: &impl Stack<B>,
    b: &mut B,
    w: &mut Workspace<B>,
    spec: &ModelSpec,
    n: usize,
    samples: usize,
) -> Result<(), B::Error> {
    let narrow = narrows(n, samples);
    stack.embed(b, w, n)?;
    for layer in 0..spec.layers {
        let (at, last) = (Span::all(layer, n), layer + 1 == spec.layers);
        b.await_adapters(layer)?;
        stack.project(b, w, at)?;
        if last && samples == 0 {
            // The keys and values were all that is left to compute.
            return Ok(());
        }
        b.attention(layer, n, &w.qkv, &mut w.attended)?;
        if last && narrow {
            b.gather_sample_inputs(samples, spec.q_dim(), &w.attended, &mut w.last_attended)?;
            b.gather_samples(samples, spec.hidden, &w.residual, &mut w.last)?;
            stack.rest(b, w, Span::sampling(layer, samples))?;
        } else {
            stack.rest(b, w, at)?;
        }
    }
    if !narrow {
        b.gather_samples(samples, spec.hidden, &w.residual, &mut w.last)?;
    }
    stack.head(b, w, samples)
}

/// The buffers of what follows attention.
pub(super) struct Rest<'a, B: Backend> {
    /// Attention's output, and the residual stream: of all rows, or the copies of those that sample.
    pub attended: &'a B::Buffer,
    pub residual: &'a mut B::Wide,
    /// Room for all rows.
    pub normed: &'a mut B::Buffer,
    pub up: &'a mut B::Buffer,
    pub act: &'a mut B::Buffer,
}

impl<B: Backend> Workspace<B> {
    /// What follows attention works on these, for these rows.
    pub fn rest(&mut self, rows: Rows) -> Rest<'_, B> {
        let (attended, residual) = match rows {
            Rows::All => (&self.attended, &mut self.residual),
            Rows::Sampling => (&self.last_attended, &mut self.last),
        };
        Rest { attended, residual, normed: &mut self.normed, up: &mut self.up, act: &mut self.act }
    }

    fn new(b: &mut B, spec: &ModelSpec, limits: &BatchLimits) -> Result<Self, B::Error> {
        let sizes = WorkspaceElements::new(spec, limits);
        Ok(Self {
            residual: b.wide(sizes.residual)?,
            normed: b.buffer(sizes.normed)?,
            qkv: b.buffer(sizes.qkv)?,
            attended: b.buffer(sizes.attended)?,
            up: b.buffer(sizes.up)?,
            act: b.buffer(sizes.act)?,
            last_attended: b.buffer(sizes.last_attended)?,
            last: b.wide(sizes.last)?,
            last_normed: b.buffer(sizes.last)?,
            logits: b.wide(sizes.logits)?,
        })
    }
}

impl<B: Backend> DeviceModel<B> {
    /// Puts the weights on the device.
    pub fn load(b: &mut B, spec: &ModelSpec, weights: &Weights) -> Result<Self, WeightError> {
        let mut loader = Loader { b, spec, weights };
        Ok(Self(match spec.family {
            Family::Llama => Layers::Llama(Llama::load(&mut loader)?),
            Family::Opt => Layers::Opt(Opt::load(&mut loader)?),
        }))
    }

    /// The linear layers: those of one shape and use together, one for each decoder layer.
    pub fn products(&self) -> Vec<(Destination, Vec<&B::Matrix>)> {
        match &self.0 {
            Layers::Llama(model) => model.products(),
            Layers::Opt(model) => model.products(),
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// A model with the workspace of steps of up to `limits`.
    pub fn new(
        b: &mut B,
        model: Arc<DeviceModel<B>>,
        spec: &ModelSpec,
        limits: &BatchLimits,
    ) -> Result<Self, B::Error> {
        Ok(Self { model, spec: spec.clone(), work: Workspace::new(b, spec, limits)? })
    }

    /// Runs one step of `n` rows up to the logits of `samples` of them: keys and values go to the cache.
    pub fn forward(&mut self, b: &mut B, n: usize, samples: usize) -> Result<(), B::Error> {
        match &self.model.0 {
            Layers::Llama(model) => forward(model, b, &mut self.work, &self.spec, n, samples),
            Layers::Opt(model) => forward(model, b, &mut self.work, &self.spec, n, samples),
        }
    }

    /// Samples from the logits; tokens are had from
    /// [`StepBackend::sampled`](crate::engine::backend::StepBackend::sampled).
    pub fn sample(&mut self, b: &mut B, samples: usize) -> Result<(), B::Error> {
        b.sample(samples, &self.work.logits)
    }

    /// The weights.
    pub fn model(&self) -> &Arc<DeviceModel<B>> {
        &self.model
    }

    /// The logits of the last [`Decoder::forward`], `[sampling seqs, vocab]`, in batch order.
    pub fn logits(&self) -> &B::Wide {
        &self.work.logits
    }
}

/// Reads tensors and puts them on the device.
pub(super) struct Loader<'a, B: Backend> {
    pub b: &'a mut B,
    pub spec: &'a ModelSpec,
    pub weights: &'a Weights,
}

impl<B: Backend> Loader<'_, B> {
    fn device<T>(result: Result<T, B::Error>) -> Result<T, WeightError> {
        result.map_err(|e| WeightError::Device(e.to_string()))
    }

    /// An embedding table `[rows, hidden]`.
    pub fn table(&mut self, name: &str, rows: usize) -> Result<B::Buffer, WeightError> {
        let values = self.weights.matrix(name, rows, self.spec.hidden)?;
        Self::device(self.b.upload(values))
    }

    /// An RMSNorm over the hidden state.
    pub fn rms_norm(&mut self, name: &str) -> Result<Norm<B::Buffer>, WeightError> {
        let values = self.weights.norm(&format!("{name}.weight"), self.spec.hidden)?;
        let weight = Self::device(self.b.upload(values))?;
        Ok(Norm { width: self.spec.hidden, eps: self.spec.norm_eps, weight, bias: None })
    }

    /// A LayerNorm over the hidden state.
    pub fn layer_norm(&mut self, name: &str) -> Result<Norm<B::Buffer>, WeightError> {
        let values = self.weights.bias(&format!("{name}.bias"), self.spec.hidden)?;
        let bias = Some(Self::device(self.b.upload(values))?);
        Ok(Norm { bias, ..self.rms_norm(name)? })
    }

    /// The output matrix `[vocab, hidden]`: the tensor `name`, or the table `tied` where they are one.
    pub fn head(&mut self, name: &str, tied: &str) -> Result<B::Matrix, WeightError> {
        let name = if self.spec.tie_embeddings { tied } else { name };
        let (outputs, inputs) = (self.spec.vocab_size, self.spec.hidden);
        let weight = vec![self.weights.matrix(name, outputs, inputs)?];
        Self::device(self.b.upload_matrix(HostMatrix { weight, bias: Vec::new(), outputs, inputs }))
    }

    /// Linear layers of one input, fused by stacking their rows: `parts` are the indices of modules
    /// in [`ModelSpec::modules`], `prefix` is the layer's.
    pub fn linear(&mut self, prefix: &str, parts: &[usize], biased: bool) -> Result<Linear<B>, WeightError> {
        let modules = self.spec.modules();
        let inputs = modules[parts[0]].inputs;
        let mut targets = Vec::with_capacity(parts.len());
        let mut weight = Vec::with_capacity(parts.len());
        let mut bias = Vec::new();
        let mut outputs = 0;
        for &part in parts {
            let module = modules[part];
            let name = format!("{prefix}.{}", module.path);
            weight.push(self.weights.matrix(&format!("{name}.weight"), module.outputs, inputs)?);
            if biased {
                bias.push(self.weights.bias(&format!("{name}.bias"), module.outputs)?);
            }
            targets.push(LoraTarget { module: part, column: outputs });
            outputs += module.outputs;
        }
        let matrix = Self::device(self.b.upload_matrix(HostMatrix { weight, bias, outputs, inputs }))?;
        Ok(Linear { matrix, targets })
    }
}

/// A linear layer, perhaps of several modules, with what adapters may add to it.
pub(super) struct Linear<B: Backend> {
    matrix: B::Matrix,
    targets: Vec<LoraTarget>,
}

impl<B: Backend> Linear<B> {
    /// Its weight.
    pub fn matrix(&self) -> &B::Matrix {
        &self.matrix
    }

    fn adapted(&self, at: Span) -> Adapted<'_> {
        Adapted { layer: at.layer, rows: at.rows, targets: &self.targets }
    }

    /// `out = x · weightᵀ + bias + adapters`; `x` is `[n, inputs]`, `out` `[n, outputs]`.
    pub fn forward(&self, b: &mut B, at: Span, x: &B::Buffer, out: &mut B::Buffer) -> Result<(), B::Error> {
        b.linear(at.n, &self.matrix, self.adapted(at), x, out)
    }

    /// [`Linear::forward`] of queries, keys and values, then positions and the cache.
    pub fn forward_rope_kv(
        &self,
        b: &mut B,
        at: Span,
        x: &B::Buffer,
        qkv: &mut B::Buffer,
    ) -> Result<(), B::Error> {
        b.linear_rope_kv(at.n, &self.matrix, self.adapted(at), x, qkv)
    }

    /// [`Linear::forward`] of gate and up into `gate_up`, then `out = silu(gate) · up`, `[n, width]`.
    pub fn forward_silu_mul(
        &self,
        b: &mut B,
        at: Span,
        width: usize,
        x: &B::Buffer,
        gate_up: &mut B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), B::Error> {
        b.linear_silu_mul(at.n, width, &self.matrix, self.adapted(at), x, gate_up, out)
    }

    /// `residual += x · weightᵀ + bias + adapters`; `x` is `[n, inputs]`, `residual` `[n, outputs]`.
    pub fn forward_add(
        &self,
        b: &mut B,
        at: Span,
        x: &B::Buffer,
        residual: &mut B::Wide,
    ) -> Result<(), B::Error> {
        b.linear_add(at.n, &self.matrix, self.adapted(at), x, residual)
    }
}
