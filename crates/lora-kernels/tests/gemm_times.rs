//! Times of the products of Llama-2-7B's layers, with the algorithm that would be chosen. Prints only.

mod common;

use common::{Random, device, median_us};
use lora_kernels::{Draw, Gemm, Product, Uniform, Weight, bf16};

const SHAPES: [(&str, usize, usize); 5] = [
    ("q,k,v", 12_288, 4096),
    ("o", 4096, 4096),
    ("gate,up", 22_016, 4096),
    ("down", 4096, 11_008),
    ("head", 32_000, 4096),
];
const ROWS: [usize; 8] = [1, 8, 16, 64, 512, 1024, 2048, 4096];
/// Weights that are taken in turn, so that none is still in the cache.
const BYTES: usize = 300 << 20;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn product_times() {
    let (device, stream) = device();
    let draw = Draw::load(&device).unwrap();
    let mut gemm = Gemm::new(&device).unwrap();
    let mut random = Random::new(1);
    println!("| product | rows | store, µs | TFLOP/s | GB/s | add, µs | wide, µs |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (name, outputs, inputs) in SHAPES {
        let count = (BYTES / (2 * outputs * inputs)).max(2);
        let weights: Vec<Weight> = (0..count)
            .map(|_| {
                let mut values = device.buffer::<bf16>(outputs * inputs).unwrap();
                let key = std::array::from_fn(|_| random.below(256) as u8);
                let from = Uniform { key, skip: 0, bound: 0.03, centre: 0.0 };
                draw.fill(&stream, &from, values.view_mut()).unwrap();
                Weight { values, bias: None, outputs, inputs }
            })
            .collect();
        let all: Vec<&Weight> = weights.iter().collect();
        let most = ROWS[ROWS.len() - 1];
        let mut x = device.buffer::<bf16>(most * inputs).unwrap();
        let from = Uniform { key: [9; 32], skip: 0, bound: 1.0, centre: 0.0 };
        draw.fill(&stream, &from, x.view_mut()).unwrap();
        let mut narrow = device.buffer::<bf16>(most * outputs).unwrap();
        let mut wide = device.buffer::<f32>(most * outputs).unwrap();
        for n in ROWS {
            let mut times = Vec::new();
            for kind in 0..3 {
                let mut turn = 0;
                let mut out = match kind {
                    0 => Product::Store(narrow.view_mut()),
                    1 => Product::Add(wide.view_mut()),
                    _ => Product::StoreWide(wide.view_mut()),
                };
                gemm.choose(&device, &stream, n, &all, x.view(), &mut out).unwrap();
                let us = median_us(&device, &stream, || {
                    turn += 1;
                    gemm.run(&stream, n, all[turn % all.len()], x.view(), &mut out)
                });
                times.push(us.unwrap());
            }
            let flops = 2.0 * (n * outputs * inputs) as f64;
            let bytes = 2.0 * (outputs * inputs + n * (outputs + inputs)) as f64;
            println!(
                "| {name} | {n} | {:.1} | {:.0} | {:.0} | {:.1} | {:.1} |",
                times[0],
                flops / times[0] * 1e-6,
                bytes / times[0] * 1e-3,
                times[1],
                times[2]
            );
        }
    }
}
