//! The backend trait on the CPU.

use std::sync::Arc;

use gemm::Parallelism;
use lora_sched::{Nanos, SlotId};

use super::attention::{Rows, Scratch, attend};
use super::kv::{KvLayer, KvShape};
use super::math;
use super::matmul::{Mat, MatMut, multiply, multiply_transposed};
use super::memory::{committed, parallelism};
use super::packed::Packed;
use super::slots::Slots;
use super::step::Step;
use crate::engine::backend::{Adapted, Backend, BackendShape, HostMatrix, Norm, Rows as Which, StepBackend};
use crate::engine::batch::Batch;
use crate::engine::device::{SeqSampler, StepError};
use crate::engine::executor::{Sampling, TokenId, TokenLogprobs};
use crate::engine::model::{Family, ModelSpec, Values};

/// The weight of a linear layer, packed for reading.
pub struct CpuMatrix(Packed);

/// The CPU with its KV cache, slots and scratch memory.
pub struct CpuBackend {
    shape: BackendShape,
    kv_shape: KvShape,
    kv: Vec<KvLayer>,
    slots: Arc<Slots>,
    threads: usize,
    parallelism: Parallelism,
    /// `[max_model_len, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    attention: Scratch,
    /// `[rows, max_rank]`: a segment's product with `Aᵀ`.
    shrunk: Vec<f32>,
    /// `[rows, widest input]`: a product's left side.
    interleaved: Vec<f32>,
    /// `[rows, hidden]`: what a part adds to the residual stream.
    delta: Vec<f32>,
    /// `[vocab]`: logits that a sampler may change.
    logits: Vec<f32>,
    allowed: Option<Vec<bool>>,
    samplers: Vec<Option<SeqSampler>>,
    candidates: Vec<(f32, TokenId)>,
    /// `[places]` last sampled tokens.
    last_tokens: Vec<TokenId>,
    sampled: Vec<TokenId>,
    step: Step,
}

impl CpuBackend {
    /// Makes the cache and the scratch memory. `max_rank` is the slots'.
    pub(super) fn new(
        shape: BackendShape,
        slots: Arc<Slots>,
        max_rank: usize,
        threads: usize,
        allowed: Option<Vec<bool>>,
    ) -> Self {
        let (spec, limits) = (&shape.spec, &shape.limits);
        let kv_shape = KvShape {
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            block_size: limits.block_size,
            blocks: limits.kv_blocks,
        };
        let (cos, sin) = match spec.family {
            Family::Llama => {
                math::rope_tables(limits.max_model_len, spec.head_dim, spec.rope_theta, &spec.rope_scaling)
            }
            Family::Opt => (Vec::new(), Vec::new()),
        };
        Self {
            kv: (0..spec.layers).map(|_| KvLayer::new(&kv_shape)).collect(),
            attention: Scratch::new(&kv_shape, limits.max_model_len),
            shrunk: committed(limits.max_num_batched_tokens * max_rank),
            interleaved: committed(limits.max_num_batched_tokens * widest_input(spec)),
            delta: committed(limits.max_num_batched_tokens * spec.hidden),
            logits: vec![0.0; spec.vocab_size],
            samplers: (0..limits.max_num_seqs).map(|_| None).collect(),
            candidates: Vec::with_capacity(spec.vocab_size),
            last_tokens: vec![0; limits.max_num_seqs],
            sampled: Vec::with_capacity(limits.max_num_seqs),
            step: Step::new(limits),
            threads,
            parallelism: parallelism(threads),
            kv_shape,
            slots,
            cos,
            sin,
            allowed,
            shape,
        }
    }

    /// Adds what the segments' adapters give to `out` `[n, width]`.
    fn lora(&mut self, adapted: Adapted<'_>, x: &[f32], width: usize, out: &mut [f32]) {
        let layer = adapted.layer;
        let segments = match adapted.rows {
            Which::All => &self.step.segments,
            Which::Sampling => &self.step.sample_segments,
        };
        for segment in segments {
            let (layout, rows) = (&segment.layout, segment.rows);
            let memory = self.slots.layer(segment.slot, layer);
            let base = layout.layer(layer).start;
            for target in adapted.targets {
                let Some(part) = layout.part(layer, target.module) else { continue };
                let (a, b) = layout.matrices(part, base, &memory);
                let rank = layout.rank();
                let shrunk = &mut self.shrunk[..rows * rank];
                multiply_transposed(
                    MatMut::dense(shrunk, rows, rank),
                    layout.scale(),
                    Mat::dense(&x[segment.start * part.inputs..], rows, part.inputs),
                    Mat::dense(a, rank, part.inputs),
                    self.parallelism,
                );
                multiply(
                    MatMut {
                        data: &mut out[segment.start * width + target.column..],
                        rows,
                        cols: part.outputs,
                        stride: width,
                    },
                    true,
                    1.0,
                    Mat::dense(shrunk, rows, rank),
                    Mat::dense(b, rank, part.outputs),
                    self.parallelism,
                );
            }
        }
    }
}

