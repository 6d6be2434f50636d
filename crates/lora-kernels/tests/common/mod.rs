//! What the GPU tests share.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod layer;
pub mod lora_setup;

use lora_kernels::{CudaError, Device, DeviceBuffer, Element, Stream, bf16};
use rand::RngExt as _;
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;

/// The first device and a stream.
pub fn device() -> (Device, Stream) {
    let device = Device::open(0).expect("a device");
    let stream = device.stream().expect("a stream");
    stream.bind().expect("the device's context");
    (device, stream)
}

/// A generator of its own for each test and shape.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Values uniform in ± `bound`.
pub fn random(rng: &mut ChaCha8Rng, len: usize, bound: f32) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32(rng.random_range(-bound..bound))).collect()
}

/// `values` on the device.
pub fn upload<T: Element>(device: &Device, stream: &Stream, values: &[T]) -> DeviceBuffer<T> {
    let mut buffer = device.buffer(values.len()).expect("memory");
    if !values.is_empty() {
        buffer.view_mut().upload(stream, values).expect("a copy");
    }
    buffer
}

/// What is in `buffer`.
pub fn download<T: Element + Default>(stream: &Stream, buffer: &DeviceBuffer<T>) -> Vec<T> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.download(stream, &mut values).expect("a copy");
    values
}

/// A buffer of `len` NaNs: what a kernel leaves unwritten shows.
pub fn poisoned(device: &Device, stream: &Stream, len: usize) -> DeviceBuffer<bf16> {
    upload(device, stream, &vec![bf16::NAN; len])
}

/// ‖out − reference‖ / ‖reference‖, infinite where `out` is not finite.
pub fn error(out: &[bf16], reference: &[f64]) -> f64 {
    assert_eq!(out.len(), reference.len());
    if out.iter().any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let square = |v: f64| v * v;
    let off: f64 = out.iter().zip(reference).map(|(o, r)| square(o.to_f64() - r)).sum();
    (off / reference.iter().copied().map(square).sum::<f64>()).sqrt()
}

/// Median milliseconds of a launch: 20 runs of 8 after a warm-up. `launch` gets a running number to choose its
/// buffers by.
pub fn milliseconds(device: &Device, stream: &Stream, mut launch: impl FnMut(usize)) -> f64 {
    const RUN: usize = 8;
    (0..RUN).for_each(&mut launch);
    let mut times: Vec<f32> = (1..=20)
        .map(|run| {
            let (from, to) = (device.event(true).expect("an event"), device.event(true).expect("an event"));
            stream.record(&from).expect("recording");
            (run * RUN..(run + 1) * RUN).for_each(&mut launch);
            stream.record(&to).expect("recording");
            to.synchronize().expect("waiting");
            from.milliseconds_to(&to).expect("a time")
        })
        .collect();
    times.sort_by(f32::total_cmp);
    f64::from(times[times.len() / 2]) / RUN as f64
}

/// Random values of a fixed seed.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Even in ±`most`.
    pub fn f32(&mut self, most: f32) -> f32 {
        self.0.random_range(-most..most)
    }

    pub fn f32s(&mut self, len: usize, most: f32) -> Vec<f32> {
        (0..len).map(|_| self.f32(most)).collect()
    }

    pub fn bf16s(&mut self, len: usize, most: f32) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.f32(most))).collect()
    }

    /// From 0 to `end`, without it.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }
}

/// ‖out − reference‖ / ‖reference‖ of one row.
///
/// # Panics
/// If a value is not finite, the error is above `tolerance`, or one value is further off than ten times the
/// tolerance of the row's root mean square and than bf16 rounds it: `what` says which row this is.
pub fn check_row(what: &str, out: &[f64], reference: &[f64], tolerance: f64) -> f64 {
    assert_eq!(out.len(), reference.len(), "{what}");
    let norm = reference.iter().map(|r| r * r).sum::<f64>().sqrt();
    let error = out.iter().zip(reference).map(|(o, r)| (o - r).powi(2)).sum::<f64>().sqrt() / norm;
    let bound = 10.0 * tolerance * norm / (reference.len() as f64).sqrt();
    for (at, (o, r)) in out.iter().zip(reference).enumerate() {
        assert!(o.is_finite(), "{what}: element {at} is {o}, expected {r}");
        let bound = bound.max(r.abs() / 256.0);
        assert!(
            (o - r).abs() <= bound,
            "{what}: element {at} is {o}, expected {r} within {bound}; the row's error is {error:e}"
        );
    }
    assert!(error <= tolerance, "{what}: error {error:e} above {tolerance:e}");
    error
}

/// Bytes that the device's memory gives in a microsecond.
pub fn memory_rate(device: &Device, stream: &Stream) -> f64 {
    lora_kernels::read_bytes_s(device, stream).expect("a rate") * 1e-6
}

/// The median time of `work`, which puts work on the stream, in microseconds; after three rounds of warm-up.
pub fn median_us(
    device: &Device,
    stream: &Stream,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let (begin, end) = (device.event(true)?, device.event(true)?);
    let mut times = Vec::with_capacity(20);
    for round in 0..23 {
        stream.record(&begin)?;
        work()?;
        stream.record(&end)?;
        end.synchronize()?;
        if round >= 3 {
            times.push(f64::from(begin.milliseconds_to(&end)?) * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
