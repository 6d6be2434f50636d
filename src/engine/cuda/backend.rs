//! The backend trait on a GPU.

use std::sync::Arc;

use half::bf16;
use lora_kernels::{
    Argmax, Attention, AttentionShape, CudaError, DecodeWorkspace, Device, DeviceBuffer, Draw, Elementwise,
    Event, Gemm, KvCache, KvCacheMut, Lora, LoraLimits, LoraScratch, LoraStep, Out, PinnedBuffer, Product,
    Queries, RopeKv, Rotation, Stream, Target, View, Weight, rope_frequencies, rope_table,
};
use lora_sched::{AdapterId, Nanos, SlotId};

use super::graphs::{GraphKey, Graphs, padded, rounded, shapes};
use super::meta::Meta;
use super::slabs::on_device;
use super::slots::CudaSlots;
use crate::engine::backend::{Adapted, Backend, BackendShape, HostMatrix, LoraTarget, Norm, StepBackend};
use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::device::SeqSampler;
use crate::engine::executor::{Sampling, TokenId};
use crate::engine::model::{Decoder, Destination, Family, ModelSpec, Values};

/// A step that a GPU cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CudaStepError {
    /// The device.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// The slot holds another adapter than the plan says: a bug of the driver.
    #[error("the plan wants adapter {wanted} in slot {slot}, which holds {}", held.map_or("none".into(), |h| format!("adapter {h}")))]
    WrongAdapter {
        /// The slot.
        slot: SlotId,
        /// The plan's adapter.
        wanted: AdapterId,
        /// What is there.
        held: Option<AdapterId>,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sequence samples that was never begun.
    #[error("place {place} samples, and no sequence has begun there")]
    NotBegun {
        /// The place.
        place: u32,
    },
}

/// A GPU with its KV cache, slots and scratch memory.
pub struct CudaBackend {
    device: Device,
    stream: Stream,
    spec: ModelSpec,
    /// Rounded up.
    limits: BatchLimits,
    max_rank: usize,
    slots: Arc<CudaSlots>,
    elementwise: Elementwise,
    gemm: Gemm,
    rope_kv: RopeKv,
    attention: Attention,
    lora: Lora,
    argmax: Argmax,
    draw: Draw,
    /// `[layers][keys, values][blocks, kv_heads, block_size, head_dim]`
    kv: DeviceBuffer<bf16>,
    /// `[positions, head_dim / 2, 2]`; empty for learned positions.
    rope: DeviceBuffer<f32>,
    attention_scratch: DecodeWorkspace,
    lora_scratch: LoraScratch,
    /// A bit for each id that may be sampled.
    allowed: Option<DeviceBuffer<u32>>,
    allowed_host: Option<Vec<bool>>,
    ids: DeviceBuffer<u32>,
    meta: Meta,
    graphs: Graphs,
    /// What launches are shaped by.
    shape: LaunchShape,
    /// A layer's modules, and the sum of all their widths.
    modules: Vec<ModuleWidths>,
    per_layer: usize,
    samplers: Vec<Option<SeqSampler>>,
    last_tokens: Vec<TokenId>,
    pending: Pending,
    stalls: Stalls,
}

/// Modules that share an input, at most: query, key and value.
const MOST_TARGETS: usize = 3;

/// Where a module's part begins in an adapter that adapts all.
struct ModuleWidths {
    /// `inputs + outputs` of the modules before it in a layer.
    before: usize,
    outputs: usize,
}

/// What the launches of a step are shaped by: exact where they are made for it, bounds in a graph.
#[derive(Clone, Copy, Debug, Default)]
struct LaunchShape {
    singles: usize,
    longest: usize,
    small: usize,
}

/// Results that are on their way to the host.
struct Pending {
    ended: Event,
    ids: PinnedBuffer<u32>,
    /// `[seqs, vocab]`: logits of sequences that are sampled on the host.
    logits: PinnedBuffer<f32>,
    /// Address of the step's logits on the device.
    logits_at: u64,
    /// Places that sample, in batch order, and whether the host chooses.
    places: Vec<(u32, bool)>,
    tokens: Vec<TokenId>,
    scratch: Vec<(f32, TokenId)>,
    row: Vec<f32>,
}

