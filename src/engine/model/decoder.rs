//! What the families share: the workspace, loading, and the entry to a step.

use super::llama::Llama;
use super::opt::Opt;
use super::spec::{Family, ModelSpec};
use super::weights::{WeightError, Weights};
use crate::engine::backend::{Backend, HostMatrix, LoraTarget, Norm};
use crate::engine::batch::{Batch, BatchLimits};

/// A model on a device, with the buffers of its step.
pub struct Decoder<B: Backend> {
    model: Layers<B>,
    work: Workspace<B>,
}

enum Layers<B: Backend> {
    Llama(Llama<B>),
    Opt(Opt<B>),
}

/// Buffers of one step. `rows` is the largest number of rows, `seqs` that of sampling sequences.
pub(super) struct Workspace<B: Backend> {
    /// `[rows, hidden]`: the residual stream.
    pub residual: B::Buffer,
    /// `[rows, hidden]`: a norm's output.
    pub normed: B::Buffer,
    /// `[rows, hidden]`: what a part adds to the residual stream.
    pub delta: B::Buffer,
    /// `[rows, q + k + v]`.
    pub qkv: B::Buffer,
    /// `[rows, q]`.
    pub attended: B::Buffer,
    /// `[rows, 2 · intermediate]` for SwiGLU, `[rows, intermediate]` for ReLU.
    pub up: B::Buffer,
    /// `[rows, intermediate]`; empty for ReLU, which works in place.
    pub act: B::Buffer,
    /// `[seqs, hidden]`: rows that sample.
    pub last: B::Buffer,
    /// `[seqs, hidden]`: their norm.
    pub last_normed: B::Buffer,
    /// `[seqs, vocab]`.
    pub logits: B::Buffer,
}

/// Elements of each buffer of [`Workspace`], in its order.
fn workspace_elements(spec: &ModelSpec, limits: &BatchLimits) -> [usize; 10] {
    let (rows, seqs) = (limits.max_num_batched_tokens, limits.max_num_seqs);
    let (up, act) = match spec.family {
        Family::Llama => (2 * spec.intermediate, spec.intermediate),
        Family::Opt => (spec.intermediate, 0),
    };
    [
        rows * spec.hidden,
        rows * spec.hidden,
        rows * spec.hidden,
        rows * spec.qkv_dim(),
        rows * spec.q_dim(),
        rows * up,
        rows * act,
        seqs * spec.hidden,
        seqs * spec.hidden,
        seqs * spec.vocab_size,
    ]
}

impl<B: Backend> Workspace<B> {
    fn new(b: &mut B, spec: &ModelSpec, limits: &BatchLimits) -> Result<Self, B::Error> {
        let [residual, normed, delta, qkv, attended, up, act, last, last_normed, logits] =
            workspace_elements(spec, limits);
        Ok(Self {
            residual: b.buffer(residual)?,
            normed: b.buffer(normed)?,
            delta: b.buffer(delta)?,
            qkv: b.buffer(qkv)?,
            attended: b.buffer(attended)?,
            up: b.buffer(up)?,
            act: b.buffer(act)?,
            last: b.buffer(last)?,
            last_normed: b.buffer(last_normed)?,
            logits: b.buffer(logits)?,
        })
    }
}

impl<B: Backend> Decoder<B> {
    /// Puts the weights on the device and makes the workspace.
    pub fn load(
        b: &mut B,
        spec: &ModelSpec,
        weights: &Weights,
        limits: &BatchLimits,
    ) -> Result<Self, WeightError> {
        let mut loader = Loader { b, spec, weights };
        let model = match spec.family {
            Family::Llama => Layers::Llama(Llama::load(&mut loader)?),
            Family::Opt => Layers::Opt(Opt::load(&mut loader)?),
        };
        let work = Workspace::new(b, spec, limits).map_err(|e| WeightError::Device(e.to_string()))?;
        Ok(Self { model, work })
    }

    /// Elements of the workspace, before it is made.
    pub fn workspace_elements(spec: &ModelSpec, limits: &BatchLimits) -> usize {
        workspace_elements(spec, limits).iter().sum()
    }

    /// Runs one step up to the logits: keys and values go to the cache.
    pub fn forward(&mut self, b: &mut B, batch: &Batch) -> Result<(), B::Error> {
        b.begin(batch)?;
        let (n, samples) = (batch.rows(), batch.sample_rows.len());
        match &self.model {
            Layers::Llama(model) => model.forward(b, &mut self.work, n, samples),
            Layers::Opt(model) => model.forward(b, &mut self.work, n, samples),
        }
    }

    /// Samples from the logits, which it may change; tokens are had from [`Backend::sampled`].
    pub fn sample(&mut self, b: &mut B) -> Result<(), B::Error> {
        b.sample(&mut self.work.logits)
    }

    /// The logits of the last [`Decoder::forward`], `[sampling seqs, vocab]`, in batch order.
    pub fn logits(&self) -> &B::Buffer {
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
        let weight = self.weights.matrix(name, outputs, inputs)?;
        Self::device(self.b.upload_matrix(HostMatrix { weight, bias: None, outputs, inputs }))
    }

    /// Linear layers of one input, fused by stacking their rows: `parts` are the indices of modules
    /// in [`ModelSpec::modules`], `prefix` is the layer's.
    pub fn linear(&mut self, prefix: &str, parts: &[usize], biased: bool) -> Result<Linear<B>, WeightError> {
        let modules = self.spec.modules();
        let inputs = modules[parts[0]].inputs;
        let mut targets = Vec::with_capacity(parts.len());
        let mut weight = Vec::new();
        let mut bias = biased.then(Vec::new);
        let mut outputs = 0;
        for &part in parts {
            let module = modules[part];
            let name = format!("{prefix}.{}", module.path);
            let rows = self.weights.matrix(&format!("{name}.weight"), module.outputs, inputs)?;
            if weight.is_empty() {
                weight = rows;
            } else {
                weight.extend_from_slice(&rows);
            }
            if let Some(bias) = &mut bias {
                bias.extend(self.weights.bias(&format!("{name}.bias"), module.outputs)?);
            }
            targets.push(LoraTarget { module: part, column: outputs });
            outputs += module.outputs;
        }
        let matrix = Self::device(self.b.upload_matrix(HostMatrix { weight, bias, outputs, inputs }))?;
        Ok(Linear { matrix, targets, outputs })
    }
}

/// A linear layer, perhaps of several modules, with what adapters may add to it.
pub(super) struct Linear<B: Backend> {
    matrix: B::Matrix,
    targets: Vec<LoraTarget>,
    outputs: usize,
}

impl<B: Backend> Linear<B> {
    /// `out = x · weightᵀ + bias + adapters`; `x` is `[n, inputs]`, `out` `[n, outputs]`.
    pub fn forward(
        &self,
        b: &mut B,
        layer: usize,
        n: usize,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), B::Error> {
        b.linear(n, &self.matrix, x, out)?;
        b.lora(layer, &self.targets, x, self.outputs, out)
    }
}