impl Backend for CpuBackend {
    type Buffer = Vec<f32>;
    type Wide = Vec<f32>;
    type Matrix = CpuMatrix;
    type Error = StepError;

    fn buffer(&mut self, elements: usize) -> Result<Vec<f32>, StepError> {
        Ok(committed(elements))
    }

    fn wide(&mut self, elements: usize) -> Result<Vec<f32>, StepError> {
        Ok(committed(elements))
    }

    fn upload(&mut self, values: Values) -> Result<Vec<f32>, StepError> {
        Ok(values.into_host())
    }

    fn upload_matrix(&mut self, matrix: HostMatrix) -> Result<CpuMatrix, StepError> {
        let HostMatrix { weight, bias, outputs, inputs } = matrix;
        let bias = (!bias.is_empty()).then(|| joined(bias));
        Ok(CpuMatrix(Packed::new(&joined(weight), bias.as_deref(), outputs, inputs)))
    }

    fn embed(
        &mut self,
        n: usize,
        width: usize,
        table: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        for (token, out) in self.step.tokens[..n].iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(row(table, *token as usize, width));
        }
        Ok(())
    }

    fn add_positions(
        &mut self,
        n: usize,
        width: usize,
        offset: usize,
        table: &Vec<f32>,
        x: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        for (position, x) in self.step.positions[..n].iter().zip(x.chunks_exact_mut(width)) {
            math::add(x, row(table, *position as usize + offset, width));
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        n: usize,
        norm: &Norm<Vec<f32>>,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        let rows = x.chunks_exact(norm.width).zip(out.chunks_exact_mut(norm.width));
        for (x, out) in rows.take(n) {
            math::rms_norm_row(x, &norm.weight, norm.eps, out);
        }
        Ok(())
    }

    fn layer_norm(
        &mut self,
        n: usize,
        norm: &Norm<Vec<f32>>,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        let bias = norm.bias.as_deref().unwrap_or(&[]);
        assert_eq!(bias.len(), norm.width, "a LayerNorm has a bias");
        let rows = x.chunks_exact(norm.width).zip(out.chunks_exact_mut(norm.width));
        for (x, out) in rows.take(n) {
            math::layer_norm_row(x, &norm.weight, bias, norm.eps, out);
        }
        Ok(())
    }

    fn await_adapters(&mut self, layer: usize) -> Result<(), StepError> {
        self.slots.await_layer(layer, &mut self.step.loads);
        Ok(())
    }

    fn linear(
        &mut self,
        n: usize,
        matrix: &CpuMatrix,
        adapted: Adapted<'_>,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        matrix.0.multiply(n, x, &mut self.interleaved, out, self.threads);
        self.lora(adapted, x, matrix.0.outputs(), out);
        Ok(())
    }

    fn linear_add(
        &mut self,
        n: usize,
        matrix: &CpuMatrix,
        adapted: Adapted<'_>,
        x: &Vec<f32>,
        residual: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        let width = matrix.0.outputs();
        let mut delta = std::mem::take(&mut self.delta);
        matrix.0.multiply(n, x, &mut self.interleaved, &mut delta, self.threads);
        self.lora(adapted, x, width, &mut delta);
        math::add(&mut residual[..n * width], &delta[..n * width]);
        self.delta = delta;
        Ok(())
    }

    fn linear_wide(
        &mut self,
        n: usize,
        matrix: &CpuMatrix,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        matrix.0.multiply(n, x, &mut self.interleaved, out, self.threads);
        Ok(())
    }

    fn rope_and_write_kv(&mut self, layer: usize, n: usize, qkv: &mut Vec<f32>) -> Result<(), StepError> {
        let spec = &self.shape.spec;
        let half = spec.head_dim / 2;
        for (position, row) in self.step.positions[..n].iter().zip(qkv.chunks_exact_mut(spec.qkv_dim())) {
            let at = *position as usize * half;
            let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
            for head in row[..spec.q_dim() + spec.kv_dim()].chunks_exact_mut(spec.head_dim) {
                math::rotate(head, cos, sin);
            }
        }
        self.write_kv(layer, n, qkv)
    }

    fn write_kv(&mut self, layer: usize, n: usize, qkv: &mut Vec<f32>) -> Result<(), StepError> {
        let spec = &self.shape.spec;
        let (q, kv) = (spec.q_dim(), spec.kv_dim());
        for (at, row) in self.step.kv_rows[..n].iter().zip(qkv.chunks_exact(spec.qkv_dim())) {
            let (keys, values) = row[q..].split_at(kv);
            self.kv[layer].write(&self.kv_shape, *at as usize, keys, values);
        }
        Ok(())
    }

    fn attention(
        &mut self,
        layer: usize,
        _n: usize,
        qkv: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        let spec = &self.shape.spec;
        let (width, stride) = (spec.q_dim(), spec.qkv_dim());
        let step = &self.step;
        for (seq, context) in step.contexts.iter().enumerate() {
            let first = step.starts[seq] as usize;
            let len = step.starts[seq + 1] as usize - first;
            let blocks = step.block_starts[seq] as usize..step.block_starts[seq + 1] as usize;
            let rows = Rows {
                queries: &qkv[first * stride..],
                qkv_stride: stride,
                out: &mut out[first * width..(first + len) * width],
                len,
                heads: spec.heads,
                context: *context as usize,
                blocks: &step.blocks[blocks],
            };
            attend(&self.kv[layer], &self.kv_shape, rows, &mut self.attention, self.parallelism);
        }
        Ok(())
    }

    fn silu_mul(
        &mut self,
        n: usize,
        width: usize,
        gate_up: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        let rows = gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width));
        for (gate_up, out) in rows.take(n) {
            let (gate, up) = gate_up.split_at(width);
            math::silu_mul(gate, up, out);
        }
        Ok(())
    }

    fn relu(&mut self, n: usize, width: usize, x: &mut Vec<f32>) -> Result<(), StepError> {
        math::relu(&mut x[..n * width]);
        Ok(())
    }

    fn gather_samples(
        &mut self,
        samples: usize,
        width: usize,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        for (from, out) in self.step.sample_rows[..samples].iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(row(x, *from as usize, width));
        }
        Ok(())
    }

    fn gather_sample_inputs(
        &mut self,
        samples: usize,
        width: usize,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), StepError> {
        self.gather_samples(samples, width, x, out)
    }

    fn sample(&mut self, samples: usize, logits: &Vec<f32>) -> Result<(), StepError> {
        let rows = logits.chunks_exact(self.shape.spec.vocab_size);
        for (&place, logits) in self.step.sample_places[..samples].iter().zip(rows) {
            let sampler = self.samplers[place as usize].as_mut().ok_or(StepError::NotBegun { place })?;
            self.logits.copy_from_slice(logits);
            let token = sampler.sample(&mut self.logits, self.allowed.as_deref(), &mut self.candidates);
            self.last_tokens[place as usize] = token;
            self.sampled.push(token);
        }
        Ok(())
    }
}