/// Waits for layers that were still being copied.
struct Stalls {
    loading: Vec<SlotId>,
    /// Pairs of events around each wait, made as they are needed and kept.
    events: Vec<(Event, Event)>,
    /// The loading slot of each pair that is in use.
    used: Vec<SlotId>,
}

/// One layer's cache.
fn kv_layer(kv: &DeviceBuffer<bf16>, half: usize, layer: usize) -> KvCache<'_> {
    let (at, all) = (2 * layer * half, kv.view());
    KvCache { keys: all.slice(at..at + half), values: all.slice(at + half..at + 2 * half) }
}

/// What a backend is made with, besides its shape.
pub(super) struct BackendParts {
    pub device: Device,
    pub slots: Arc<CudaSlots>,
    pub max_rank: usize,
    pub allowed: Option<Vec<bool>>,
}

/// No device has more: the more there are, the more shares a decode's attention is split into.
const MULTIPROCESSORS: usize = 256;

/// Bytes of attention's and LoRA's scratch memory; `limits` are rounded up.
pub(super) fn scratch_bytes(spec: &ModelSpec, limits: &BatchLimits, max_rank: usize) -> u64 {
    let shape = attention_shape(spec, limits);
    let attention = shape.workspace_elements(MULTIPROCESSORS, limits.max_num_seqs, limits.max_model_len);
    4 * attention as u64 + lora_limits(limits, max_rank).bytes() as u64
}

fn attention_shape(spec: &ModelSpec, limits: &BatchLimits) -> AttentionShape {
    AttentionShape {
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        block_size: limits.block_size,
    }
}

fn lora_limits(limits: &BatchLimits, max_rank: usize) -> LoraLimits {
    LoraLimits { max_rows: limits.max_num_batched_tokens, max_small: limits.max_num_seqs, max_rank }
}

impl CudaBackend {
    /// Loads the kernels and makes the cache and the scratch memory.
    pub(super) fn new(shape: BackendShape, parts: BackendParts) -> Result<Self, CudaError> {
        let BackendParts { device, slots, max_rank, allowed } = parts;
        let (spec, limits) = (shape.spec, padded(&shape.limits));
        let stream = device.stream()?;
        let attention_shape = attention_shape(&spec, &limits);
        let attention = Attention::load(&device, attention_shape)?;
        let scratch = attention.workspace(&device, limits.max_num_seqs, limits.max_model_len)?;
        let kv_elements = 2 * spec.layers * limits.kv_blocks * limits.block_size * spec.kv_dim();
        let mut rope = device.buffer(match spec.family {
            Family::Llama => limits.max_model_len * spec.head_dim,
            Family::Opt => 0,
        })?;
        if !rope.is_empty() {
            let frequencies = rope_frequencies(spec.head_dim, f64::from(spec.rope_theta));
            rope.upload(&stream, &rope_table(limits.max_model_len, &frequencies))?;
        }
        let mut mask = None;
        if let Some(allowed) = &allowed {
            let mut words = vec![0u32; allowed.len().div_ceil(32)];
            for id in (0..allowed.len()).filter(|id| allowed[*id]) {
                words[id / 32] |= 1 << (id % 32);
            }
            mask = Some(device.buffer(words.len())?);
            if let Some(mask) = &mut mask {
                mask.upload(&stream, &words)?;
            }
        }
        let modules = spec.modules();
        let widths: Vec<usize> = modules.iter().map(|m| m.inputs + m.outputs).collect();
        let seqs = limits.max_num_seqs;
        Ok(Self {
            elementwise: Elementwise::load(&device)?,
            gemm: Gemm::new(&device)?,
            rope_kv: RopeKv::load(&device, attention_shape)?,
            attention,
            // The expand loads its matrices while the shrink still runs: 6 µs a layer less.
            lora: Lora::load(&device)?.with_overlap(true),
            argmax: Argmax::load(&device, seqs)?,
            draw: Draw::load(&device)?,
            kv: device.buffer(kv_elements)?,
            rope,
            attention_scratch: scratch,
            lora_scratch: LoraScratch::new(&device, lora_limits(&limits, max_rank))?,
            allowed: mask,
            allowed_host: allowed,
            ids: device.buffer(seqs)?,
            meta: Meta::new(&device, &limits)?,
            graphs: Graphs::new(limits.max_model_len),
            shape: LaunchShape::default(),
            per_layer: widths.iter().sum(),
            modules: modules
                .iter()
                .enumerate()
                .map(|(m, module)| ModuleWidths { before: widths[..m].iter().sum(), outputs: module.outputs })
                .collect(),
            samplers: (0..seqs).map(|_| None).collect(),
            last_tokens: vec![0; seqs],
            pending: Pending {
                ended: device.event(false)?,
                ids: device.pinned(seqs)?,
                logits: device.pinned(seqs * spec.vocab_size)?,
                logits_at: 0,
                places: Vec::with_capacity(seqs),
                tokens: Vec::with_capacity(seqs),
                scratch: Vec::with_capacity(spec.vocab_size),
                row: vec![0.0; spec.vocab_size],
            },
            stalls: Stalls { loading: Vec::with_capacity(seqs), events: Vec::new(), used: Vec::new() },
            device,
            stream,
            spec,
            limits,
            max_rank,
            slots,
        })
    }

