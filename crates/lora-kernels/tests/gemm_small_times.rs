//! Times of products of a few rows in a graph, beside cuBLASLt's. Prints only.

mod common;

use common::{device, median_us, memory_rate};
use lora_kernels::{
    CudaError, Device, Draw, Elementwise, Gemm, GemmSmall, Product, Stream, Uniform, Weight, bf16,
};

const SHAPES: [(&str, usize, usize, bool); 5] = [
    ("q,k,v", 12_288, 4096, false),
    ("o", 4096, 4096, true),
    ("gate,up", 22_016, 4096, false),
    ("down", 4096, 11_008, true),
    ("head", 32_000, 4096, false),
];
/// Weights that are taken in turn, so that none is still in the cache.
const BYTES: usize = 400 << 20;

fn weights(device: &Device, stream: &Stream, outputs: usize, inputs: usize) -> Vec<Weight> {
    let draw = Draw::load(device).unwrap();
    let count = (BYTES / (2 * outputs * inputs)).max(4);
    (0..count)
        .map(|i| {
            let mut values = device.buffer::<bf16>(outputs * inputs).unwrap();
            let from = Uniform { key: [i as u8; 32], skip: 0, bound: 0.03, centre: 0.0 };
            draw.fill(stream, &from, values.view_mut()).unwrap();
            Weight { values, bias: None, outputs, inputs }
        })
        .collect()
}

