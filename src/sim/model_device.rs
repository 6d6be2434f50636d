//! A device whose durations come from a calibrated profile.
//!
//! A step and a copy that run side by side slow each other: both are kept as remaining work and a
//! rate, and the rates change only when one of them starts or ends.

use lora_sched::{AdapterId, FetchPlan, Nanos, SlotId, StepPlan, SwapKind, SwapMode, SwapPlan};

use super::device::{Device, Done, Skipped};
use crate::profile::{CostModel, History, StepShape, whole_ns};

/// See the module's text.
#[derive(Clone, Debug)]
pub struct ModelDevice {
    cost: CostModel,
    ranks: Vec<u32>,
    /// Copies that were decided at once share the engine layer by layer (`layered`) rather than one after
    /// another.
    shared: bool,
    now: Nanos,
    /// Whether `step` is in flight. It stays where it is, so that an event moves no more than it changes.
    running: bool,
    step: Step,
    copies: Vec<Copy>,
    /// Rate of a step beside copies.
    step_rate: f64,
    /// Rate of copying beside a step.
    busy_rate: f64,
    /// Whether the next two are what ends next while copies are under way.
    known: bool,
    next_at: Nanos,
    next_done: Done,
    reads: Vec<(Nanos, AdapterId)>,
    stalled: Vec<(SlotId, Nanos)>,
    history: History,
}

#[derive(Clone, Debug, Default)]
struct Step {
    started: Nanos,
    shape: StepShape,
    /// Fixed-point cost of the shape.
    sum: u128,
    /// Work without any slow-down; with what it takes more to read adapters under way.
    work: Nanos,
    /// While no copy is under way: when the step ends.
    ends: Nanos,
    /// While copies are: what is left of the work at `now` (waits for first layers included).
    left: f64,
    /// Slots that it reads and that are still being copied into.
    loading: Vec<SlotId>,
    last_landed: Option<SlotId>,
}

#[derive(Clone, Debug)]
struct Copy {
    slot: SlotId,
    kind: SwapKind,
    asked: Nanos,
    work: f64,
    left: f64,
}

impl ModelDevice {
    /// A device with these costs; `ranks[a]` is adapter `a`'s rank.
    pub fn new(cost: CostModel, ranks: Vec<u32>, mode: SwapMode) -> Self {
        Self {
            step_rate: 1.0 / (1.0 + cost.step_slowdown),
            busy_rate: 1.0 / cost.busy_swap_factor(),
            known: false,
            next_at: 0,
            next_done: Done::Step,
            history: History::of(&cost),
            cost,
            ranks,
            shared: mode == SwapMode::Layered,
            now: 0,
            running: false,
            step: Step::default(),
            copies: Vec::new(),
            reads: Vec::new(),
            stalled: Vec::new(),
        }
    }

    /// Rate of each copy that is being served: those share the copy engine.
    fn copy_rate(&self) -> f64 {
        let rate = if self.running { self.busy_rate } else { 1.0 };
        match self.served().count() {
            0 | 1 => rate,
            served => rate / served as f64,
        }
    }

    /// Demand goes before prefetch.
    fn served_kind(&self) -> SwapKind {
        let demand = self.copies.iter().any(|c| c.kind == SwapKind::Demand);
        if demand { SwapKind::Demand } else { SwapKind::Prefetch }
    }