    /// Chooses the products' algorithms and records every decode graph, so that no step does.
    pub(super) fn prepare(&mut self, decoder: &mut Decoder<Self>) -> Result<(), CudaStepError> {
        self.stream.bind()?;
        self.choose_products(decoder)?;
        for key in self.graphs.keys(self.limits.max_num_seqs) {
            self.meta.fill_empty(key.rows);
            // SAFETY: every graph is waited for below.
            unsafe { self.meta.send(&self.stream) }?;
            self.record(key, |b, n, samples| {
                decoder.forward(b, n, samples)?;
                decoder.sample(b, samples)
            })?;
            self.launch(&key)?;
            self.stream.synchronize()?;
        }
        Ok(())
    }

    fn choose_products(&mut self, decoder: &Decoder<Self>) -> Result<(), CudaStepError> {
        let model = Arc::clone(decoder.model());
        let (rows, seqs) = (self.limits.max_num_batched_tokens, self.limits.max_num_seqs);
        for (destination, weights) in model.products() {
            let Some(first) = weights.first() else { continue };
            let (inputs, outputs) = (first.inputs, first.outputs);
            let most = if destination == Destination::Wide { seqs } else { rows };
            let mut x = self.device.buffer(most * inputs)?;
            // Numbers that are not all alike: products of zeros run faster than a step's.
            let from = lora_kernels::Uniform { key: [7; 32], skip: 0, bound: 1.0, centre: 0.0 };
            self.draw.fill(&self.stream, &from, x.view_mut())?;
            let mut narrow =
                self.device.buffer(if destination == Destination::Buffer { most * outputs } else { 0 })?;
            let mut wide =
                self.device.buffer(if destination == Destination::Buffer { 0 } else { most * outputs })?;
            for n in shapes(most) {
                let mut out = match destination {
                    Destination::Buffer => Product::Store(narrow.view_mut()),
                    Destination::Residual => Product::Add(wide.view_mut()),
                    Destination::Wide => Product::StoreWide(wide.view_mut()),
                };
                self.gemm.choose(&self.device, &self.stream, n, &weights, x.view(), &mut out)?;
            }
        }
        Ok(())
    }

    /// Records the graph of `key` from what `work` submits.
    fn record(
        &mut self,
        key: GraphKey,
        mut work: impl FnMut(&mut Self, usize, usize) -> Result<(), CudaStepError>,
    ) -> Result<(), CudaStepError> {
        let small = if key.adapters { key.rows } else { 0 };
        self.shape = LaunchShape { singles: key.rows, longest: key.context, small };
        let stream = self.stream.clone();
        let graph = stream.capture(|| work(self, key.rows, key.rows))?;
        self.graphs.insert(key, graph);
        Ok(())
    }

    fn launch(&mut self, key: &GraphKey) -> Result<(), CudaStepError> {
        match self.graphs.get(key) {
            Some(graph) => Ok(graph.launch()?),
            None => Ok(()),
        }
    }

    /// Puts the step's results on their way to the host.
    fn send_results(&mut self, batch: &Batch) -> Result<(), CudaStepError> {
        let Pending { ended, ids, logits, logits_at, places, .. } = &mut self.pending;
        places.clear();
        for &place in &batch.sample_places {
            let sampler = self.samplers[place as usize].as_ref().ok_or(CudaStepError::NotBegun { place })?;
            places.push((place, !sampler.is_plain()));
        }
        let samples = places.len();
        // SAFETY: the pinned memory is read only after `ended`, in `sampled`, and written by no one else.
        unsafe {
            self.stream.copy_out(self.ids.view().slice(0..samples), ids)?;
            let vocab = self.spec.vocab_size;
            for (row, _) in places.iter().enumerate().filter(|(_, (_, host))| *host) {
                let from = *logits_at + (row * vocab * size_of::<f32>()) as u64;
                self.stream.copy_out_from(from, &mut logits[row * vocab..(row + 1) * vocab])?;
            }
        }
        Ok(self.stream.record(ended)?)
    }

