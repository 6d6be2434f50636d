//! A linear layer with inputs for it and what must come out.

use lora_kernels::twins::gemm::product;
use lora_kernels::{CudaError, Device, Product, Stream, View, Weight, bf16};

use super::{Random, check_row, download, poisoned, upload};

/// Rounded to bf16 once.
const NARROW: f64 = 5e-3;
/// Summed in f32.
const WIDE: f64 = 1e-4;

/// A layer, inputs for it, and what must come out.
pub struct Layer {
    name: String,
    pub weight: Weight,
    /// `[most, inputs]`
    pub x: Vec<bf16>,
    most: usize,
    /// `[most, outputs]`
    want: Vec<f64>,
}

impl Layer {
    pub fn new(
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

    /// All three products of the first `n` rows, as `run` computes them; the row behind them stays as it was,
    /// and that of `x` is not read.
    pub fn check(
        &self,
        device: &Device,
        stream: &Stream,
        n: usize,
        mut run: impl FnMut(&Weight, View<'_, bf16>, &mut Product<'_>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        assert!(n <= self.most);
        let Weight { outputs, inputs, .. } = self.weight;
        let mut x = self.x[..n * inputs].to_vec();
        x.resize((n + 1) * inputs, bf16::NAN);
        let x = upload(device, stream, &x);
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
        run(&self.weight, x.view(), &mut Product::Store(out.view_mut()))?;
        let got: Vec<f64> = download(stream, &out).iter().map(|v| v.to_f64()).collect();
        hold("Store", &got, want, NARROW);

        let mut out = upload(device, stream, &vec![f32::NAN; len]);
        run(&self.weight, x.view(), &mut Product::StoreWide(out.view_mut()))?;
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        hold("StoreWide", &wide(download(stream, &out)), want, WIDE);

        let mut residual = Random::new(n as u64).f32s(n * outputs, 2.0);
        let sums: Vec<f64> = residual.iter().zip(want).map(|(&r, w)| f64::from(r) + w).collect();
        residual.resize(len, f32::NAN);
        let mut out = upload(device, stream, &residual);
        run(&self.weight, x.view(), &mut Product::Add(out.view_mut()))?;
        hold("Add", &wide(download(stream, &out)), &sums, WIDE);
        Ok(())
    }
}
