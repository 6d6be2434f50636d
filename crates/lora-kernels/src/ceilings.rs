//! What a device can do at best, measured: what floors are computed from.

use std::time::Duration;

use crate::module::{Grid, Module, arguments};
use crate::{CudaError, Device, Draw, Event, Gemm, Product, Stream, Uniform, Weight, bf16};

/// Bytes that are read, or copied, at a time.
const READ_BYTES: usize = 4 << 30;
const COPY_BYTES: usize = 80 << 20;
const RUNS: usize = 10;
/// Seconds of products before the sustained rate is measured, and while it is.
const SETTLING_S: f64 = 0.5;
const SUSTAINED_S: f64 = 1.0;
/// Sides of the square product.
const SQUARE: usize = 8192;
/// Rest before products that are timed from idle, and how often they are.
const REST: Duration = Duration::from_millis(100);
const IDLE_RUNS: usize = 5;
/// How many products the points of [`Ceilings::gemm_from_idle`] are of: close together where the clock begins to fall.
const BURST: [usize; 16] = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128];
/// Points of [`Ceilings::gemm_from_idle`].
pub const BURSTS: usize = BURST.len();

/// How long products take that begin on an idle device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Burst {
    /// Their operations.
    pub operations: f64,
    /// Until the last has ended.
    pub seconds: f64,
}

/// Rates of one device, the best of several runs each but for the sustained one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// One bf16 product of 8192 × 8192 matrices, operations a second, on a device that has done little before.
    pub gemm_flops: f64,
    /// The same products one after another for a second and a half: what the device's power and cooling bear.
    pub gemm_sustained_flops: f64,
    /// One such product, two and more, up to 128, one after another on a device that has done nothing for 100 ms: its
    /// clock falls within tens of milliseconds. The shortest of several runs each.
    pub gemm_from_idle: [Burst; BURSTS],
    /// Device memory read, bytes a second.
    pub read_bytes_s: f64,
    /// Page-locked host memory to the device, bytes a second.
    pub pinned_bytes_s: f64,
    /// Ordinary host memory to the device, bytes a second.
    pub pageable_bytes_s: f64,
}

/// Measures them. Takes up to 4 GiB of free device memory for a few seconds.
///
/// # Errors
/// If memory is short or the device fails.
pub fn ceilings(device: &Device) -> Result<Ceilings, CudaError> {
    let stream = device.stream()?;
    let (gemm_flops, gemm_from_idle, gemm_sustained_flops) = gemm(device, &stream)?;
    Ok(Ceilings {
        gemm_flops,
        gemm_sustained_flops,
        gemm_from_idle,
        read_bytes_s: read_bytes_s(device, &stream)?,
        pinned_bytes_s: copy(device, &stream, &device.pinned::<u32>(COPY_BYTES / 4)?)?,
        pageable_bytes_s: copy(device, &stream, &vec![1u32; COPY_BYTES / 4])?,
    })
}

/// The shortest of several runs of `work`, in seconds.
fn shortest(
    device: &Device,
    stream: &Stream,
    mut work: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    let (begin, end) = (device.event(true)?, device.event(true)?);
    work()?;
    let mut best = f32::INFINITY;
    for _ in 0..RUNS {
        stream.record(&begin)?;
        work()?;
        stream.record(&end)?;
        end.synchronize()?;
        best = best.min(begin.milliseconds_to(&end)?);
    }
    Ok(f64::from(best) * 1e-3)
}