    /// Elements of one layer's keys, or values.
    fn kv_half(&self) -> usize {
        self.limits.kv_blocks * self.limits.block_size * self.spec.kv_dim()
    }

    fn write(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &mut DeviceBuffer<bf16>,
        rotate: bool,
    ) -> Result<(), CudaStepError> {
        let half = self.kv_half();
        let at = 2 * layer * half;
        let (before, from) = (at..at + half, at + half..at + 2 * half);
        let (keys, values) = self.kv.view_mut().split(before, from);
        let rotation = Rotation { table: self.rope.view(), positions: self.meta.positions() };
        let rotation = rotate.then_some(rotation);
        let cache = KvCacheMut { keys, values };
        Ok(self.rope_kv.apply(&self.stream, n, qkv.view_mut(), rotation, self.meta.kv_rows(), cache)?)
    }

    fn lora(
        &mut self,
        adapted: Adapted<'_>,
        inputs: usize,
        width: usize,
        x: View<'_, bf16>,
        out: Out<'_>,
    ) -> Result<(), CudaStepError> {
        let counts = self.meta.counts;
        if self.shape.small == 0 && counts.large == 0 {
            return Ok(());
        }
        let of = |target: &LoraTarget| Target {
            index: adapted.layer * self.modules.len() + target.module,
            elements_before: adapted.layer * self.per_layer + self.modules[target.module].before,
            column: target.column,
            outputs: self.modules[target.module].outputs,
        };
        let (mut targets, count) = ([Target::default(); MOST_TARGETS], adapted.targets.len());
        for (to, from) in targets.iter_mut().zip(adapted.targets) {
            *to = of(from);
        }
        let step = LoraStep {
            small: self.meta.small(self.shape.small),
            small_count: self.meta.small_count(),
            large: self.meta.large(),
            tiles: self.meta.lora_tiles(),
            max_rank: self.max_rank,
        };
        let scratch = &mut self.lora_scratch;
        Ok(self.lora.apply(&self.stream, scratch, &step, &targets[..count], inputs, x, width, out)?)
    }

    fn held(&mut self, values: Vec<Values>) -> Result<DeviceBuffer<bf16>, CudaError> {
        let len = values.iter().map(Values::len).sum();
        let mut buffer = self.device.buffer(len)?;
        let mut at = 0;
        for part in values {
            let to = buffer.view_mut().slice(at..at + part.len());
            at += part.len();
            match part {
                Values::Drawn { from, .. } => self.draw.fill(&self.stream, &on_device(&from), to)?,
                Values::Read(values) => {
                    let narrow: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                    to.upload(&self.stream, &narrow)?;
                }
            }
        }
        self.stream.synchronize()?;
        Ok(buffer)
    }
}

impl Backend for CudaBackend {
    type Buffer = DeviceBuffer<bf16>;
    type Wide = DeviceBuffer<f32>;
    type Matrix = Weight;
    type Error = CudaStepError;

    fn buffer(&mut self, elements: usize) -> Result<DeviceBuffer<bf16>, CudaStepError> {
        Ok(self.device.buffer(elements)?)
    }

    fn wide(&mut self, elements: usize) -> Result<DeviceBuffer<f32>, CudaStepError> {
        Ok(self.device.buffer(elements)?)
    }

    fn upload(&mut self, values: Values) -> Result<DeviceBuffer<bf16>, CudaStepError> {
        Ok(self.held(vec![values])?)
    }

    fn upload_matrix(&mut self, matrix: HostMatrix) -> Result<Weight, CudaStepError> {
        let HostMatrix { weight, bias, outputs, inputs } = matrix;
        let bias = if bias.is_empty() {
            None
        } else {
            let host: Vec<f32> = bias.iter().cloned().flat_map(Values::into_host).collect();
            let mut wide = self.device.buffer(outputs)?;
            wide.upload(&self.stream, &host)?;
            Some((self.held(bias)?, wide))
        };
        Ok(Weight { values: self.held(weight)?, bias, outputs, inputs })
    }