    /// Of the kind that is served the first, and (`layered`) with it those that were decided at once with it.
    fn served(&self) -> impl Iterator<Item = &Copy> + '_ {
        let kind = self.served_kind();
        let of_kind = self.copies.iter().filter(move |c| c.kind == kind);
        let first = of_kind.clone().next().map(|c| c.asked);
        let together = of_kind.take_while(move |c| Some(c.asked) == first);
        together.take(if self.shared { usize::MAX } else { 1 })
    }

    /// Lets time pass up to a change of rates.
    fn advance(&mut self, now: Nanos) {
        self.known = false;
        let passed = now.saturating_sub(self.now) as f64;
        self.now = now;
        if passed == 0.0 || self.copies.is_empty() {
            return;
        }
        let copy_rate = self.copy_rate();
        if self.running {
            self.step.left -= passed * self.step_rate;
        }
        let kind = self.served_kind();
        let mut first = None;
        for copy in self.copies.iter_mut().filter(|c| c.kind == kind) {
            if *first.get_or_insert(copy.asked) != copy.asked {
                break;
            }
            copy.left -= passed * copy_rate;
            if !self.shared {
                break;
            }
        }
    }

    fn after(&self, left: f64, rate: f64) -> Nanos {
        let left = left.max(0.0) / rate;
        // Rounded up; `f64::ceil` is a function call on plain x86-64.
        let whole = left as Nanos;
        self.now + whole + Nanos::from((whole as f64) < left)
    }
}

impl Device for ModelDevice {
    fn gap(&mut self) -> Nanos {
        self.cost.loop_ns
    }

    fn submit_step(&mut self, now: Nanos, plan: &StepPlan) {
        self.advance(now);
        let ranks = &self.ranks;
        let rank = |adapter: u32| ranks.get(adapter as usize).copied().unwrap_or(0);
        self.step.shape = StepShape::of(plan, now, rank, &mut self.history);
        self.step.sum = self.cost.step_sum(&self.step.shape);
        self.step.work = whole_ns(self.step.sum);
        self.step.started = now;
        self.step.ends = now + self.step.work;
        self.step.last_landed = None;
        self.step.loading.clear();
        self.stalled.clear();
        if !self.copies.is_empty() {
            let head = self.wait_for_first_layers(plan);
            if !self.step.loading.is_empty() {
                self.step.work += self.cost.reading_ns;
            }
            self.step.left = self.step.work as f64 + head;
        }
        self.running = true;
    }

    fn submit_swap(&mut self, now: Nanos, swap: &SwapPlan) {
        self.advance(now);
        if self.copies.is_empty() {
            self.step.left = self.step.ends.saturating_sub(now) as f64;
        }
        let work = self.cost.swap_ns(swap.bytes) as f64;
        self.copies.push(Copy { slot: swap.slot, kind: swap.kind, asked: now, work, left: work });
    }

    /// A profile says nothing of disks, and no command gives the simulator one: a read takes no time.
    fn submit_fetch(&mut self, now: Nanos, fetch: &FetchPlan) {
        self.reads.push((now, fetch.adapter));
    }

    #[inline]
    fn next(&mut self) -> Option<(Nanos, Done)> {
        if let Some(&(at, adapter)) = self.reads.first() {
            return Some((at, Done::Fetch { adapter, failed: false }));
        }
        if self.copies.is_empty() {
            return self.running.then_some((self.step.ends, Done::Step));
        }
        if !self.known {
            self.find_next();
        }
        Some((self.next_at, self.next_done))
    }

    fn complete(&mut self, now: Nanos, done: Done) {
        self.advance(now);
        match done {
            Done::Step => {
                self.running = false;
                if let Some(slot) = self.step.last_landed {
                    let took = now - self.step.started;
                    let slowed = self.step.work as f64 * (1.0 + self.cost.step_slowdown);
                    self.stalled.push((slot, (took as f64 - slowed).max(0.0) as Nanos));
                }
            }
            Done::Fetch { adapter, .. } => self.reads.retain(|read| read.1 != adapter),
            Done::Swap(slot) => {
                self.copies.retain(|c| c.slot != slot);
                let step = &mut self.step;
                if let Some(at) = step.loading.iter().position(|&s| s == slot).filter(|_| self.running) {
                    step.loading.swap_remove(at);
                    step.last_landed = Some(slot);
                    step.left = step.left.max(step.work as f64 / self.cost.layers as f64);
                }
                if self.copies.is_empty() {
                    self.step.ends = self.after(self.step.left, 1.0);
                }
            }
        }
    }