fn gemm(device: &Device, stream: &Stream) -> Result<(f64, [Burst; BURSTS], f64), CudaError> {
    let draw = Draw::load(device)?;
    let from = |byte| Uniform { key: [byte; 32], skip: 0, bound: 1.0, centre: 0.0 };
    let mut values = device.buffer::<bf16>(SQUARE * SQUARE)?;
    draw.fill(stream, &from(1), values.view_mut())?;
    let mut x = device.buffer::<bf16>(SQUARE * SQUARE)?;
    draw.fill(stream, &from(2), x.view_mut())?;
    let mut out = device.buffer::<bf16>(SQUARE * SQUARE)?;
    let weight = Weight { values, bias: None, outputs: SQUARE, inputs: SQUARE };
    let mut gemm = Gemm::new(device)?;
    gemm.choose(device, stream, SQUARE, &[&weight], x.view(), &mut Product::Store(out.view_mut()))?;
    let mut product = || gemm.run(stream, SQUARE, &weight, x.view(), &mut Product::Store(out.view_mut()));
    let seconds = shortest(device, stream, &mut product)?;
    let flops = 2.0 * (SQUARE as f64).powi(3);
    let bursts = from_idle(device, stream, flops, &mut product)?;
    let (begin, end) = (device.event(true)?, device.event(true)?);
    let times = |of: f64| (of / seconds).ceil() as usize;
    (0..times(SETTLING_S)).try_for_each(|_| product())?;
    stream.record(&begin)?;
    (0..times(SUSTAINED_S)).try_for_each(|_| product())?;
    stream.record(&end)?;
    end.synchronize()?;
    let sustained = f64::from(begin.milliseconds_to(&end)?) * 1e-3 / times(SUSTAINED_S) as f64;
    Ok((flops / seconds, bursts, flops / sustained))
}

/// Times of 1, 2 and more times `product`, of `flops` operations, from idle.
fn from_idle(
    device: &Device,
    stream: &Stream,
    flops: f64,
    mut product: impl FnMut() -> Result<(), CudaError>,
) -> Result<[Burst; BURSTS], CudaError> {
    let begin = device.event(true)?;
    let ends: Vec<Event> = (0..BURSTS).map(|_| device.event(true)).collect::<Result<_, _>>()?;
    let mut bursts = std::array::from_fn(|burst| Burst {
        operations: flops * BURST[burst] as f64,
        seconds: f64::INFINITY,
    });
    for _ in 0..IDLE_RUNS {
        stream.synchronize()?;
        std::thread::sleep(REST);
        stream.record(&begin)?;
        let mut done = 0;
        for (count, end) in BURST.into_iter().zip(&ends) {
            (done..count).try_for_each(|_| product())?;
            done = count;
            stream.record(end)?;
        }
        stream.synchronize()?;
        for (burst, end) in bursts.iter_mut().zip(&ends) {
            burst.seconds = burst.seconds.min(f64::from(begin.milliseconds_to(end)?) * 1e-3);
        }
    }
    Ok(bursts)
}

/// [`Ceilings::read_bytes_s`] alone. Takes up to 4 GiB of free device memory for some milliseconds.
///
/// # Errors
/// If memory is short or the device fails.
pub fn read_bytes_s(device: &Device, stream: &Stream) -> Result<f64, CudaError> {
    const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ceilings.fatbin"));
    let function = Module::load(device.context(), IMAGE)?.function("read_all")?;
    let (free, _) = device.memory()?;
    let bytes = READ_BYTES.min(free as usize / 2) / 16 * 16;
    let memory = device.buffer::<u8>(bytes)?;
    let blocks = device.info().multiprocessors * 8;
    let mut sink = device.buffer::<u32>(blocks as usize)?;
    let (from, count, to) = (memory.view().address(), (bytes / 16) as u64, sink.view_mut().address());
    let seconds = shortest(device, stream, || {
        // SAFETY: the kernel's parameters; it reads `count` words and writes one a block.
        unsafe { stream.launch(&function, Grid::new((blocks, 1, 1), 512), arguments![from, count, to]) }
    })?;
    Ok(bytes as f64 / seconds)
}

fn copy(device: &Device, stream: &Stream, from: &[u32]) -> Result<f64, CudaError> {
    let mut to = device.buffer::<u32>(from.len())?;
    let seconds = shortest(device, stream, || {
        // SAFETY: `shortest` waits for every copy while `from` is borrowed.
        unsafe { stream.copy_in(from, to.view_mut()) }
    })?;
    Ok(size_of_val(from) as f64 / seconds)
}