    fn embed(
        &mut self,
        n: usize,
        width: usize,
        table: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        let tokens = self.meta.tokens();
        Ok(self.elementwise.embed(&self.stream, n, width, tokens, table.view(), out.view_mut())?)
    }

    fn add_positions(
        &mut self,
        n: usize,
        width: usize,
        offset: usize,
        table: &DeviceBuffer<bf16>,
        x: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        let positions = self.meta.positions();
        let (stream, x) = (&self.stream, x.view_mut());
        Ok(self.elementwise.add_positions(stream, n, width, offset, positions, table.view(), x)?)
    }

    fn rms_norm(
        &mut self,
        n: usize,
        norm: &Norm<DeviceBuffer<bf16>>,
        x: &DeviceBuffer<f32>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        let (stream, weight) = (&self.stream, norm.weight.view());
        Ok(self.elementwise.rms_norm(stream, n, norm.eps, weight, x.view(), out.view_mut())?)
    }

    fn layer_norm(
        &mut self,
        n: usize,
        norm: &Norm<DeviceBuffer<bf16>>,
        x: &DeviceBuffer<f32>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        let (stream, weight) = (&self.stream, norm.weight.view());
        let bias = norm
            .bias
            .as_ref()
            .ok_or(CudaError::Shape { kernel: "layer_norm", what: "a LayerNorm has a bias".into() })?;
        let out = out.view_mut();
        Ok(self.elementwise.layer_norm(stream, n, norm.eps, weight, bias.view(), x.view(), out)?)
    }

    fn await_adapters(&mut self, layer: usize) -> Result<(), CudaStepError> {
        for i in 0..self.stalls.loading.len() {
            let slot = self.stalls.loading[i];
            if self.slots.has_all(slot) {
                continue;
            }
            let used = self.stalls.used.len();
            if used == self.stalls.events.len() {
                self.stalls.events.push((self.device.event(true)?, self.device.event(true)?));
            }
            self.stalls.used.push(slot);
            let (before, after) = &self.stalls.events[used];
            self.stream.record(before)?;
            self.slots.await_layer(&self.stream, slot, layer)?;
            self.stream.record(after)?;
        }
        Ok(())
    }

    fn linear(
        &mut self,
        n: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        self.gemm.run(&self.stream, n, matrix, x.view(), &mut Product::Store(out.view_mut()))?;
        self.lora(adapted, matrix.inputs, matrix.outputs, x.view(), Out::Bf16(out.view_mut()))
    }

    fn linear_add(
        &mut self,
        n: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: &DeviceBuffer<bf16>,
        residual: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        self.gemm.run(&self.stream, n, matrix, x.view(), &mut Product::Add(residual.view_mut()))?;
        self.lora(adapted, matrix.inputs, matrix.outputs, x.view(), Out::F32(residual.view_mut()))
    }

    fn linear_wide(
        &mut self,
        n: usize,
        matrix: &Weight,
        x: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        // Sampling rows come in any number; their buffers have room for the shape above it.
        let n = rounded(n);
        Ok(self.gemm.run(&self.stream, n, matrix, x.view(), &mut Product::StoreWide(out.view_mut()))?)
    }

    fn rope_and_write_kv(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        self.write(layer, n, qkv, true)
    }

    fn write_kv(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        self.write(layer, n, qkv, false)
    }

    fn attention(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        let (counts, width) = (self.meta.counts, self.spec.qkv_dim());
        let queries = Queries { rows: qkv.view(), width };
        let half = self.kv_half();
        let cache = kv_layer(&self.kv, half, layer);
        if self.shape.singles > 0 {
            self.attention.decode(
                &self.stream,
                self.shape.singles,
                self.shape.longest,
                self.meta.singles(),
                &self.meta.sequences(self.shape.singles),
                queries,
                cache,
                &mut self.attention_scratch,
                out.view_mut(),
            )?;
        }
        if counts.attention_tiles > 0 {
            let (tiles, sequences) = (self.meta.attention_tiles(), self.meta.sequences(counts.seqs));
            self.attention.prefill(&self.stream, n, tiles, &sequences, queries, cache, out.view_mut())?;
        }
        Ok(())
    }