    fn stalled(&self) -> &[(SlotId, Nanos)] {
        &self.stalled
    }

    fn may_skip(&self, before: Nanos) -> bool {
        self.running
            && self.copies.is_empty()
            && self.reads.is_empty()
            && self.step.ends + self.cost.loop_ns < before
    }

    fn skip(&mut self, most: u64, before: Nanos, until: Nanos) -> Skipped {
        if !self.may_skip(before) {
            return Skipped::default();
        }
        let step = &mut self.step;
        let mut skipped = Skipped { steps: 0, formed: step.started, busy: 0 };
        let mut run = self.cost.decode_run(step.shape, step.sum);
        let mut work = step.work;
        while skipped.steps < most {
            let formed = skipped.formed + work + self.cost.loop_ns;
            if formed >= before || formed > until {
                break;
            }
            skipped = Skipped { steps: skipped.steps + 1, formed, busy: skipped.busy + work };
            work = run.next();
        }
        (step.shape.decode_context, step.sum) = run.reached();
        step.started = skipped.formed;
        step.work = work;
        step.ends = skipped.formed + work;
        self.now = skipped.formed;
        skipped
    }
}

impl ModelDevice {
    /// What ends next while copies are under way.
    fn find_next(&mut self) {
        // The last layer waits for the last layer: a step ends after the copies that it reads.
        let step = (self.running && self.step.loading.is_empty())
            .then(|| (self.after(self.step.left, self.step_rate), Done::Step));
        let rate = self.copy_rate();
        let copy = self.served().map(|copy| (self.after(copy.left, rate), Done::Swap(copy.slot)));
        if let Some((at, done)) = copy.chain(step).min() {
            (self.next_at, self.next_done) = (at, done);
        }
        self.known = true;
    }

    /// Layer 0 waits for layer 0: the first slice of each copy that has not come that far, behind what is copied before
    /// it. Gives the longest of these waits.
    fn wait_for_first_layers(&mut self, plan: &StepPlan) -> f64 {
        let rate = if self.running { self.busy_rate } else { 1.0 };
        let mut head = 0.0f64;
        for (at, copy) in self.copies.iter().enumerate() {
            if !plan.loading.contains(&copy.slot) {
                continue;
            }
            let first_layer = copy.work / self.cost.layers as f64 - (copy.work - copy.left);
            let together = |c: &Copy| self.shared && c.kind == copy.kind && c.asked == copy.asked;
            let sharing = self.copies.iter().filter(|c| together(c)).count().max(1);
            // Demand goes before prefetch, and each kind in its order.
            let before = |(i, c): &(usize, &Copy)| match (c.kind, copy.kind) {
                (SwapKind::Demand, SwapKind::Prefetch) => true,
                (SwapKind::Prefetch, SwapKind::Demand) => false,
                _ => *i < at && !together(c),
            };
            let ahead: f64 = self.copies.iter().enumerate().filter(before).map(|(_, c)| c.left).sum();
            head = head.max((ahead + first_layer.max(0.0) * sharing as f64) / rate);
            self.step.loading.push(copy.slot);
        }
        head
    }
}

#[cfg(test)]
mod tests {
    use lora_sched::{AdapterId, Config, Scheduler};

    use super::*;
    use crate::profile::tests::round;
    use crate::sim::{Input, Outcome, SimRequest, run};

    const MS: Nanos = 1_000_000;

    fn request(id: u64, at: Nanos, adapter: u32, output: u32) -> Input {
        Input::Arrive(SimRequest {
            id,
            received: at,
            queued: at,
            adapter: Some(adapter),
            prompt_tokens: 100,
            output_tokens: output,
        })
    }

    fn simulate(config: Config, inputs: Vec<Input>) -> Vec<Outcome> {
        let cost = CostModel::new(&round()).unwrap();
        let mut device = ModelDevice::new(cost, vec![8; config.adapters.len()], config.swap_mode);
        let mut outcomes = Vec::new();
        let mut scheduler = Scheduler::new(config).unwrap();
        run(&mut scheduler, &mut device, inputs, &mut outcomes).unwrap();
        scheduler.audit().unwrap();
        outcomes
    }

