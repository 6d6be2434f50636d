//! What a device can do at best.

use serde::{Deserialize, Serialize};

/// How long work takes that begins on an idle device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Burst {
    /// Its operations.
    pub operations: f64,
    /// Until it is done.
    pub seconds: f64,
}

/// Points of [`Ceilings::gemm_from_idle`].
pub const BURSTS: usize = 16;

/// Rates of a device, the best that it was seen to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// One large matrix product, operations a second.
    pub gemm_flops: f64,
    /// Large matrix products one after another, as power and cooling bear them; none where it was not measured.
    pub gemm_sustained_flops: Option<f64>,
    /// More and more large matrix products one after another from idle, the least time of each number: a device that has
    /// rested begins at a clock that it does not keep. None where it was not measured.
    #[serde(default)]
    pub gemm_from_idle: Option<[Burst; BURSTS]>,
    /// Device memory read, bytes a second.
    pub read_bytes_s: f64,
    /// Page-locked host memory to the device, bytes a second.
    pub pinned_bytes_s: f64,
    /// Ordinary host memory to the device, bytes a second.
    pub pageable_bytes_s: f64,
}

impl Ceilings {
    /// The most products from idle that took up to `seconds`.
    pub fn from_idle_within(&self, seconds: f64) -> Option<Burst> {
        self.gemm_from_idle.as_ref()?.iter().rev().find(|burst| burst.seconds <= seconds).copied()
    }

    /// Seconds in which large products that begin on an idle device do `operations`: between the measured points in
    /// proportion, beyond the last at the rate since the one before. None where it was not measured.
    pub fn from_idle_s(&self, operations: f64) -> Option<f64> {
        let points = self.gemm_from_idle.as_ref()?;
        let nothing = Burst { operations: 0.0, seconds: 0.0 };
        let ends = std::iter::once(&nothing).chain(points);
        let (from, to) = ends.zip(points).find(|(_, to)| to.operations >= operations).unwrap_or_else(|| {
            let [.., from, to] = points;
            (from, to)
        });
        let share = (operations - from.operations) / (to.operations - from.operations);
        Some(from.seconds + share * (to.seconds - from.seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_from_idle_takes_what_was_measured_and_between_and_beyond_in_proportion() {
        // A rate of 4 at first, of 2 later.
        let points = std::array::from_fn(|i| {
            let operations = (i + 1) as f64;
            Burst { operations, seconds: 0.25 + (operations - 1.0) * 0.5 }
        });
        let ceilings = Ceilings {
            gemm_flops: 4.0,
            gemm_sustained_flops: Some(2.0),
            gemm_from_idle: Some(points),
            read_bytes_s: 1.0,
            pinned_bytes_s: 1.0,
            pageable_bytes_s: 1.0,
        };
        for (operations, seconds) in [(0.5, 0.125), (1.0, 0.25), (2.5, 1.0), (16.0, 7.75), (200.0, 99.75)] {
            assert_eq!(ceilings.from_idle_s(operations), Some(seconds), "{operations} operations");
        }
        let within = |seconds| ceilings.from_idle_within(seconds).map(|burst| burst.operations);
        assert_eq!([0.2, 0.25, 1.3, 99.0].map(within), [None, Some(1.0), Some(3.0), Some(16.0)]);
        assert_eq!(Ceilings { gemm_from_idle: None, ..ceilings }.from_idle_s(1.0), None);
    }
}