    fn silu_mul(
        &mut self,
        n: usize,
        width: usize,
        gate_up: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        Ok(self.elementwise.silu_mul(&self.stream, n, width, gate_up.view(), out.view_mut())?)
    }

    fn relu(&mut self, n: usize, width: usize, x: &mut DeviceBuffer<bf16>) -> Result<(), CudaStepError> {
        Ok(self.elementwise.relu(&self.stream, n, width, x.view_mut())?)
    }

    fn gather_samples(
        &mut self,
        samples: usize,
        width: usize,
        x: &DeviceBuffer<f32>,
        out: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        let rows = self.meta.sample_rows();
        Ok(self.elementwise.gather(&self.stream, samples, width, rows, x.view(), out.view_mut())?)
    }

    fn sample(&mut self, samples: usize, logits: &DeviceBuffer<f32>) -> Result<(), CudaStepError> {
        self.pending.logits_at = logits.view().address();
        let (vocab, allowed) = (self.spec.vocab_size, self.allowed.as_ref().map(DeviceBuffer::view));
        let (stream, ids) = (&self.stream, self.ids.view_mut());
        Ok(self.argmax.run(stream, samples, vocab, logits.view(), allowed, ids)?)
    }
}

impl StepBackend for CudaBackend {
    fn begin_sequence(&mut self, place: u32, sampling: Sampling) {
        self.samplers[place as usize] = Some(SeqSampler::new(sampling));
    }

    fn run(
        &mut self,
        batch: &Batch,
        mut work: impl FnMut(&mut Self, usize, usize) -> Result<(), CudaStepError>,
    ) -> Result<(), CudaStepError> {
        self.stream.bind()?;
        let (rows, samples) = (batch.rows(), batch.sample_rows.len());
        let decode = batch.seqs() == rows && samples == rows && batch.loading.is_empty();
        let n = rounded(rows);
        let vocab = self.spec.vocab_size;
        self.meta.fill(batch, n, decode, &self.last_tokens, vocab, &self.slots)?;
        // SAFETY: the last step was waited for in `sampled`.
        unsafe { self.meta.send(&self.stream) }?;
        self.stalls.loading.clear();
        self.stalls.used.clear();
        self.stalls.loading.extend_from_slice(&batch.loading);
        let counts = self.meta.counts;
        if decode {
            let key = self.graphs.key(rows, counts.longest, !batch.segments.is_empty());
            if self.graphs.get(&key).is_none() {
                self.record(key, work)?;
            }
            self.launch(&key)?;
        } else {
            self.shape =
                LaunchShape { singles: counts.singles, longest: counts.longest, small: counts.small };
            work(self, n, samples)?;
        }
        self.send_results(batch)
    }

    fn sampled(&mut self) -> Result<&[TokenId], CudaStepError> {
        let Pending { ended, ids, logits, places, tokens, scratch, row, .. } = &mut self.pending;
        ended.synchronize()?;
        tokens.clear();
        let vocab = self.spec.vocab_size;
        for (i, &(place, on_host)) in places.iter().enumerate() {
            let sampler = self.samplers[place as usize].as_mut().ok_or(CudaStepError::NotBegun { place })?;
            let token = if on_host {
                row.copy_from_slice(&logits[i * vocab..(i + 1) * vocab]);
                sampler.sample(row, self.allowed_host.as_deref(), scratch)
            } else {
                sampler.note(ids[i]);
                ids[i]
            };
            self.last_tokens[place as usize] = token;
            tokens.push(token);
        }
        Ok(tokens)
    }

    fn stalled(&mut self, to: &mut Vec<(SlotId, Nanos)>) -> Result<(), CudaStepError> {
        let begin = to.len();
        to.extend(self.stalls.loading.iter().map(|slot| (*slot, 0)));
        for (slot, (before, after)) in self.stalls.used.iter().zip(&self.stalls.events) {
            let waited = (f64::from(before.milliseconds_to(after)?) * 1e6) as Nanos;
            if let Some((_, total)) = to[begin..].iter_mut().find(|(s, _)| s == slot) {
                *total += waited;
            }
        }
        Ok(())
    }

    fn download(&mut self, from: &DeviceBuffer<f32>, out: &mut [f32]) -> Result<(), CudaStepError> {
        Ok(from.download(&self.stream, out)?)
    }
}
