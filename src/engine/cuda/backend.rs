//! The backend on a GPU: its memory, how a step is run. What a layer is made of is in `operations`.

mod operations;

use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use lora_kernels::{
    Argmax, Attention, AttentionShape, Choices, CudaError, DecodeWorkspace, Device, DeviceBuffer, Draw,
    Elementwise, Event, Gemm, Lora, LoraLimits, LoraScratch, PinnedBuffer, Product, RopeKv, Stream,
    rope_frequencies, rope_table,
};
use lora_sched::{Nanos, SlotId};

use super::graphs::{GraphKeys, Graphs};
use super::meta::Meta;
use super::shape::{Composition, padded, shapes};
use super::slots::CudaSlots;
use super::timeline::Timeline;
use crate::engine::backend::{BackendShape, StepBackend};
use crate::engine::batch::{Batch, BatchLimits};
use crate::engine::device::{SeqSampler, StepError};
use crate::engine::executor::{Sampling, TokenId, TokenLogprobs};
use crate::engine::model::{Decoder, Destination, Family, ModelSpec};

/// A step that a GPU cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CudaStepError {
    /// The device.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// The plan.
    #[error(transparent)]
    Step(#[from] StepError),
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
    graph_keys: GraphKeys,
    graphs: Graphs,
    /// A layer's modules, and the sum of all their widths.
    modules: Vec<ModuleWidths>,
    per_layer: usize,
    samplers: Vec<Option<SeqSampler>>,
    last_tokens: Vec<TokenId>,
    pending: Pending,
    stalls: Stalls,
    timeline: Timeline,
}