    /// A prefill of 100 tokens, 3 ms, that reads slots which are still loading.
    fn prefill(loading: Vec<SlotId>) -> StepPlan {
        let seq = lora_sched::SeqStep {
            id: lora_sched::RequestId(0),
            place: lora_sched::PlaceId(0),
            adapter: None,
            start: 0,
            len: 100,
            decode: false,
            samples: true,
            new_blocks: 0..0,
        };
        StepPlan { seqs: vec![seq], loading, ..StepPlan::default() }
    }

    fn config(mode: SwapMode) -> Config {
        Config { swap_mode: mode, ..Config::with_adapters(4, 2, 8, 1_000_000) }
    }

    /// 100 tokens are 3 ms, a token 1.02 ms, a swap 1 ms.
    #[test]
    fn one_request_takes_what_its_steps_and_swap_take() {
        let first = |mode, adapter| simulate(config(mode), vec![request(0, 0, adapter, 2)])[0];
        let resident = first(SwapMode::Blocking, 0);
        assert_eq!((resident.first, resident.last), (3 * MS, 4 * MS + 20_000));
        let blocking = first(SwapMode::Blocking, 3);
        assert_eq!((blocking.first, blocking.parts.swap), (4 * MS, MS));
        let overlap = first(SwapMode::Overlap, 3);
        assert_eq!((overlap.first, overlap.parts.swap), (4 * MS, MS));
        // Four layers: only the first is waited for.
        let layered = first(SwapMode::Layered, 3);
        assert_eq!((layered.first, layered.parts.swap), (3 * MS + MS / 4, MS / 4));
    }

    #[test]
    fn a_swap_beside_a_step_is_hidden_in_overlap_mode() {
        let inputs = vec![request(0, 0, 0, 1), request(1, MS, 3, 1)];
        let outcomes = simulate(config(SwapMode::Overlap), inputs);
        assert_eq!(outcomes[1].first, 6 * MS);
        assert_eq!(outcomes[1].parts.swap, 0);
        assert_eq!(outcomes[1].parts.queue, 2 * MS);
    }

    #[test]
    fn a_step_beside_a_swap_is_slower_for_as_long() {
        let mut profile = round();
        profile.swap.step_slowdown = 0.5;
        let mut device =
            ModelDevice::new(CostModel::new(&profile.signed()).unwrap(), vec![8], SwapMode::Overlap);
        device.submit_step(0, &prefill(Vec::new()));
        let swap = SwapPlan {
            adapter: AdapterId(0),
            slot: SlotId(0),
            evicted: None,
            bytes: 1_000_000,
            kind: SwapKind::Demand,
        };
        device.submit_swap(MS, &swap);
        assert_eq!(device.next(), Some((2 * MS, Done::Swap(SlotId(0)))));
        device.complete(2 * MS, Done::Swap(SlotId(0)));
        // A third of the millisecond beside the copy was lost.
        assert_eq!(device.next(), Some((3 * MS + 333_334, Done::Step)));
    }

    #[test]
    fn copies_decided_at_once_share_and_later_ones_wait() {
        let mut device = copying(&[(0, 0), (0, 1), (MS / 2, 2)]);
        for (at, slot) in [(2 * MS, 0), (2 * MS, 1), (3 * MS, 2)] {
            assert_eq!(device.next(), Some((at, Done::Swap(SlotId(slot)))));
            device.complete(at, Done::Swap(SlotId(slot)));
        }
    }

