//! Linear layers by cuBLASLt, against the twin.

mod common;

use common::layer::Layer;
use common::{device, upload};
use lora_kernels::{CudaError, Gemm, Product, bf16};

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_number_of_rows_up_to_130() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut gemm = Gemm::new(&device)?;
    for (seed, biased) in [(1, false), (2, true)] {
        let layer = Layer::new(&device, &stream, (130, 384, 520), biased, seed);
        for n in 1..=130 {
            layer.check(&device, &stream, n, |weight, x, out| gemm.run(&stream, n, weight, x, out))?;
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
                layer.check(&device, &stream, n, |w, x, out| suggested.run(&stream, n, w, x, out))?;
                let x = upload(&device, &stream, &layer.x[..n * inputs]);
                let mut narrow = device.buffer::<bf16>(n * outputs)?;
                let mut wide = device.buffer::<f32>(n * outputs)?;
                let weights = [&layer.weight];
                let mut choose =
                    |out: &mut Product<'_>| chosen.choose(&device, &stream, n, &weights, x.view(), out);
                choose(&mut Product::Store(narrow.view_mut()))?;
                choose(&mut Product::StoreWide(wide.view_mut()))?;
                choose(&mut Product::Add(wide.view_mut()))?;
                layer.check(&device, &stream, n, |w, x, out| chosen.run(&stream, n, w, x, out))?;
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