/// Where a module's part begins in an adapter that adapts all.
struct ModuleWidths {
    /// `inputs + outputs` of the modules before it in a layer.
    before: usize,
    outputs: usize,
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
    /// Slots that the step in flight reads and that may be loading.
    loading: Vec<SlotId>,
    /// `[seqs][layers]` how long it waited for each of their layers, in ns.
    waits: PinnedBuffer<u32>,
    /// How long its launch waited for their copies to be issued.
    issue: Nanos,
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
            let mut frequencies = rope_frequencies(spec.head_dim, f64::from(spec.rope_theta));
            for (index, frequency) in frequencies.iter_mut().enumerate() {
                *frequency = spec.rope_scaling.scale(index, *frequency);
            }
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
            graph_keys: GraphKeys::new(&limits),
            graphs: Graphs::default(),
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
            timeline: Timeline::new(),
            stalls: Stalls {
                loading: Vec::with_capacity(seqs),
                waits: device.pinned(seqs * spec.layers)?,
                issue: 0,
            },
            device,
            stream,
            spec,
            limits,
            max_rank,
            slots,
        })
    }

    /// Chooses the products' algorithms, so that no step does. `choices` are those of earlier executors with the
    /// same weights, and what this one has chosen is added.
    pub(super) fn choose(
        &mut self,
        decoder: &Decoder<Self>,
        choices: &mut Choices,
    ) -> Result<(), CudaStepError> {
        self.stream.bind()?;
        self.gemm.reuse(choices)?;
        self.choose_products(decoder)?;
        *choices = self.gemm.choices();
        Ok(())
    }

    /// Records every graph, so that no step does.
    pub(super) fn record(&mut self, decoder: &mut Decoder<Self>) -> Result<(), CudaStepError> {
        let (begun, (free, _)) = (Instant::now(), self.device.memory()?);
        for key in self.graph_keys.all() {
            self.meta.fill_empty(&key);
            let stream = self.stream.clone();
            let mut graph = stream.capture(|| {
                let shape = self.meta.shape;
                decoder.forward(self, shape.rows, shape.samples)?;
                decoder.sample(self, shape.samples)
            })?;
            // Those of chunks take milliseconds each, a second or two together.
            if !key.chunks {
                // SAFETY: what reads the words is waited for below.
                unsafe { self.meta.send(&self.stream) }?;
                graph.launch()?;
                self.stream.synchronize()?;
            }
            self.graphs.insert(key, graph);
        }
        let (count, seconds) = (self.graphs.len(), begun.elapsed().as_secs_f64());
        let bytes = free.saturating_sub(self.device.memory()?.0);
        tracing::info!("{count} graphs recorded in {seconds:.1} s, {:.0} MB", bytes as f64 * 1e-6);
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

    /// Tells the timeline what has just been submitted.
    fn mark(&mut self, name: &'static str, width: usize) -> Result<(), CudaStepError> {
        Ok(self.timeline.mark(&self.device, &self.stream, (name, width))?)
    }

    /// Puts the step's results on their way to the host.
    fn send_results(&mut self, batch: &Batch) -> Result<(), CudaStepError> {
        let Pending { ended, ids, logits, logits_at, places, .. } = &mut self.pending;
        places.clear();
        for &place in &batch.sample_places {
            let sampler = self.samplers[place as usize].as_ref().ok_or(StepError::NotBegun { place })?;
            places.push((place, !sampler.is_plain()));
        }
        let samples = places.len();
        // SAFETY: the pinned memory is read only after `ended` (in `sampled`, `stalled`), and written by no one else.
        unsafe {
            self.stream.copy_out(self.ids.view().slice(0..samples), ids)?;
            let vocab = self.spec.vocab_size;
            for (row, _) in places.iter().enumerate().filter(|(_, (_, host))| *host) {
                let from = *logits_at + (row * vocab * size_of::<f32>()) as u64;
                self.stream.copy_out_from(from, &mut logits[row * vocab..(row + 1) * vocab])?;
            }
            let of_slots = self.stalls.waits.chunks_exact_mut(self.spec.layers);
            for (slot, waits) in self.stalls.loading.iter().zip(of_slots) {
                self.slots.read_waits(&self.stream, *slot, waits)?;
            }
        }
        Ok(self.stream.record(ended)?)
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
        let of = Composition::of(batch);
        let key = self.graph_keys.key(&of);
        let vocab = self.spec.vocab_size;
        self.meta.fill(batch, &of, key.as_ref(), &self.last_tokens, vocab, &self.slots)?;
        // SAFETY: the last step was waited for in `sampled`.
        unsafe { self.meta.send(&self.stream) }?;
        self.stalls.loading.clear();
        self.stalls.loading.extend_from_slice(&batch.loading);
        for slot in &self.stalls.loading {
            self.slots.clear_waits(&self.stream, *slot)?;
        }
        let begun = Instant::now();
        self.slots.await_issue(&self.stalls.loading)?;
        self.stalls.issue = begun.elapsed().as_nanos() as Nanos;
        match key.and_then(|key| self.graphs.get(&key)) {
            Some(graph) => graph.launch()?,
            None => {
                let shape = self.meta.shape;
                self.timeline.begin(&self.device, &self.stream, shape.rows)?;
                work(self, shape.rows, shape.samples)?;
                self.timeline.submitted();
            }
        }
        self.send_results(batch)
    }

    fn sampled(&mut self) -> Result<&[TokenId], CudaStepError> {
        let Pending { ended, ids, logits, places, tokens, scratch, row, .. } = &mut self.pending;
        ended.synchronize()?;
        self.timeline.log()?;
        tokens.clear();
        let vocab = self.spec.vocab_size;
        for (i, &(place, on_host)) in places.iter().enumerate() {
            let sampler = self.samplers[place as usize].as_mut().ok_or(StepError::NotBegun { place })?;
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

    fn logprobs(&mut self, place: u32) -> Option<Box<TokenLogprobs>> {
        self.samplers[place as usize].as_mut()?.take_logprobs()
    }

    fn stalled(&mut self, to: &mut Vec<(SlotId, Nanos)>) -> Result<(), CudaStepError> {
        let issue = self.stalls.issue;
        let waited = |of_layers: &[u32]| issue + of_layers.iter().map(|ns| Nanos::from(*ns)).sum::<Nanos>();
        let waits = self.stalls.waits.chunks_exact(self.spec.layers).map(waited);
        to.extend(self.stalls.loading.iter().copied().zip(waits));
        Ok(())
    }

    fn download(&mut self, from: &DeviceBuffer<f32>, out: &mut [f32]) -> Result<(), CudaStepError> {
        Ok(from.download(&self.stream, out)?)
    }
}