    /// A device of four layers with copies of 1 ms asked for at these times, into these slots.
    fn copying(copies: &[(Nanos, u32)]) -> ModelDevice {
        let cost = CostModel::new(&round()).unwrap();
        let mut device = ModelDevice::new(cost, vec![8; copies.len()], SwapMode::Layered);
        for &(at, slot) in copies {
            let (adapter, slot, kind) = (AdapterId(slot), SlotId(slot), SwapKind::Demand);
            device.submit_swap(at, &SwapPlan { adapter, slot, evicted: None, bytes: 1_000_000, kind });
        }
        device
    }

    #[test]
    fn a_step_waits_for_the_first_layers_of_its_copies_in_their_order() {
        // A step of 3 ms: behind the quarter of a copy, of two that share, of one behind another.
        for (copies, ends) in
            [(&[(0, 0)][..], 3_250_000), (&[(0, 0), (0, 1)], 3_500_000), (&[(0, 0), (1, 1)], 4_250_000)]
        {
            let mut device = copying(copies);
            let loading = copies.iter().map(|c| SlotId(c.1)).collect();
            device.submit_step(1, &prefill(loading));
            let mut last = None;
            while let Some((at, done)) = device.next() {
                device.complete(at, done);
                if done == Done::Step {
                    last = Some(at);
                    break;
                }
            }
            let ended = last.unwrap();
            assert!(ended.abs_diff(ends) <= 3, "{copies:?}: {ended}, expected {ends}");
        }
    }

    /// The device of [`copying`], on which a step takes half a millisecond more that reads an adapter under way.
    fn reading(copies: &[(Nanos, u32)]) -> ModelDevice {
        let mut device = copying(copies);
        device.cost.reading_ns = MS / 2;
        device
    }

    /// Goes on until the step has ended, and says when.
    fn end_of_step(device: &mut ModelDevice) -> Nanos {
        loop {
            let (at, done) = device.next().unwrap();
            device.complete(at, done);
            if done == Done::Step {
                return at;
            }
        }
    }

    #[test]
    fn a_step_that_reads_an_adapter_under_way_works_longer_besides_waiting() {
        // Half a copy is over: no first layer to be waited for, and nothing that counts as a wait.
        let mut device = reading(&[(0, 0)]);
        device.submit_step(MS / 2, &prefill(vec![SlotId(0)]));
        assert_eq!(end_of_step(&mut device), MS / 2 + 3 * MS + MS / 2);
        assert_eq!(device.stalled(), [(SlotId(0), 0)]);
        // From its start: a quarter of it is waited for, and only that is a wait.
        let mut device = reading(&[(1, 0)]);
        device.submit_step(1, &prefill(vec![SlotId(0)]));
        assert_eq!(end_of_step(&mut device), 1 + MS / 4 + 3 * MS + MS / 2);
        assert_eq!(device.stalled(), [(SlotId(0), MS / 4)]);
        // Once, however many there are.
        let mut device = reading(&[(0, 0), (0, 1)]);
        device.submit_step(MS, &prefill(vec![SlotId(0), SlotId(1)]));
        assert_eq!(end_of_step(&mut device), MS + 3 * MS + MS / 2);
    }

    #[test]
    fn an_adapter_that_has_landed_or_that_the_step_does_not_read_costs_nothing_more() {
        let mut device = reading(&[(0, 0)]);
        device.complete(MS, Done::Swap(SlotId(0)));
        // As a plan of `blocking` has it, whose step waited for the copy before it was submitted.
        device.submit_step(MS, &prefill(vec![SlotId(0)]));
        assert_eq!(end_of_step(&mut device), MS + 3 * MS);
        let mut device = reading(&[(0, 0)]);
        device.submit_step(0, &prefill(Vec::new()));
        assert_eq!(end_of_step(&mut device), 3 * MS);
        let mut device = reading(&[(0, 0), (0, 1)]);
        while let Some((at, Done::Swap(SlotId(0)))) = device.next() {
            device.complete(at, Done::Swap(SlotId(0)));
        }
        device.submit_step(2 * MS, &prefill(vec![SlotId(0)]));
        assert_eq!(end_of_step(&mut device), 2 * MS + 3 * MS);
    }
}
