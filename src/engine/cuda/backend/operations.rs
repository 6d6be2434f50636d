//! The operations of a layer, put on the backend's stream.

use half::bf16;
use lora_kernels::{
    CudaError, DeviceBuffer, KvCache, KvCacheMut, Lora, LoraStep, Out, Product, Queries, RopeKvCall,
    Rotation, Shrink, Target, View, Weight,
};

use super::super::meta::Meta;
use super::super::shape::rounded;
use super::super::slabs::on_device;
use super::{CudaBackend, CudaStepError};
use crate::engine::backend::{Adapted, Backend, HostMatrix, LoraTarget, Norm, Rows};
use crate::engine::model::Values;

/// Modules that share an input, at most: query, key and value.
const MOST_TARGETS: usize = 3;

/// The adapters of these of the step's rows. Each row that samples is a single one among those.
fn lora_step(meta: &Meta, max_rank: usize, rows: Rows) -> LoraStep<'_> {
    let all = LoraStep {
        small: meta.small(),
        small_count: meta.small_count(),
        tiles: meta.lora_tiles(),
        tile_count: meta.lora_tile_count(),
        max_rank,
        shrunk: None,
    };
    match rows {
        Rows::All => all,
        Rows::Sampling => LoraStep {
            small: meta.sampled(),
            small_count: meta.sampled_count(),
            tiles: all.tiles.slice(0..0),
            ..all
        },
    }
}

/// One layer's cache.
fn kv_layer(kv: &DeviceBuffer<bf16>, half: usize, layer: usize) -> KvCache<'_> {
    let (at, all) = (2 * layer * half, kv.view());
    KvCache { keys: all.slice(at..at + half), values: all.slice(at + half..at + 2 * half) }
}

/// The same, to be written.
fn kv_layer_mut(kv: &mut DeviceBuffer<bf16>, half: usize, layer: usize) -> KvCacheMut<'_> {
    let at = 2 * layer * half;
    let (keys, values) = kv.view_mut().split(at..at + half, at + half..at + 2 * half);
    KvCacheMut { keys, values }
}

/// Rows of a product over `n` rows. Those that sample come in any number; their buffers have room for the shape
/// above it.
fn product_rows(n: usize, rows: Rows) -> usize {
    if rows == Rows::Sampling { rounded(n) } else { n }
}