/// Microseconds of one product of a graph of all `count`; `run` puts the i-th on the stream.
fn in_graph(
    device: &Device,
    stream: &Stream,
    count: usize,
    mut run: impl FnMut(usize) -> Result<(), CudaError>,
) -> f64 {
    let mut graph = stream.capture(|| (0..count).try_for_each(&mut run)).unwrap();
    median_us(device, stream, || graph.launch()).unwrap() / count as f64
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn small_product_times() {
    let (device, stream) = device();
    let memory = memory_rate(&device, &stream);
    let mut small = GemmSmall::load(&device).unwrap();
    let mut scratch = device.buffer::<f32>(4 << 20).unwrap();
    let draw = Draw::load(&device).unwrap();
    println!(
        "| product | rows | kernel | slices | µs | GB/s of the weight | % of {memory:.2e} B/µs | µs alone |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (name, outputs, inputs, adds) in SHAPES {
        let weights = weights(&device, &stream, outputs, inputs);
        let all: Vec<&Weight> = weights.iter().collect();
        let mut x = device.buffer::<bf16>(32 * inputs).unwrap();
        draw.fill(&stream, &Uniform { key: [9; 32], skip: 0, bound: 1.0, centre: 0.0 }, x.view_mut())
            .unwrap();
        let mut narrow = device.buffer::<bf16>(32 * outputs).unwrap();
        let mut wide = device.buffer::<f32>(32 * outputs).unwrap();
        let bytes = 2.0 * (outputs * inputs) as f64;
        let row = |n: usize, kernel: &str, slices: String, us: f64, alone: f64| {
            let rate = bytes / us;
            println!(
                "| {name} | {n} | {kernel} | {slices} | {us:.1} | {:.0} | {:.1} | {alone:.1} |",
                rate * 1e-3,
                100.0 * rate / memory
            );
        };
        for n in [1, 8, 16, 24, 32] {
            let mut out = match name {
                _ if adds => Product::Add(wide.view_mut()),
                "head" => Product::StoreWide(wide.view_mut()),
                _ => Product::Store(narrow.view_mut()),
            };
            for form in small.forms(n, outputs, inputs) {
                let mut time = |stream: &Stream| {
                    in_graph(&device, stream, all.len(), |i| {
                        small.run(stream, form, n, all[i], x.view(), &mut out, scratch.view_mut())
                    })
                };
                let (us, alone) = (time(&stream), time(&stream.without_overlap()));
                row(n, form.name(), format!("{form:?}"), us, alone);
            }
            let mut library = Gemm::library(&device).unwrap();
            library.choose(&device, &stream, n, &all, x.view(), &mut out).unwrap();
            let us = in_graph(&device, &stream, all.len(), |i| {
                library.run(&stream, n, all[i], x.view(), &mut out)
            });
            row(n, "cuBLASLt", String::new(), us, us);
            let mut gemm = Gemm::new(&device).unwrap();
            gemm.choose(&device, &stream, n, &all, x.view(), &mut out).unwrap();
            println!("| {name} | {n} | chosen: {} | | | | | |", gemm.chosen(n, all[0], &out));
        }
    }
}

/// The products of Llama-2-7B's layers with the norms and activations between them, without attention: what a
/// step is made of besides the cache.
#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn layer_times() {
    let (device, stream) = device();
    let memory = memory_rate(&device, &stream);
    let kernels = Elementwise::load(&device).unwrap();
    let layers: Vec<Vec<Weight>> = SHAPES[..4]
        .iter()
        .map(|(_, outputs, inputs, _)| weights(&device, &stream, *outputs, *inputs))
        .collect();
    let norm = {
        let mut norm = device.buffer::<bf16>(4096).unwrap();
        let from = Uniform { key: [3; 32], skip: 0, bound: 0.1, centre: 1.0 };
        Draw::load(&device).unwrap().fill(&stream, &from, norm.view_mut()).unwrap();
        norm
    };
    let bytes: f64 = SHAPES[..4].iter().map(|(_, o, i, _)| 2.0 * (o * i) as f64).sum();
    println!("| rows | products | overlapped | µs a layer | floor |\n| --- | --- | --- | --- | --- |");
    for n in [1, 8, 16] {
        for (name, mut gemm) in
            [("cuBLASLt", Gemm::library(&device).unwrap()), ("chosen", Gemm::new(&device).unwrap())]
        {
            let mut residual = device.buffer::<f32>(n * 4096).unwrap();
            let mut normed = device.buffer::<bf16>(n * 4096).unwrap();
            let mut qkv = device.buffer::<bf16>(n * 12_288).unwrap();
            let mut up = device.buffer::<bf16>(n * 22_016).unwrap();
            let mut act = device.buffer::<bf16>(n * 11_008).unwrap();
            let draw = Draw::load(&device).unwrap();
            for buffer in [&mut normed, &mut act] {
                let from = Uniform { key: [5; 32], skip: 0, bound: 1.0, centre: 0.0 };
                draw.fill(&stream, &from, buffer.view_mut()).unwrap();
            }
            let all = |at: usize| layers[at].iter().collect::<Vec<&Weight>>();
            let mut choose = |at: usize, x: &_, mut out: Product<'_>| {
                let x: &lora_kernels::DeviceBuffer<bf16> = x;
                gemm.choose(&device, &stream, n, &all(at), x.view(), &mut out).unwrap();
            };
            choose(0, &normed, Product::Store(qkv.view_mut()));
            choose(1, &normed, Product::Add(residual.view_mut()));
            choose(2, &normed, Product::Store(up.view_mut()));
            choose(3, &act, Product::Add(residual.view_mut()));
            stream.clear(residual.view_mut()).unwrap();
            for overlapped in [false, true] {
                let stream = if overlapped { stream.clone() } else { stream.without_overlap() };
                const LAYERS: usize = 16;
                let us = in_graph(&device, &stream, LAYERS, |i| {
                    let weight = |at: usize| &layers[at][i % layers[at].len()];
                    let (norm, eps) = (norm.view(), 1e-5);
                    kernels.rms_norm(&stream, n, eps, norm, residual.view(), normed.view_mut())?;
                    gemm.run(&stream, n, weight(0), normed.view(), &mut Product::Store(qkv.view_mut()))?;
                    // In place of attention's output.
                    gemm.run(&stream, n, weight(1), normed.view(), &mut Product::Add(residual.view_mut()))?;
                    kernels.rms_norm(&stream, n, eps, norm, residual.view(), normed.view_mut())?;
                    gemm.run(&stream, n, weight(2), normed.view(), &mut Product::Store(up.view_mut()))?;
                    kernels.silu_mul(&stream, n, 11_008, up.view(), act.view_mut())?;
                    gemm.run(&stream, n, weight(3), act.view(), &mut Product::Add(residual.view_mut()))
                });
                println!("| {n} | {name} | {overlapped} | {us:.1} | {:.1} |", bytes / memory);
            }
        }
    }
}
