//! The one monotonic clock of an engine, readable from every thread.

use std::time::Instant;

use lora_sched::Nanos;

use super::executor::Executor;

/// Nanoseconds on an executor's clock, without the executor at hand.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
    /// What the executor's clock said at `origin`.
    base: Nanos,
}

impl Clock {
    /// A clock that begins now.
    pub fn start() -> Self {
        Self { origin: Instant::now(), base: 0 }
    }

    /// The executor's clock. Both are monotonic clocks of the same machine, so the offset between them
    /// is constant; it is read several times and the reading taken that took least.
    pub fn of(executor: &dyn Executor) -> Self {
        let read = || {
            let origin = Instant::now();
            let base = executor.clock();
            (origin.elapsed(), origin, base)
        };
        let (took, origin, base) = (0..15).fold(read(), |best, _| best.min(read()));
        Self { origin: origin + took / 2, base }
    }

    /// Now.
    pub fn now(&self) -> Nanos {
        self.at(Instant::now())
    }

    /// The time of an instant; instants before the clock began are its beginning.
    pub fn at(&self, instant: Instant) -> Nanos {
        let since = instant.saturating_duration_since(self.origin).as_nanos();
        self.base + Nanos::try_from(since).unwrap_or(Nanos::MAX / 2)
    }
}
