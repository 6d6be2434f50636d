//! Linear layers by cuBLASLt, against the twin.

mod common;

use common::{Random, check_row, device, download, poisoned, upload};
use lora_kernels::twins::gemm::product;
use lora_kernels::{CudaError, Device, Gemm, Product, Stream, Weight, bf16};

/// Rounded to bf16 once.
const NARROW: f64 = 5e-3;
/// Summed in f32.
const WIDE: f64 = 1e-4;

/// A layer, inputs for it, and what must come out.
struct Layer {
    name: String,
    weight: Weight,
    /// `[most, inputs]`
    x: Vec<bf16>,
    most: usize,
    /// `[most, outputs]`
    want: Vec<f64>,
}

impl Layer {
    fn new(
        device: &Device,
        stream: &Stream,
        (most, outputs, inputs): (usize, usize, usize),
        biased: bool,
        seed: u64,
    ) -> Self {
        let mut random = Random::new(seed);
        let values = random.bf16s(outputs * inputs, 0.1);
        let x = random.bf16s(most * inputs, 1.0);
        let bias = biased.then(|| random.bf16s(outputs, 1.0));
        let want = product(&x, &values, bias.as_deref(), inputs);
        let bias = bias.map(|bias| {
            let wide: Vec<f32> = bias.iter().map(|b| b.to_f32()).collect();
            (upload(device, stream, &bias), upload(device, stream, &wide))
        });
        let weight = Weight { values: upload(device, stream, &values), bias, outputs, inputs };
        let name =
            format!("{outputs} outputs of {inputs} inputs, {}", if biased { "biased" } else { "plain" });
        Self { name, weight, x, most, want }
    }

    /// All three products of the first `n` rows; the row behind them stays as it was.
    fn check(&self, device: &Device, stream: &Stream, gemm: &mut Gemm, n: usize) -> Result<(), CudaError> {
        assert!(n <= self.most);
        let Weight { outputs, inputs, .. } = self.weight;
        let x = upload(device, stream, &self.x[..n * inputs]);
        let want = &self.want[..n * outputs];
        let len = (n + 1) * outputs;
        let hold = |kind: &str, got: &[f64], want: &[f64], tolerance: f64| {
            let what = format!("{kind}, {n} rows, {}", self.name);
            assert!(got[n * outputs..].iter().all(|v| v.is_nan()), "{what}: wrote past its rows");
            for (row, (got, want)) in got.chunks_exact(outputs).zip(want.chunks_exact(outputs)).enumerate() {
                check_row(&format!("{what}, row {row}"), got, want, tolerance);
            }
        };

        let mut out = poisoned(device, stream, len);
        gemm.run(stream, n, &self.weight, x.view(), &mut Product::Store(out.view_mut()))?;
        let got: Vec<f64> = download(stream, &out).iter().map(|v| v.to_f64()).collect();
        hold("Store", &got, want, NARROW);

        let mut out = upload(device, stream, &vec![f32::NAN; len]);
        gemm.run(stream, n, &self.weight, x.view(), &mut Product::StoreWide(out.view_mut()))?;
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        hold("StoreWide", &wide(download(stream, &out)), want, WIDE);

        let mut residual = Random::new(n as u64).f32s(n * outputs, 2.0);
        let sums: Vec<f64> = residual.iter().zip(want).map(|(&r, w)| f64::from(r) + w).collect();
        residual.resize(len, f32::NAN);
        let mut out = upload(device, stream, &residual);
        gemm.run(stream, n, &self.weight, x.view(), &mut Product::Add(out.view_mut()))?;
        hold("Add", &wide(download(stream, &out)), &sums, WIDE);
        Ok(())
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_number_of_rows_up_to_130() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = Gemm::new(&device)?;
    for (seed, biased) in [(1, false), (2, true)] {
        let layer = Layer::new(&device, &stream, (130, 384, 520), biased, seed);
        for n in 1..=130 {
            layer.check(&device, &stream, &mut gemm, n)?;
        }
    }
    Ok(())
}

/// Narrow, wide, deep and the models' own; what a shape was chosen for gives the same as what was suggested.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn layers_of_other_shapes_with_and_without_a_chosen_algorithm() -> Result<(), CudaError> {
    let (device, stream) = device();
    let shapes = [
        (17, 8, 8),
        (64, 64, 4096),
        (16, 2304, 768),
        (33, 50_272, 768),
        (16, 4096, 11_008),
        (16, 12_288, 4096),
        (3, 32_000, 4096),
    ];
    for (seed, (most, outputs, inputs)) in shapes.into_iter().enumerate() {
        for biased in [false, true] {
            let layer = Layer::new(&device, &stream, (most, outputs, inputs), biased, 10 + seed as u64);
            let mut suggested = Gemm::new(&device)?;
            let mut chosen = Gemm::new(&device)?;
            for n in [1, most] {
                layer.check(&device, &stream, &mut suggested, n)?;
                let x = upload(&device, &stream, &layer.x[..n * inputs]);
                let mut narrow = device.buffer::<bf16>(n * outputs)?;
                let mut wide = device.buffer::<f32>(n * outputs)?;
                let weights = [&layer.weight];
                let mut choose =
                    |out: &mut Product<'_>| chosen.choose(&device, &stream, n, &weights, x.view(), out);
                choose(&mut Product::Store(narrow.view_mut()))?;
                choose(&mut Product::StoreWide(wide.view_mut()))?;
                choose(&mut Product::Add(wide.view_mut()))?;
                layer.check(&device, &stream, &mut chosen, n)?;
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_product_does_not_write_past_a_buffer() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = Gemm::new(&device)?;
    let layer = Layer::new(&device, &stream, (4, 64, 64), false, 1);
    let x = upload(&device, &stream, &layer.x);
    let mut out = device.buffer::<bf16>(4 * 64)?;
    let mut refused = |n, x, out: &mut Product<'_>| {
        let said = gemm.run(&stream, n, &layer.weight, x, out).expect_err("it does not fit").to_string();
        assert!(said.contains(&format!("{n} rows of 64")), "{said}");
    };
    refused(5, x.view(), &mut Product::Store(device.buffer(5 * 64)?.view_mut()));
    refused(4, x.view(), &mut Product::Store(out.view_mut().slice(0..3 * 64)));
    Ok(())
}
