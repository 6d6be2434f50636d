//! Where the time of a step goes that is launched kernel by kernel: events between its operations, summed by
//! kind and logged. Asked for by `LORA_HBM_LOG=lora_hbm::engine::cuda::timeline=trace`; the events themselves cost
//! a microsecond or two each, and kernels do not overlap across them. What is not marked (positions added, rows gathered)
//! counts with the operation after it, and a wait for an adapter that is being copied with the operation that reads it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use lora_kernels::{CudaError, Device, Event, Stream};

/// What an operation was: its name and the width of its output, which tells a layer's products apart.
type Kind = (&'static str, usize);

/// The operations of one step.
pub(super) struct Timeline {
    events: Vec<Event>,
    kinds: Vec<Kind>,
    /// When the step's submission began, while it is watched.
    begun: Option<Instant>,
    rows: usize,
    submission_us: f64,
}

impl Timeline {
    pub fn new() -> Self {
        Self { events: Vec::new(), kinds: Vec::new(), begun: None, rows: 0, submission_us: 0.0 }
    }

    /// A step of `rows` rows begins. It is watched if the log wants it.
    pub fn begin(&mut self, device: &Device, stream: &Stream, rows: usize) -> Result<(), CudaError> {
        self.kinds.clear();
        self.rows = rows;
        self.begun = tracing::enabled!(tracing::Level::TRACE).then(Instant::now);
        self.mark(device, stream, ("", 0))
    }

    /// An operation of `kind` has been submitted.
    pub fn mark(&mut self, device: &Device, stream: &Stream, kind: Kind) -> Result<(), CudaError> {
        if self.begun.is_none() {
            return Ok(());
        }
        if self.events.len() == self.kinds.len() {
            self.events.push(device.event(true)?);
        }
        stream.record(&self.events[self.kinds.len()])?;
        self.kinds.push(kind);
        Ok(())
    }

    /// All has been submitted.
    pub fn submitted(&mut self) {
        if let Some(begun) = self.begun.take() {
            self.submission_us = begun.elapsed().as_secs_f64() * 1e6;
        }
    }

    /// Logs a step that is over.
    pub fn log(&mut self) -> Result<(), CudaError> {
        let [_, .., _] = self.kinds[..] else { return Ok(()) };
        let mut sums: BTreeMap<Kind, (f32, usize)> = BTreeMap::new();
        let mut all = 0.0;
        for (at, kind) in self.kinds.iter().enumerate().skip(1) {
            let ms = self.events[at - 1].milliseconds_to(&self.events[at])?;
            let (sum, count) = sums.entry(*kind).or_default();
            (*sum, *count) = (*sum + ms, *count + 1);
            all += ms;
        }
        let mut said = String::new();
        for ((name, width), (ms, count)) in sums {
            let _ = write!(said, "; {name} {width}: {ms:.3} ms in {count}");
        }
        tracing::trace!("{} rows: {all:.3} ms, submitted in {:.0} µs{said}", self.rows, self.submission_us);
        self.kinds.clear();
        Ok(())
    }
}
