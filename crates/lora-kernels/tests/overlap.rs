//! A decode step whose kernels begin while the ones before them end: the same bits as one after the other.

mod common;

use common::{device, download, upload};
use lora_kernels::{
    Argmax, Attention, AttentionShape, CudaError, DecodeWorkspace, Device, DeviceBuffer, Draw, Elementwise,
    GemmSmall, KvCache, KvCacheMut, Lora, LoraLimits, LoraScratch, LoraStep, Out, Product, Queries, RopeKv,
    Rotation, Segment, Sequences, Shrink, Stream, Target, Uniform, View, ViewMut, Weight, bf16,
    rope_frequencies, rope_table,
};

const LAYERS: usize = 6;
const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 2816;
const VOCAB: usize = 4000;
const SHAPE: AttentionShape = AttentionShape { heads: 8, kv_heads: 8, head_dim: 128, block_size: 16 };
/// Blocks of a sequence.
const BLOCKS: usize = 40;
const RANK: usize = 8;

/// Inputs and outputs of a layer's products, and the widths of the modules in each.
const PRODUCTS: [(usize, &[usize]); 4] = [
    (HIDDEN, &[HIDDEN, HIDDEN, HIDDEN]),
    (HIDDEN, &[HIDDEN]),
    (HIDDEN, &[INTERMEDIATE, INTERMEDIATE]),
    (INTERMEDIATE, &[HIDDEN]),
];

fn per_layer() -> usize {
    PRODUCTS.iter().flat_map(|(inputs, outputs)| outputs.iter().map(move |o| inputs + o)).sum()
}

fn targets(layer: usize, product: usize) -> Vec<Target> {
    let elements = |(inputs, outputs): &(usize, &[usize])| outputs.iter().map(|o| inputs + o).sum::<usize>();
    let mut before = layer * per_layer() + PRODUCTS[..product].iter().map(elements).sum::<usize>();
    let (inputs, widths) = PRODUCTS[product];
    let mut column = 0;
    let mut targets = Vec::new();
    for &outputs in widths {
        targets.push(Target { layer: 0, index: 0, elements_before: before, column, outputs });
        before += inputs + outputs;
        column += outputs;
    }
    targets
}

fn step<'a>(
    segments: &'a DeviceBuffer<Segment>,
    tiles: &'a DeviceBuffer<Segment>,
    count: &'a DeviceBuffer<u32>,
) -> LoraStep<'a> {
    LoraStep {
        small: segments.view(),
        small_count: count.view(),
        tiles: tiles.view(),
        tile_count: count.view(),
        max_rank: RANK,
        shrunk: None,
    }
}