impl StepBackend for CpuBackend {
    fn begin_sequence(&mut self, place: u32, sampling: Sampling) {
        self.samplers[place as usize] = Some(SeqSampler::new(sampling));
    }

    fn run(
        &mut self,
        batch: &Batch,
        mut work: impl FnMut(&mut Self, usize, usize) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        self.step.take(batch, &self.last_tokens, self.shape.spec.vocab_size, &self.slots)?;
        self.sampled.clear();
        work(self, batch.rows(), batch.sample_rows.len())
    }

    fn sampled(&mut self) -> Result<&[TokenId], StepError> {
        Ok(&self.sampled)
    }

    fn logprobs(&mut self, place: u32) -> Option<Box<TokenLogprobs>> {
        self.samplers[place as usize].as_mut()?.take_logprobs()
    }

    fn stalled(&mut self, to: &mut Vec<(SlotId, Nanos)>) -> Result<(), StepError> {
        to.extend(self.step.loads.iter().map(|load| (load.slot, load.stalled)));
        Ok(())
    }

    fn download(&mut self, from: &Vec<f32>, out: &mut [f32]) -> Result<(), StepError> {
        out.copy_from_slice(&from[..out.len()]);
        Ok(())
    }
}

/// All values, one part after the other.
fn joined(parts: Vec<Values>) -> Vec<f32> {
    let mut parts = parts.into_iter().map(Values::into_host);
    let mut all = parts.next().unwrap_or_default();
    parts.for_each(|part| all.extend_from_slice(&part));
    all
}

/// The widest input of a linear layer.
pub(super) fn widest_input(spec: &ModelSpec) -> usize {
    spec.modules().iter().map(|m| m.inputs).max().unwrap_or(0).max(spec.hidden)
}

/// Row `i` of a dense matrix.
fn row(matrix: &[f32], i: usize, width: usize) -> &[f32] {
    &matrix[i * width..(i + 1) * width]
}
