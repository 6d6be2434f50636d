//! Embedding, norms, activations and gathering, against the twins.

mod common;

use common::{Random, check_row, device, download, poisoned, upload};
use lora_kernels::twins::rows;
use lora_kernels::{CudaError, Device, DeviceBuffer, Elementwise, Stream, WIDEST_NORM, bf16};

/// A result is rounded to bf16 once.
const TOLERANCE: f64 = 5e-3;

/// Narrower than a warp takes, one group a thread, two, and blocks of 1024 threads.
const WIDTHS: [usize; 10] = [8, 40, 64, 768, 2048, 4096, 4104, 8192, 8200, WIDEST_NORM];

const ROWS: [usize; 3] = [1, 3, 129];

/// A row behind those of the batch, which a kernel must leave alone.
const GUARD: usize = 1;

fn poisoned_f32(device: &Device, stream: &Stream, len: usize) -> DeviceBuffer<f32> {
    upload(device, stream, &vec![f32::NAN; len])
}

/// Says which element differs in its bits, and whether the guard row was written.
fn same(what: &str, width: usize, got: &[f32], want: &[f32]) {
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let (row, column) = (at / width, at % width);
        assert!(
            got.to_bits() == want.to_bits(),
            "{what}: row {row}, column {column}: {got}, expected {want}"
        );
    }
    assert_eq!(got.len(), want.len() + GUARD * width, "{what}");
    assert!(got[want.len()..].iter().all(|v| v.is_nan()), "{what}: wrote past its rows");
}

/// Holds each row to the twin's within the tolerance, and the guard row to what it was.
fn near(what: &str, width: usize, got: &[bf16], want: &[f64]) {
    let wide: Vec<f64> = got[..want.len()].iter().map(|v| v.to_f64()).collect();
    for (row, (got, want)) in wide.chunks_exact(width).zip(want.chunks_exact(width)).enumerate() {
        check_row(&format!("{what}, row {row}"), got, want, TOLERANCE);
    }
    assert_eq!(got.len(), want.len() + GUARD * width, "{what}");
    assert!(got[want.len()..].iter().all(|v| v.is_nan()), "{what}: wrote past its rows");
}