/// A product in the shape's `form`-th form; from the second on it does the shrink of the adapters that are given, and the
/// step says so.
#[expect(clippy::too_many_arguments, reason = "a launch")]
fn multiply(
    gemm: &mut GemmSmall,
    stream: &Stream,
    (form, n): (usize, usize),
    weight: &Weight,
    x: View<'_, bf16>,
    out: &mut Product<'_>,
    adapted: Option<(&mut LoraStep<'_>, &mut LoraScratch, &[Target])>,
    scratch: ViewMut<'_, f32>,
) -> Result<(), CudaError> {
    let forms = gemm.forms(n, weight.outputs, weight.inputs);
    let of = forms[form % forms.len()];
    match adapted {
        Some((step, lora_scratch, targets)) if form > 0 => {
            let shrink = Shrink::new(lora_scratch, step, targets, weight.inputs, x)?;
            let slices = gemm.run_with_shrink(stream, of, n, weight, x, out, &shrink, scratch)?;
            step.shrunk = Some(slices);
            Ok(())
        }
        _ => gemm.run(stream, of, n, weight, x, out, scratch),
    }
}

/// A model, its cache and buffers.
struct Step {
    n: usize,
    context: usize,
    adapters: bool,
    gemm: GemmSmall,
    scratch: DeviceBuffer<f32>,
    kernels: Elementwise,
    rope: RopeKv,
    attention: Attention,
    workspace: DecodeWorkspace,
    lora: [Lora; 2],
    lora_scratch: LoraScratch,
    argmax: Argmax,
    weights: Vec<Vec<Weight>>,
    head: Weight,
    norm: DeviceBuffer<bf16>,
    embeddings: DeviceBuffer<bf16>,
    angles: DeviceBuffer<f32>,
    /// What every run begins with: NaN where the step is to write.
    pristine: [DeviceBuffer<bf16>; 2],
    cache: [DeviceBuffer<bf16>; 2],
    tokens: DeviceBuffer<u32>,
    positions: DeviceBuffer<u32>,
    kv_rows: DeviceBuffer<u32>,
    places: DeviceBuffer<u32>,
    contexts: DeviceBuffer<u32>,
    tables: DeviceBuffer<u32>,
    count: DeviceBuffer<u32>,
    segments: DeviceBuffer<Segment>,
    tiles: DeviceBuffer<Segment>,
    _slots: DeviceBuffer<bf16>,
    residual: DeviceBuffer<f32>,
    last: DeviceBuffer<f32>,
    normed: DeviceBuffer<bf16>,
    qkv: DeviceBuffer<bf16>,
    attended: DeviceBuffer<bf16>,
    up: DeviceBuffer<bf16>,
    act: DeviceBuffer<bf16>,
    logits: DeviceBuffer<f32>,
    ids: DeviceBuffer<u32>,
}

impl Step {
    fn new(
        device: &Device,
        stream: &Stream,
        n: usize,
        context: usize,
        adapters: bool,
    ) -> Result<Self, CudaError> {
        let draw = Draw::load(device)?;
        let mut key = 0;
        let mut drawn = |len: usize, bound: f32, centre: f32| {
            key += 1;
            let mut buffer = device.buffer::<bf16>(len)?;
            draw.fill(stream, &Uniform { key: [key; 32], skip: 0, bound, centre }, buffer.view_mut())?;
            Ok::<_, CudaError>(buffer)
        };
        let mut weight = |outputs: usize, inputs: usize| {
            let values = drawn(outputs * inputs, (3.0 / inputs as f32).sqrt(), 0.0)?;
            Ok::<_, CudaError>(Weight { values, bias: None, outputs, inputs })
        };
        let mut weights = Vec::new();
        for _ in 0..LAYERS {
            let of = PRODUCTS.iter().map(|(inputs, outputs)| weight(outputs.iter().sum(), *inputs));
            weights.push(of.collect::<Result<Vec<_>, _>>()?);
        }
        let head = weight(VOCAB, HIDDEN)?;
        // The last token of each sequence is this step's.
        let elements = SHAPE.cache_elements(n * BLOCKS);
        let mut pristine = [drawn(LAYERS * elements, 1.0, 0.0)?, drawn(LAYERS * elements, 1.0, 0.0)?];
        let kv_rows: Vec<u32> = (0..n)
            .map(|s| {
                let (block, offset) = ((context - 1) / SHAPE.block_size, (context - 1) % SHAPE.block_size);
                ((s * BLOCKS + block) * SHAPE.block_size + offset) as u32
            })
            .collect();
        for half in &mut pristine {
            let mut values = download(stream, half);
            for layer in 0..LAYERS {
                for &row in &kv_rows {
                    for head in 0..SHAPE.kv_heads {
                        let at = lora_kernels::twins::rope_kv::cache_at(&SHAPE, row as usize, head);
                        values[layer * elements + at..][..SHAPE.head_dim].fill(bf16::NAN);
                    }
                }
            }
            half.upload(stream, &values)?;
        }
        let slot = RANK * LAYERS * per_layer();
        let slots = drawn(n * slot, 0.05, 0.0)?;
        let segments: Vec<Segment> = (0..n)
            .map(|row| Segment {
                matrices: slots.view().slice(row * slot..(row + 1) * slot).address(),
                offsets: 0,
                start: row as u32,
                rows: 1,
                rank: RANK as u32,
                scale: 1.0,
                ..Segment::NONE
            })
            .collect();
        let attention = Attention::load(device, SHAPE)?;
        let limits = LoraLimits { max_rows: n, max_small: n, max_rank: RANK };
        let lora = Lora::load(device)?;
        let all = |value: u32| upload(device, stream, &vec![value; n]);
        let up_to = |end: usize| upload(device, stream, &(0..end as u32).collect::<Vec<_>>());
        Ok(Self {
            n,
            context,
            adapters,
            gemm: GemmSmall::load(device)?,
            scratch: device.buffer(4 << 20)?,
            kernels: Elementwise::load(device)?,
            rope: RopeKv::load(device, SHAPE)?,
            workspace: attention.workspace(device, n, BLOCKS * SHAPE.block_size)?,
            attention,
            lora: [lora.clone().with_overlap(false), lora.with_overlap(true)],
            lora_scratch: LoraScratch::new(device, limits)?,
            argmax: Argmax::load(device, n)?,
            weights,
            head,
            norm: drawn(HIDDEN, 0.1, 1.0)?,
            embeddings: drawn(VOCAB * HIDDEN, 1.0, 0.0)?,
            angles: upload(device, stream, &rope_table(1024, &rope_frequencies(SHAPE.head_dim, 10_000.0))),
            cache: [device.buffer(pristine[0].len())?, device.buffer(pristine[1].len())?],
            pristine,
            tokens: up_to(n),
            positions: all(context as u32 - 1),
            kv_rows: upload(device, stream, &kv_rows),
            places: up_to(n),
            contexts: all(context as u32),
            tables: up_to(n * BLOCKS),
            count: upload(device, stream, &[n as u32]),
            segments: upload(device, stream, &segments),
            tiles: device.buffer(0)?,
            _slots: slots,
            residual: device.buffer(n * HIDDEN)?,
            last: device.buffer(n * HIDDEN)?,
            normed: device.buffer(n * HIDDEN)?,
            qkv: device.buffer(n * 3 * HIDDEN)?,
            attended: device.buffer(n * HIDDEN)?,
            up: device.buffer(n * 2 * INTERMEDIATE)?,
            act: device.buffer(n * INTERMEDIATE)?,
            logits: device.buffer(n * VOCAB)?,
            ids: device.buffer(n)?,
        })
    }

    /// One layer's product, with its adapters'. `form` counts through the product's forms; from the second on the
    /// product's kernel does the shrink.
    fn product(
        &mut self,
        stream: &Stream,
        overlapped: bool,
        form: usize,
        layer: usize,
        which: usize,
    ) -> Result<(), CudaError> {
        let weight = &self.weights[layer][which];
        let x = match which {
            0 => self.normed.view(),
            1 => self.attended.view(),
            _ => self.act.view(),
        };
        let mut out = match which {
            0 => Product::Store(self.qkv.view_mut()),
            _ => Product::Add(self.residual.view_mut()),
        };
        let targets = targets(layer, which);
        let mut step = step(&self.segments, &self.tiles, &self.count);
        let lora_scratch = &mut self.lora_scratch;
        let (gemm, scratch) = (&mut self.gemm, self.scratch.view_mut());
        let adapted = self.adapters.then_some((&mut step, &mut *lora_scratch, &targets[..]));
        multiply(gemm, stream, (form, self.n), weight, x, &mut out, adapted, scratch)?;
        if !self.adapters {
            return Ok(());
        }
        let out = match which {
            0 => Out::Bf16(self.qkv.view_mut()),
            _ => Out::F32(self.residual.view_mut()),
        };
        let (lora, inputs, outputs) = (&self.lora[usize::from(overlapped)], weight.inputs, weight.outputs);
        lora.apply(stream, lora_scratch, &step, &targets, inputs, x, outputs, out)
    }

    /// Gate's and up's product, with their adapters' and SiLU: by a kernel of its own, or, from the second form on, by the
    /// one before it.
    fn activation(
        &mut self,
        stream: &Stream,
        overlapped: bool,
        form: usize,
        layer: usize,
    ) -> Result<(), CudaError> {
        let (n, weight, x) = (self.n, &self.weights[layer][2], self.normed.view());
        let targets = targets(layer, 2);
        let mut step = step(&self.segments, &self.tiles, &self.count);
        let lora_scratch = &mut self.lora_scratch;
        let (gemm, scratch) = (&mut self.gemm, self.scratch.view_mut());
        if form > 0 && !self.adapters {
            let out = &mut Product::SiluMul(self.act.view_mut());
            return multiply(gemm, stream, (form, n), weight, x, out, None, scratch);
        }
        let adapted = self.adapters.then_some((&mut step, &mut *lora_scratch, &targets[..]));
        let out = &mut Product::Store(self.up.view_mut());
        multiply(gemm, stream, (form, n), weight, x, out, adapted, scratch)?;
        let lora = &self.lora[usize::from(overlapped)];
        if self.adapters && form > 0 {
            let (up, act) = (self.up.view_mut(), self.act.view_mut());
            return lora.apply_silu_mul_small(stream, lora_scratch, &step, &targets, HIDDEN, x, up, act);
        }
        if self.adapters {
            let out = Out::Bf16(self.up.view_mut());
            lora.apply(stream, lora_scratch, &step, &targets, HIDDEN, x, weight.outputs, out)?;
        }
        self.kernels.silu_mul(stream, n, INTERMEDIATE, self.up.view(), self.act.view_mut())
    }

    fn run(&mut self, stream: &Stream, overlapped: bool, form: usize) -> Result<(), CudaError> {
        let (n, eps) = (self.n, 1e-5);
        for half in 0..2 {
            stream.copy(self.pristine[half].view(), self.cache[half].view_mut())?;
        }
        let tokens = self.tokens.view();
        self.kernels.embed(stream, n, HIDDEN, tokens, self.embeddings.view(), self.residual.view_mut())?;
        let layer_elements = SHAPE.cache_elements(n * BLOCKS);
        for layer in 0..LAYERS {
            let here = layer * layer_elements..(layer + 1) * layer_elements;
            let norm = self.norm.view();
            self.kernels.rms_norm(stream, n, eps, norm, self.residual.view(), self.normed.view_mut())?;
            self.product(stream, overlapped, form, layer, 0)?;
            let [keys, values] = &mut self.cache;
            let rotation = Rotation { table: self.angles.view(), positions: self.positions.view() };
            let cache = KvCacheMut {
                keys: keys.view_mut().slice(here.clone()),
                values: values.view_mut().slice(here.clone()),
            };
            let (qkv, rows) = (self.qkv.view_mut(), self.kv_rows.view());
            self.rope.apply(stream, n, qkv, Some(rotation), rows, cache)?;
            let sequences = Sequences {
                places: self.places.view(),
                starts: self.places.view(),
                contexts: self.contexts.view(),
                block_tables: self.tables.view(),
                blocks_per_seq: BLOCKS,
            };
            self.attention.decode(
                stream,
                n,
                self.context,
                self.count.view(),
                &sequences,
                Queries { rows: self.qkv.view(), width: SHAPE.qkv_width() },
                KvCache { keys: keys.view().slice(here.clone()), values: values.view().slice(here) },
                &mut self.workspace,
                self.attended.view_mut(),
            )?;
            self.product(stream, overlapped, form, layer, 1)?;
            let norm = self.norm.view();
            self.kernels.rms_norm(stream, n, eps, norm, self.residual.view(), self.normed.view_mut())?;
            self.activation(stream, overlapped, form, layer)?;
            self.product(stream, overlapped, form, layer, 3)?;
        }
        let rows = self.places.view();
        self.kernels.gather(stream, n, HIDDEN, rows, self.residual.view(), self.last.view_mut())?;
        let norm = self.norm.view();
        self.kernels.rms_norm(stream, n, eps, norm, self.last.view(), self.normed.view_mut())?;
        let forms = self.gemm.forms(n, VOCAB, HIDDEN);
        let mut out = Product::StoreWide(self.logits.view_mut());
        let (form, x, scratch) = (forms[form % forms.len()], self.normed.view(), self.scratch.view_mut());
        self.gemm.run(stream, form, n, &self.head, x, &mut out, scratch)?;
        self.argmax.run(stream, n, VOCAB, self.logits.view(), None, self.ids.view_mut())
    }

    fn results(&self, stream: &Stream) -> (Vec<u32>, Vec<u32>) {
        let logits: Vec<f32> = download(stream, &self.logits);
        assert!(logits.iter().all(|v| v.is_finite()), "a logit is not finite");
        (logits.iter().map(|v| v.to_bits()).collect(), download(stream, &self.ids))
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_step_gives_the_same_bits_overlapped_and_not() -> Result<(), CudaError> {
    let (device, stream) = device();
    // Contexts that are split and not, and of which this step's token is in a stage's first row, or alone.
    for (n, context) in [(16, 513), (16, 1), (3, 640), (8, 65), (1, 300)] {
        for adapters in [false, true] {
            let mut step = Step::new(&device, &stream, n, context, adapters)?;
            for form in 0..3 {
                let what = format!("{n} sequences of {context} tokens, adapters: {adapters}, form {form}");
                step.run(&stream.without_overlap(), false, form)?;
                let want = step.results(&stream);
                let check = |how: &str, got: (Vec<u32>, Vec<u32>)| {
                    let wrong = got.0.iter().zip(&want.0).filter(|(g, w)| g != w).count();
                    let first = got.0.iter().zip(&want.0).position(|(g, w)| g != w);
                    let first = first.map(|at| (at / VOCAB, at % VOCAB));
                    assert_eq!(wrong, 0, "{what}, {how}: logits differ, the first at {first:?}");
                    assert_eq!(got.1, want.1, "{what}, {how}: tokens differ");
                };
                step.run(&stream.without_overlap(), false, form)?;
                check("once more", step.results(&stream));
                for run in 0..5 {
                    step.run(&stream, true, form)?;
                    check(&format!("launched, run {run}"), step.results(&stream));
                }
                let mut graph = stream.capture(|| step.run(&stream, true, form))?;
                for run in 0..20 {
                    graph.launch()?;
                    check(&format!("graph, run {run}"), step.results(&stream));
                }
            }
        }
    }
    Ok(())
}