impl CudaBackend {
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
        let rotation = Rotation { table: self.rope.view(), positions: self.meta.positions() };
        let rotation = rotate.then_some(rotation);
        let cache = kv_layer_mut(&mut self.kv, half, layer);
        self.rope_kv.apply(&self.stream, n, qkv.view_mut(), rotation, self.meta.kv_rows(), cache)?;
        self.mark("positions and cache", self.spec.qkv_dim())
    }

    /// The places of a fused linear layer's modules in an adapter and in the output.
    fn targets(&self, adapted: Adapted<'_>) -> ([Target; MOST_TARGETS], usize) {
        let of = |target: &LoraTarget| Target {
            layer: adapted.layer,
            index: adapted.layer * self.modules.len() + target.module,
            elements_before: adapted.layer * self.per_layer + self.modules[target.module].before,
            column: target.column,
            outputs: self.modules[target.module].outputs,
        };
        let (mut targets, count) = ([Target::default(); MOST_TARGETS], adapted.targets.len());
        for (to, from) in targets.iter_mut().zip(adapted.targets) {
            *to = of(from);
        }
        (targets, count)
    }

    /// The product of `n` rows, and of a decode's adapters the shrink where the same kernel does both: in how many slices
    /// then.
    fn product(
        &mut self,
        n: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: View<'_, bf16>,
        out: &mut Product<'_>,
    ) -> Result<Option<u32>, CudaStepError> {
        let step = lora_step(&self.meta, self.max_rank, adapted.rows);
        if step.small.is_empty() || !step.tiles.is_empty() {
            self.gemm.run(&self.stream, n, matrix, x, out)?;
            return Ok(None);
        }
        let (targets, count) = self.targets(adapted);
        let shrink = Shrink::new(&mut self.lora_scratch, &step, &targets[..count], matrix.inputs, x)?;
        Ok(self.gemm.run_with_shrink(&self.stream, n, matrix, x, out, &shrink)?)
    }

    fn lora(
        &mut self,
        adapted: Adapted<'_>,
        shrunk: Option<u32>,
        inputs: usize,
        width: usize,
        x: View<'_, bf16>,
        out: Out<'_>,
    ) -> Result<(), CudaStepError> {
        let step = LoraStep { shrunk, ..lora_step(&self.meta, self.max_rank, adapted.rows) };
        if step.small.is_empty() && step.tiles.is_empty() {
            return Ok(());
        }
        let (targets, count) = self.targets(adapted);
        let scratch = &mut self.lora_scratch;
        self.lora.apply(&self.stream, scratch, &step, &targets[..count], inputs, x, width, out)?;
        self.mark("adapters", width)
    }

    /// Whether adapters' products are added by what reads their output next.
    fn fuses(&self, rows: Rows) -> bool {
        rows == Rows::All && self.meta.shape.large > 0 && self.lora.fuses(self.max_rank)
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
        self.elementwise.embed(&self.stream, n, width, tokens, table.view(), out.view_mut())?;
        self.mark("embedding", width)
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
        self.elementwise.rms_norm(stream, n, norm.eps, weight, x.view(), out.view_mut())?;
        self.mark("norm", norm.width)
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
        self.elementwise.layer_norm(stream, n, norm.eps, weight, bias.view(), x.view(), out)?;
        self.mark("norm", norm.width)
    }

    /// The kernels that read an adapter wait for it themselves.
    fn await_adapters(&mut self, _layer: usize) -> Result<(), CudaStepError> {
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
        let n = product_rows(n, adapted.rows);
        let x = x.view().slice(0..n * matrix.inputs);
        let shrunk = self.product(n, matrix, adapted, x, &mut Product::Store(out.view_mut()))?;
        self.mark("product", matrix.outputs)?;
        self.lora(adapted, shrunk, matrix.inputs, matrix.outputs, x, Out::Bf16(out.view_mut()))
    }

    fn linear_add(
        &mut self,
        n: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: &DeviceBuffer<bf16>,
        residual: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        let n = product_rows(n, adapted.rows);
        let x = x.view().slice(0..n * matrix.inputs);
        let shrunk = self.product(n, matrix, adapted, x, &mut Product::Add(residual.view_mut()))?;
        self.mark("product of", matrix.inputs)?;
        self.lora(adapted, shrunk, matrix.inputs, matrix.outputs, x, Out::F32(residual.view_mut()))
    }

    fn linear_wide(
        &mut self,
        n: usize,
        matrix: &Weight,
        x: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<f32>,
    ) -> Result<(), CudaStepError> {
        let n = product_rows(n, Rows::Sampling);
        self.gemm.run(&self.stream, n, matrix, x.view(), &mut Product::StoreWide(out.view_mut()))?;
        self.mark("product", matrix.outputs)
    }

    fn rope_and_write_kv(
        &mut self,
        layer: usize,
        n: usize,
        qkv: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        self.write(layer, n, qkv, true)
    }

    fn linear_rope_kv(
        &mut self,
        n: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: &DeviceBuffer<bf16>,
        qkv: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        if !self.fuses(adapted.rows) {
            self.linear(n, matrix, adapted, x, qkv)?;
            return self.rope_and_write_kv(adapted.layer, n, qkv);
        }
        let x = x.view().slice(0..n * matrix.inputs);
        self.gemm.run(&self.stream, n, matrix, x, &mut Product::Store(qkv.view_mut()))?;
        self.mark("product", matrix.outputs)?;
        let (targets, count) = self.targets(adapted);
        let half = self.kv_half();
        let rope = RopeKvCall {
            kernel: &self.rope_kv,
            rotation: Rotation { table: self.rope.view(), positions: self.meta.positions() },
            kv_rows: self.meta.kv_rows(),
            cache: kv_layer_mut(&mut self.kv, half, adapted.layer),
        };
        let step = lora_step(&self.meta, self.max_rank, adapted.rows);
        let (stream, scratch, covers) = (&self.stream, &mut self.lora_scratch, self.meta.covers());
        let (targets, inputs) = (&targets[..count], matrix.inputs);
        self.lora.apply_rope_kv(stream, scratch, &step, covers, targets, inputs, x, qkv.view_mut(), rope)?;
        self.mark("adapters, positions and cache", matrix.outputs)
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
        let (shape, width) = (self.meta.shape, self.spec.qkv_dim());
        let queries = Queries { rows: qkv.view(), width };
        let half = self.kv_half();
        let cache = kv_layer(&self.kv, half, layer);
        if shape.singles > 0 {
            self.attention.decode(
                &self.stream,
                shape.singles,
                shape.longest,
                self.meta.singles(),
                &self.meta.sequences(shape.singles),
                queries,
                cache,
                &mut self.attention_scratch,
                out.view_mut(),
            )?;
        }
        if shape.attention_tiles > 0 {
            let (tiles, count) = (self.meta.attention_tiles(), self.meta.attention_tile_count());
            let (stream, sequences) = (&self.stream, self.meta.sequences(shape.seqs));
            self.attention.prefill(stream, n, tiles, count, &sequences, queries, cache, out.view_mut())?;
        }
        self.mark("attention", self.spec.q_dim())
    }

    fn silu_mul(
        &mut self,
        n: usize,
        width: usize,
        gate_up: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        self.elementwise.silu_mul(&self.stream, n, width, gate_up.view(), out.view_mut())?;
        self.mark("SiLU", width)
    }

    fn linear_silu_mul(
        &mut self,
        n: usize,
        width: usize,
        matrix: &Weight,
        adapted: Adapted<'_>,
        x: &DeviceBuffer<bf16>,
        gate_up: &mut DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        let few = product_rows(n, adapted.rows);
        let LoraStep { small, tiles, .. } = lora_step(&self.meta, self.max_rank, adapted.rows);
        let (adapters, prompts) = (!small.is_empty(), !tiles.is_empty());
        if !adapters && !prompts && self.gemm.multiplies_silu(few, matrix) {
            let x = x.view().slice(0..few * matrix.inputs);
            self.gemm.run(&self.stream, few, matrix, x, &mut Product::SiluMul(out.view_mut()))?;
            return self.mark("product and SiLU", matrix.outputs);
        }
        if adapters && !prompts && few <= Lora::MOST_SILU_ROWS {
            let x = x.view().slice(0..few * matrix.inputs);
            let shrunk = self.product(few, matrix, adapted, x, &mut Product::Store(gate_up.view_mut()))?;
            self.mark("product", matrix.outputs)?;
            let (targets, count) = self.targets(adapted);
            let step = LoraStep { shrunk, ..lora_step(&self.meta, self.max_rank, adapted.rows) };
            let (stream, scratch, targets) = (&self.stream, &mut self.lora_scratch, &targets[..count]);
            let (inputs, gate_up, act) = (matrix.inputs, gate_up.view_mut(), out.view_mut());
            self.lora.apply_silu_mul_small(stream, scratch, &step, targets, inputs, x, gate_up, act)?;
            return self.mark("adapters and SiLU", matrix.outputs);
        }
        if !self.fuses(adapted.rows) {
            self.linear(n, matrix, adapted, x, gate_up)?;
            return self.silu_mul(n, width, gate_up, out);
        }
        let x = x.view().slice(0..n * matrix.inputs);
        self.gemm.run(&self.stream, n, matrix, x, &mut Product::Store(gate_up.view_mut()))?;
        self.mark("product", matrix.outputs)?;
        let (targets, count) = self.targets(adapted);
        let step = lora_step(&self.meta, self.max_rank, adapted.rows);
        let (stream, scratch, covers) = (&self.stream, &mut self.lora_scratch, self.meta.covers());
        let (targets, inputs) = (&targets[..count], matrix.inputs);
        let (gate_up, act) = (gate_up.view_mut(), out.view_mut());
        self.lora.apply_silu_mul(stream, scratch, &step, covers, targets, inputs, x, gate_up, act)?;
        self.mark("adapters and SiLU", matrix.outputs)
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

    fn gather_sample_inputs(
        &mut self,
        samples: usize,
        width: usize,
        x: &DeviceBuffer<bf16>,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<(), CudaStepError> {
        // Two of them are one of the kernel's elements.
        let (rows, x, out) = (self.meta.sample_rows(), x.view().cast::<f32>(), out.view_mut().cast::<f32>());
        Ok(self.elementwise.gather(&self.stream, samples, width / 2, rows, x, out)?)
    }

    fn sample(&mut self, samples: usize, logits: &DeviceBuffer<f32>) -> Result<(), CudaStepError> {
        self.pending.logits_at = logits.view().address();
        let (vocab, allowed) = (self.spec.vocab_size, self.allowed.as_ref().map(DeviceBuffer::view));
        let (stream, ids) = (&self.stream, self.ids.view_mut());
        self.argmax.run(stream, samples, vocab, logits.view(), allowed, ids)?;
        self.mark("sampling", vocab)
    }
}
