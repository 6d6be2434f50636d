//! Products of a few rows, against the twin.

mod common;

use common::layer::Layer;
use common::{Random, device, download, poisoned, upload};
use lora_kernels::{CudaError, Device, DeviceBuffer, Elementwise, GemmSmall, Product, Stream, Weight, bf16};

/// Scratch memory for every shape here: NaNs, which a sum that nobody left would show.
fn scratch(device: &Device, stream: &Stream) -> DeviceBuffer<f32> {
    upload(device, stream, &vec![f32::NAN; 4 << 20])
}

/// Every form of a shape, for each of `ns` rows.
fn check(
    gemm: &mut GemmSmall,
    (device, stream): (&Device, &Stream),
    ns: &[usize],
    (outputs, inputs): (usize, usize),
    seed: u64,
) -> Result<(), CudaError> {
    let most = ns.iter().copied().max().expect("rows");
    let layer = Layer::new(device, stream, (most, outputs, inputs), seed.is_multiple_of(2), seed);
    for &n in ns {
        let forms = gemm.forms(n, outputs, inputs);
        assert!(forms.len() >= 2, "{n} rows, {outputs} outputs, {inputs} inputs: {forms:?}");
        for form in forms {
            let mut scratch = scratch(device, stream);
            println!("{n} rows, {outputs} outputs, {inputs} inputs: {form:?} {}", form.name());
            layer.check(device, stream, n, |weight, x, out| {
                gemm.run(stream, form, n, weight, x, out, scratch.view_mut())
            })?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_of_every_kind_in_ragged_layers() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    let ns = [1, 2, 3, 8, 9, 13, 16, 17, 24, 32];
    let shapes = [
        (64, 64),
        (8, 8),
        (1, 8),
        (72, 136),
        (100, 1000),
        (1057, 72),
        (520, 2056),
        (2304, 768),
        (768, 4104),
        (33, 22_016),
        (1100, 8200),
    ];
    for (seed, shape) in shapes.into_iter().enumerate() {
        check(&mut gemm, (&device, &stream), &ns, shape, seed as u64)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_layers_of_models() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    let shapes =
        [(4096, 4096), (12_288, 4096), (4096, 11_008), (22_016, 4096), (32_001, 4096), (4096, 14_336)];
    for (seed, shape) in shapes.into_iter().enumerate() {
        check(&mut gemm, (&device, &stream), &[3, 16, 24], shape, 100 + seed as u64)?;
    }
    Ok(())
}

/// Launches that begin while the one before ends: each reads what that wrote, in the same two buffers.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_that_follow_one_another_give_the_same_bits_every_time() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    let mut random = Random::new(1);
    // One slice, and three.
    for width in [2048usize, 6144] {
        let weights: Vec<Weight> = (0..3)
            .map(|_| {
                let values = random.bf16s(width * width, (3.0 / width as f32).sqrt());
                Weight {
                    values: upload(&device, &stream, &values),
                    bias: None,
                    outputs: width,
                    inputs: width,
                }
            })
            .collect();
        for n in [5, 16, 32] {
            let start = random.bf16s(n * width, 1.0);
            for form in gemm.forms(n, width, width) {
                let mut scratch = scratch(&device, &stream);
                let (mut a, mut b) = (device.buffer::<bf16>(n * width)?, device.buffer::<bf16>(n * width)?);
                let begin = upload(&device, &stream, &start);
                let mut chain = |stream: &Stream| {
                    stream.copy(begin.view(), a.view_mut())?;
                    for i in 0..24 {
                        let (x, out) = if i % 2 == 0 { (&a, &mut b) } else { (&b, &mut a) };
                        let out = &mut Product::Store(out.view_mut());
                        let weight = &weights[i % weights.len()];
                        gemm.run(stream, form, n, weight, x.view(), out, scratch.view_mut())?;
                    }
                    Ok::<_, CudaError>(())
                };
                chain(&stream.without_overlap())?;
                let mut graph = stream.capture(|| chain(&stream))?;
                let want = download(&stream, &a);
                assert!(want.iter().all(|v| v.is_finite()) && want.iter().any(|v| v.to_f32() != 0.0));
                for run in 0..20 {
                    graph.launch()?;
                    let got = download(&stream, &a);
                    let wrong = got.iter().zip(&want).position(|(g, w)| g.to_bits() != w.to_bits());
                    if let Some(at) = wrong {
                        panic!(
                            "{}, {n} rows of {width}, run {run}: row {}, column {} is {} instead of {}",
                            form.name(),
                            at / width,
                            at % width,
                            got[at],
                            want[at]
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn silu_of_gate_and_up_has_the_bits_of_a_kernel_of_its_own() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    let elementwise = Elementwise::load(&device)?;
    let mut random = Random::new(3);
    // Fewer tiles than blocks, ragged inputs, several slices, Llama-2-7B.
    for (width, inputs) in [(8, 64), (520, 1000), (136, 9000), (11_008, 4096)] {
        let outputs = 2 * width;
        let values = random.bf16s(outputs * inputs, (6.0 / inputs as f32).sqrt());
        let weight = Weight { values: upload(&device, &stream, &values), bias: None, outputs, inputs };
        for n in [1, 3, 8, 9, 16, 17, 32] {
            let x = upload(&device, &stream, &random.bf16s(n * inputs, 1.0));
            for form in gemm.forms(n, outputs, inputs) {
                let mut scratch = scratch(&device, &stream);
                let mut stored = device.buffer::<bf16>(n * outputs)?;
                let mut out = Product::Store(stored.view_mut());
                gemm.run(&stream, form, n, &weight, x.view(), &mut out, scratch.view_mut())?;
                let mut want = device.buffer::<bf16>(n * width)?;
                elementwise.silu_mul(&stream, n, width, stored.view(), want.view_mut())?;
                let mut act = poisoned(&device, &stream, n * width);
                let mut out = Product::SiluMul(act.view_mut());
                gemm.run(&stream, form, n, &weight, x.view(), &mut out, scratch.view_mut())?;
                let (got, want) = (download(&stream, &act), download(&stream, &want));
                let wrong = got.iter().zip(&want).position(|(g, w)| g.to_bits() != w.to_bits());
                if let Some(at) = wrong {
                    let (row, column, form) = (at / width, at % width, form.name());
                    panic!(
                        "{form}, {n} rows of {inputs} to {width}: row {row}, column {column} is {} instead of {}",
                        got[at], want[at]
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_form_is_for_its_shape_and_scratch_memory_must_do() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = GemmSmall::load(&device)?;
    assert!(gemm.forms(33, 64, 64).is_empty() && gemm.forms(4, 64, 68).is_empty());
    let layer = Layer::new(&device, &stream, (4, 64, 8192), false, 1);
    let x = upload(&device, &stream, &layer.x);
    let mut out = device.buffer::<f32>(4 * 64)?;
    let mut short = device.buffer::<f32>(8)?;
    let form = gemm.forms(4, 64, 8192)[0];
    let mut refused = |form, said: &str| {
        let out = &mut Product::Add(out.view_mut());
        let error = gemm.run(&stream, form, 4, &layer.weight, x.view(), out, short.view_mut());
        let error = error.expect_err("it cannot run").to_string();
        assert!(error.contains(said), "{error}");
    };
    refused(form, "elements of scratch memory");
    let other = GemmSmall::load(&device)?.forms(4, 64, 4096)[0];
    refused(other, "is not for 4 rows");
    Ok(())
}