/// The batch's shapes, each with values of its own.
fn shapes() -> impl Iterator<Item = (usize, usize, Random)> {
    WIDTHS
        .into_iter()
        .flat_map(|width| ROWS.map(|n| (n, width)))
        .map(|(n, width)| (n, width, Random::new((width * 1000 + n) as u64)))
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tables_are_read_by_token_and_by_position() -> Result<(), CudaError> {
    const VOCAB: usize = 97;
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    for (n, width, mut random) in shapes() {
        let case = format!("{n} rows of {width}");
        let table = random.bf16s(VOCAB * width, 2.0);
        let mut tokens: Vec<u32> = (0..n).map(|_| random.below(VOCAB) as u32).collect();
        tokens[0] = VOCAB as u32 - 1;
        if n > 2 {
            // Broken ids must not read elsewhere.
            (tokens[1], tokens[2]) = (VOCAB as u32, u32::MAX);
        }
        let on_device = upload(&device, &stream, &table);
        let ids = upload(&device, &stream, &tokens);
        let mut out = poisoned_f32(&device, &stream, (n + GUARD) * width);
        kernels.embed(&stream, n, width, ids.view(), on_device.view(), out.view_mut())?;
        let embedded = rows::embed(&tokens, &table, width);
        same(&format!("embed, {case}"), width, &download(&stream, &out), &embedded);

        // Learned positions begin at an offset of the table.
        const OFFSET: usize = 2;
        let mut positions: Vec<u32> = (0..n).map(|_| random.below(VOCAB - OFFSET) as u32).collect();
        positions[0] = (VOCAB - OFFSET) as u32 - 1;
        let on_device_positions = upload(&device, &stream, &positions);
        let (places, table_view) = (on_device_positions.view(), on_device.view());
        kernels.add_positions(&stream, n, width, OFFSET, places, table_view, out.view_mut())?;
        let mut want = embedded;
        rows::add_positions(&positions, OFFSET, &table, width, &mut want);
        let placed = download(&stream, &out);
        same(&format!("add_positions, {case}"), width, &placed, &want);

        let which: Vec<u32> = (0..n).map(|_| random.below(n) as u32).collect();
        let on_device_which = upload(&device, &stream, &which);
        let mut taken = poisoned_f32(&device, &stream, (n + GUARD) * width);
        kernels.gather(&stream, n, width, on_device_which.view(), out.view(), taken.view_mut())?;
        let want = rows::gather(&which, &want, width);
        same(&format!("gather, {case}"), width, &download(&stream, &taken), &want);
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn norms_of_rows_of_any_scale() -> Result<(), CudaError> {
    const EPS: f32 = 1e-5;
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    for (n, width, mut random) in shapes() {
        let case = format!("{n} rows of {width}");
        let mut x = random.f32s(n * width, 1.0);
        for (i, row) in x.chunks_exact_mut(width).enumerate() {
            // Rows off zero, large ones, and ones so small that eps counts.
            let (scale, centre) = [(1.0, 0.0), (3.0, 2.0), (1e4, 0.0), (3e-3, 0.0)][i % 4];
            row.iter_mut().for_each(|v| *v = *v * scale + centre);
            // One value far above the rest.
            row[width - 1] *= 30.0;
        }
        let (mut weight, bias) = (random.bf16s(width, 1.0), random.bf16s(width, 0.5));
        weight.iter_mut().for_each(|w| *w += bf16::ONE);
        let (on_device, w, b) = (
            upload(&device, &stream, &x),
            upload(&device, &stream, &weight),
            upload(&device, &stream, &bias),
        );

        let mut out = poisoned(&device, &stream, (n + GUARD) * width);
        kernels.rms_norm(&stream, n, EPS, w.view(), on_device.view(), out.view_mut())?;
        let want = rows::rms_norm(&x, &weight, EPS);
        near(&format!("rms_norm, {case}"), width, &download(&stream, &out), &want);

        let mut out = poisoned(&device, &stream, (n + GUARD) * width);
        kernels.layer_norm(&stream, n, EPS, w.view(), b.view(), on_device.view(), out.view_mut())?;
        let want = rows::layer_norm(&x, &weight, &bias, EPS);
        near(&format!("layer_norm, {case}"), width, &download(&stream, &out), &want);
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_norm_of_zeros_is_finite() -> Result<(), CudaError> {
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    let width = 4096;
    let mut random = Random::new(5);
    let (weight, bias) = (random.bf16s(width, 1.0), random.bf16s(width, 1.0));
    let x = device.buffer::<f32>(width)?;
    let (w, b) = (upload(&device, &stream, &weight), upload(&device, &stream, &bias));
    let mut out = poisoned(&device, &stream, width);
    kernels.rms_norm(&stream, 1, 1e-5, w.view(), x.view(), out.view_mut())?;
    assert!(download(&stream, &out).iter().all(|v| *v == bf16::ZERO), "rms_norm of zeros is not zero");
    kernels.layer_norm(&stream, 1, 1e-5, w.view(), b.view(), x.view(), out.view_mut())?;
    assert_eq!(download(&stream, &out), bias, "layer_norm of zeros is not the bias");
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn activations_of_every_size_of_value() -> Result<(), CudaError> {
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    for (n, width, mut random) in shapes().chain([(5, 11008, Random::new(11)), (2, 22016, Random::new(12))]) {
        let case = format!("{n} rows of {width}");
        let mut gate_up = random.bf16s(n * 2 * width, 4.0);
        // exp(−gate) overflows from −89 down, and vanishes beside 1 at the other end.
        let ends = [-1e4f32, -200.0, -89.0, -88.0, 0.0, 88.0, 200.0, 1e4].map(bf16::from_f32);
        if n > 1 {
            gate_up[2 * width..][..ends.len()].copy_from_slice(&ends);
        }
        let on_device = upload(&device, &stream, &gate_up);
        let mut out = poisoned(&device, &stream, (n + GUARD) * width);
        kernels.silu_mul(&stream, n, width, on_device.view(), out.view_mut())?;
        let got = download(&stream, &out);
        let want = rows::silu_mul(&gate_up, width);
        near(&format!("silu_mul, {case}"), width, &got, &want);
        if n > 1 {
            // Beside values of thousands, the error of the row does not show what small gates give.
            for i in 0..ends.len() {
                let (got, want) = (got[width + i].to_f64(), want[width + i]);
                let off = (got - want).abs();
                assert!(off <= 1e-2 * want.abs() + 1e-30, "silu_mul of {}: {got}, expected {want}", ends[i]);
            }
        }

        let mut x = random.bf16s((n + GUARD) * width, 3.0);
        x[0] = bf16::NEG_ZERO;
        let mut on_device = upload(&device, &stream, &x);
        kernels.relu(&stream, n, width, on_device.view_mut())?;
        rows::relu(&mut x[..n * width]);
        for (at, (got, want)) in download(&stream, &on_device).iter().zip(&x).enumerate() {
            let (row, column) = (at / width, at % width);
            assert!(got == want, "relu, {case}: row {row}, column {column}: {got}, expected {want}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn shapes_that_do_not_fit_are_refused() -> Result<(), CudaError> {
    let (device, stream) = device();
    let kernels = Elementwise::load(&device)?;
    let x = device.buffer::<f32>(4 * 64)?;
    let (mut narrow, mut wide) = (device.buffer::<bf16>(4 * 64)?, device.buffer::<f32>(4 * 64)?);
    let ids = device.buffer::<u32>(4)?;
    let refused = |done: Result<(), CudaError>, says: &str| {
        let said = done.expect_err(says).to_string();
        assert!(said.contains(says), "{said}");
    };
    let w = narrow.view().slice(0..60);
    refused(kernels.rms_norm(&stream, 1, 1e-5, w, x.view(), device.buffer(64)?.view_mut()), "60");
    let w = device.buffer::<bf16>(64)?;
    refused(kernels.rms_norm(&stream, 5, 1e-5, w.view(), x.view(), narrow.view_mut()), "5 rows of 64");
    let b = w.view().slice(0..32);
    refused(kernels.layer_norm(&stream, 4, 1e-5, w.view(), b, x.view(), narrow.view_mut()), "32 biases");
    let long = device.buffer::<bf16>(WIDEST_NORM + 8)?;
    refused(kernels.rms_norm(&stream, 0, 1e-5, long.view(), x.view(), narrow.view_mut()), "16384 at most");
    refused(kernels.relu(&stream, 5, 64, narrow.view_mut()), "5 rows of 64");
    refused(kernels.gather(&stream, 5, 64, ids.view(), x.view(), wide.view_mut()), "5 rows of 64");
    refused(kernels.embed(&stream, 5, 64, ids.view(), long.view(), wide.view_mut()), "5 rows of 64");
    refused(kernels.silu_mul(&stream, 4, 64, w.view(), narrow.view_mut()), "4 rows of 64");
    Ok(())
}
