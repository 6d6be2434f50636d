//! What stands where the engine has an executor.

use lora_sched::{AdapterId, FetchPlan, Nanos, SlotId, StepPlan, SwapPlan};

/// Something that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Done {
    /// The step in flight. First, so that at one instant a step ends before a swap does.
    Step,
    /// The copy into a slot.
    Swap(SlotId),
    /// A read from disk.
    Fetch {
        /// The adapter.
        adapter: AdapterId,
        /// Whether it could not be read.
        failed: bool,
    },
}

/// Equal steps that a device has run through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Steps that have ended.
    pub steps: u64,
    /// When the one now in flight was formed.
    pub formed: Nanos,
    /// Sum of the ended steps' durations.
    pub busy: Nanos,
}

/// Durations of submitted work on the virtual clock.
pub trait Device {
    /// Time from the event that made planning possible to the plan. Asked once for each plan, of a step or of
    /// nothing.
    fn gap(&mut self) -> Nanos;

    /// A step starts.
    fn submit_step(&mut self, now: Nanos, plan: &StepPlan);

    /// A swap starts.
    fn submit_swap(&mut self, now: Nanos, swap: &SwapPlan);

    /// A read from disk starts.
    fn submit_fetch(&mut self, now: Nanos, fetch: &FetchPlan);

    /// What ends next, and when: never before the last call's `now`. It may change with every submission.
    fn next(&mut self) -> Option<(Nanos, Done)>;

    /// What [`Device::next`] told has come about.
    fn complete(&mut self, now: Nanos, done: Done);

    /// How long the step that has just ended waited for layers of the adapter in each slot.
    fn stalled(&self) -> &[(SlotId, Nanos)];

    /// Whether [`Device::skip`] could skip anything now that ends before `before`.
    fn may_skip(&self, _before: Nanos) -> bool {
        false
    }

    /// Runs through up to `most` steps of the sequences of the step just submitted, each a token
    /// further, as long as the next one is formed before `before` and not after `until`. The result is
    /// to the nanosecond what the same steps, submitted and completed one by one, come to. A device
    /// that cannot tell skips nothing.
    fn skip(&mut self, _most: u64, _before: Nanos, _until: Nanos) -> Skipped {
        Skipped::default()
    }
}
