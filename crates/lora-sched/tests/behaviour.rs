//! One behaviour a test, by hand.

use lora_sched::{
    AdapterId, AdapterSpec, Arrival, Config, Ended, Event, EventError, Evict, Notice, Outbox, Policy,
    RequestId, Scheduler, SlotId, SlotState, StepPlan, SwapMode,
};

struct Bench {
    scheduler: Scheduler,
    plan: StepPlan,
    out: Outbox,
    now: u64,
}

impl Bench {
    fn new(config: Config) -> Self {
        Self {
            scheduler: Scheduler::new(config).unwrap(),
            plan: StepPlan::default(),
            out: Outbox::default(),
            now: 0,
        }
    }

    fn try_arrive(&mut self, id: u64, adapter: u32) -> Result<(), EventError> {
        let arrival = Arrival {
            id: RequestId(id),
            adapter: Some(AdapterId(adapter)),
            received: self.now,
            prompt_tokens: 10,
            max_tokens: 3,
        };
        self.scheduler.handle(self.now, Event::Arrive(arrival), &mut self.out)
    }

    fn arrive(&mut self, id: u64, adapter: u32) {
        self.try_arrive(id, adapter).unwrap();
    }

    fn event(&mut self, event: Event<'_>) {
        self.now += 10;
        self.scheduler.handle(self.now, event, &mut self.out).unwrap();
    }

    fn plan(&mut self) -> Vec<u64> {
        self.out.clear();
        self.scheduler.plan(self.now, &mut self.plan, &mut self.out);
        self.plan.seqs.iter().map(|s| s.id.0).collect()
    }

    fn step_done(&mut self) {
        self.event(Event::StepDone { stopped: &[], stalled: &[] });
    }

    fn evicted(&self) -> Vec<u32> {
        self.out.swaps.iter().filter_map(|s| s.evicted).map(|a| a.0).collect()
    }

    fn state(&self, slot: usize) -> SlotState {
        self.scheduler.slots().nth(slot).unwrap().state
    }
}

fn config(total: usize, slots: usize) -> Config {
    Config::with_adapters(total, slots, 8, 1000)
}

/// One request after another, each to its end; gives who was evicted.
fn serve_in_turn(mut config: Config, adapters: &[u32]) -> Vec<u32> {
    config.swap_mode = SwapMode::Blocking;
    let mut b = Bench::new(config);
    let mut evicted = Vec::new();
    for (id, &adapter) in adapters.iter().enumerate() {
        b.arrive(id as u64, adapter);
        while !b.plan().is_empty() {
            evicted.extend(b.evicted());
            for slot in b.plan.loading.clone() {
                b.event(Event::SwapDone(slot));
            }
            b.step_done();
        }
    }
    evicted
}

#[test]
fn each_eviction_rule_picks_its_own_victim() {
    let with = |evict, slots| Config { evict, ..config(9, slots) };
    // Use 0 twice, then 1: the least recently used is 0, the least often used is 1.
    assert_eq!(serve_in_turn(with(Evict::Lru, 2), &[0, 0, 1, 5]), [0]);
    assert_eq!(serve_in_turn(with(Evict::Lfu, 2), &[0, 0, 1, 5]), [1]);
    // 0 has been resident longest, whatever its use.
    assert_eq!(serve_in_turn(with(Evict::Fifo, 2), &[1, 0, 0, 5, 6]), [0, 1]);
    // One use of an adapter that is eight times larger outweighs three of a small one.
    let mut cost = with(Evict::Cost, 2);
    cost.adapters[1] = AdapterSpec::new(64, 8000);
    assert_eq!(serve_in_turn(cost, &[1, 0, 0, 0, 5]), [0]);
}

#[test]
fn fewest_pending_keeps_the_adapter_that_is_waited_for() {
    let mut b = Bench::new(Config {
        evict: Evict::FewestPending,
        policy: Policy::Fcfs,
        max_num_seqs: 1,
        swap_mode: SwapMode::Blocking,
        ..config(9, 2)
    });
    // 0 is least recently used, but two requests wait for it behind the one that needs a slot.
    for (id, adapter) in [(0, 1), (1, 5), (2, 0), (3, 0)] {
        b.arrive(id, adapter);
    }
    while b.plan() == [0] {
        b.step_done();
    }
    assert_eq!(b.plan.seqs[0].id, RequestId(1));
    assert_eq!(b.evicted(), [1]);
}

#[test]
fn a_pinned_adapter_is_passed_under_skip_and_waited_for_under_fcfs() {
    for (policy, expected) in [(Policy::Skip, vec![0, 2]), (Policy::Fcfs, vec![0])] {
        let mut b = Bench::new(Config { policy, ..config(4, 1) });
        b.arrive(0, 0);
        b.arrive(1, 1);
        b.arrive(2, 0);
        assert_eq!(b.plan(), expected, "{policy}");
    }
}

#[test]
fn overlap_lets_others_go_on_and_layered_starts_at_once() {
    let mut b = Bench::new(Config { swap_mode: SwapMode::Overlap, ..config(4, 2) });
    b.arrive(0, 3);
    b.arrive(1, 1);
    assert_eq!(b.plan(), [1]);
    assert_eq!(b.out.swaps.len(), 1);
    b.event(Event::SwapDone(b.out.swaps[0].slot));
    b.step_done();
    assert_eq!(b.plan(), [1, 0], "decodes stand first");

    let mut b = Bench::new(Config { swap_mode: SwapMode::Layered, ..config(4, 2) });
    b.arrive(0, 3);
    assert_eq!(b.plan(), [0]);
    assert_eq!(b.plan.loading, [b.out.swaps[0].slot]);
    assert!(!b.plan.wait_for_swaps);
}

#[test]
fn a_swap_starts_while_a_step_runs() {
    let mut b = Bench::new(config(4, 2));
    b.arrive(0, 0);
    assert_eq!(b.plan(), [0]);
    b.now += 5;
    b.arrive(1, 2);
    assert_eq!(b.evicted(), [1], "slot 0 is read by the step, slot 1 is not");
}

#[test]
fn a_slot_that_the_step_reads_is_not_given_away_when_its_request_is_cancelled() {
    let mut b = Bench::new(config(4, 1));
    b.arrive(0, 0);
    assert_eq!(b.plan(), [0]);
    b.arrive(1, 2);
    b.event(Event::Cancel(RequestId(0)));
    assert!(b.out.swaps.is_empty());
    b.step_done();
    assert_eq!(
        b.out.notices.last(),
        Some(&Notice::Ended { id: RequestId(0), place: Some(lora_sched::PlaceId(0)), why: Ended::Cancelled })
    );
    assert_eq!(b.plan(), [1]);
    assert_eq!(b.evicted(), [0]);
}

#[test]
fn a_removed_adapter_drains_and_retires() {
    let mut b = Bench::new(config(3, 2));
    b.arrive(0, 0);
    b.plan();
    b.event(Event::RemoveAdapter(AdapterId(0)));
    assert_eq!(b.try_arrive(1, 0), Err(EventError::UnknownAdapter(AdapterId(0))));
    for _ in 0..3 {
        assert_eq!(b.state(0), SlotState::Resident(AdapterId(0)));
        b.step_done();
        b.plan();
    }
    assert_eq!(b.state(0), SlotState::Free);
    b.scheduler.audit().unwrap();

    // Removed while only a cancelled request's step still reads it.
    b.arrive(2, 1);
    b.plan();
    b.event(Event::RemoveAdapter(AdapterId(1)));
    b.event(Event::Cancel(RequestId(2)));
    assert_eq!(b.state(1), SlotState::Resident(AdapterId(1)));
    b.step_done();
    assert_eq!(b.state(1), SlotState::Free);
    assert!(b.out.notices.contains(&Notice::AdapterGone(AdapterId(1))));
}

#[test]
fn an_adapter_pinned_by_the_user_stays() {
    let mut b = Bench::new(config(4, 2));
    b.event(Event::PinAdapter(AdapterId(0), true));
    let second = b.scheduler.handle(b.now, Event::PinAdapter(AdapterId(1), true), &mut b.out);
    assert_eq!(second, Err(EventError::AllPinned));
    b.arrive(0, 2);
    b.plan();
    assert_eq!(b.evicted(), [1], "0 is less recently used, and pinned");
}

#[test]
fn a_pin_loads_what_is_not_there_as_soon_as_a_slot_can_be_had() {
    for &swap_mode in SwapMode::ALL {
        let mut b = Bench::new(Config { swap_mode, ..config(4, 2) });
        b.event(Event::PinAdapter(AdapterId(3), true));
        assert_eq!(b.out.swaps.len(), 1, "{swap_mode}: at once where nobody runs");
        b.event(Event::SwapDone(b.out.swaps[0].slot));
        b.event(Event::PinAdapter(AdapterId(3), false));

        // Both slots are in use: the pin waits, and comes before the request that has waited longer.
        let mut b = Bench::new(Config { swap_mode, ..config(4, 2) });
        b.arrive(0, 0);
        b.arrive(1, 1);
        b.plan();
        b.arrive(2, 2);
        b.event(Event::PinAdapter(AdapterId(3), true));
        assert!(b.out.swaps.is_empty(), "{swap_mode}");
        for _ in 0..2 {
            b.step_done();
            b.plan();
        }
        b.out.clear();
        b.step_done();
        assert_eq!(b.out.swaps[0].adapter, AdapterId(3), "{swap_mode}");
        b.scheduler.audit().unwrap();
    }
}

#[test]
fn a_pin_leaves_a_slot_to_an_adapter_that_is_being_drained() {
    let mut b = Bench::new(Config { max_num_seqs: 1, ..config(2, 1) });
    b.arrive(0, 0);
    b.plan();
    b.arrive(1, 0);
    b.event(Event::RemoveAdapter(AdapterId(0)));
    let pin = Event::PinAdapter(AdapterId(1), true);
    assert_eq!(b.scheduler.handle(b.now, pin, &mut b.out), Err(EventError::AllPinned));
    for _ in 0..6 {
        b.step_done();
        b.plan();
    }
    assert!(b.scheduler.is_idle());
    b.event(pin);
    assert_eq!(b.out.swaps[0].adapter, AdapterId(1), "when the last request has ended, there is room");
}

#[test]
fn a_pin_waits_for_the_end_of_the_step_when_a_preemption_frees_the_slot() {
    // Blocks for little more than one request: 0's decodes take them from 1, whose slot the pin wants.
    let mut b = Bench::new(Config { block_size: 1, kv_blocks: 21, max_model_len: 13, ..config(3, 2) });
    b.arrive(0, 0);
    b.arrive(1, 1);
    assert_eq!(b.plan(), [0, 1]);
    b.event(Event::PinAdapter(AdapterId(2), true));
    b.step_done();
    assert_eq!(b.plan(), [0], "1 has lost its blocks");
    assert!(b.out.swaps.is_empty(), "a plan takes no slot that it began with a pin on");
    b.step_done();
    assert_eq!(b.out.swaps.iter().map(|s| s.adapter).collect::<Vec<_>>(), [AdapterId(2)]);
    b.scheduler.audit().unwrap();
}

#[test]
fn an_adapter_that_would_find_every_slot_pinned_is_not_added() {
    let mut b = Bench::new(config(2, 2));
    b.event(Event::PinAdapter(AdapterId(0), true));
    b.event(Event::PinAdapter(AdapterId(1), true));
    let add = Event::AddAdapter(AdapterSpec::new(8, 1000));
    assert_eq!(b.scheduler.handle(b.now, add, &mut b.out), Err(EventError::AllPinned));
    b.event(Event::PinAdapter(AdapterId(1), false));
    assert_eq!(b.scheduler.next_adapter(), AdapterId(2));
    b.event(add);
    b.arrive(0, 2);
    assert_eq!(b.plan(), [0]);
    assert_eq!(b.evicted(), [1]);
}

#[test]
fn an_adapter_on_disk_is_read_ahead_and_swapped_in_when_it_is_there() {
    let mut b = Bench::new(Config { host_loras: Some(3), ..config(6, 1) });
    b.arrive(0, 0);
    assert_eq!(b.plan(), [0]);
    b.now += 5;
    b.arrive(1, 4);
    // 0 is idle in host memory, since it is in a slot; it has been so longest but for 1 and 2.
    let fetch = b.out.fetches[0];
    assert_eq!((fetch.adapter, b.out.fetches.len()), (AdapterId(4), 1));
    let evicted = fetch.evicted.unwrap();
    assert_eq!(b.scheduler.host_state(evicted), Some(lora_sched::HostState::Disk));
    for _ in 0..3 {
        b.step_done();
        assert!(b.plan().iter().all(|&id| id == 0), "not before it is in host memory");
    }
    b.out.clear();
    b.event(Event::FetchDone { adapter: AdapterId(4), failed: false });
    assert_eq!(b.plan(), [1]);
    assert_eq!((b.evicted(), b.plan.loading.len()), (vec![0], 1));
    b.event(Event::SwapDone(SlotId(0)));
    b.out.clear();
    b.step_done();
    let parts = b.out.notices.iter().find_map(|n| match n {
        Notice::FirstToken { parts, .. } => Some(*parts),
        _ => None,
    });
    // The wait for the disk is swap, as that for the slot's copy is.
    assert!(parts.is_some_and(|p| p.swap > 0 && p.slot == 0), "{parts:?}");
}

#[test]
fn a_read_that_fails_ends_its_requests_and_marks_the_adapter() {
    let mut b = Bench::new(Config { host_loras: Some(2), ..config(4, 1) });
    b.arrive(0, 3);
    b.arrive(1, 0);
    b.event(Event::FetchDone { adapter: AdapterId(3), failed: true });
    let ended = Notice::Ended { id: RequestId(0), place: None, why: Ended::Failed };
    assert!(b.out.notices.contains(&ended));
    assert_eq!(b.try_arrive(2, 3), Err(EventError::AdapterFailed(AdapterId(3))));
    assert_eq!(b.plan(), [1], "others go on");
    b.event(Event::RemoveAdapter(AdapterId(3)));
    assert!(b.out.notices.contains(&Notice::AdapterGone(AdapterId(3))));
    b.scheduler.audit().unwrap();
}

#[test]
fn an_older_request_gets_the_place_in_host_memory_that_a_younger_one_waits_with() {
    let mut b = Bench::new(Config {
        host_loras: Some(2),
        policy: Policy::Fcfs,
        swap_mode: SwapMode::Blocking,
        max_num_seqs: 1,
        ..config(4, 1)
    });
    b.arrive(0, 0);
    b.plan();
    for (id, adapter) in [(1, 2), (2, 0), (3, 3)] {
        b.arrive(id, adapter);
    }
    let places = |b: &Bench| -> Vec<_> {
        b.out.fetches.iter().map(|f| (f.adapter.0, f.evicted.map(|e| e.0))).collect()
    };
    // 1 is idle, and then 0, which is in the slot.
    assert_eq!(places(&b), [(2, Some(1)), (3, Some(0))]);
    b.out.clear();
    for adapter in [2, 3] {
        b.event(Event::FetchDone { adapter: AdapterId(adapter), failed: false });
    }
    for _ in 0..3 {
        b.step_done();
        b.plan();
    }
    // Request 1 took the slot from 0, for which request 2 waits: it comes before request 3, which may not
    // pass it, and whose adapter holds the only place that is not being copied from.
    assert_eq!((b.plan.seqs[0].id, places(&b)), (RequestId(1), vec![(0, Some(3))]));
    let mut order = vec![RequestId(1)];
    for _ in 0..20 {
        for slot in b.plan.loading.clone() {
            b.event(Event::SwapDone(slot));
        }
        let mut fetches = std::mem::take(&mut b.out.fetches);
        if b.scheduler.step_in_flight() {
            b.step_done();
        }
        fetches.append(&mut b.out.fetches);
        for fetch in fetches {
            b.event(Event::FetchDone { adapter: fetch.adapter, failed: false });
        }
        let more = std::mem::take(&mut b.out.fetches);
        b.plan();
        b.out.fetches.extend(more);
        b.scheduler.audit().unwrap();
        order.extend(b.plan.seqs.first().map(|s| s.id));
    }
    order.dedup();
    assert_eq!(order, [1, 2, 3].map(RequestId));
}

#[test]
fn what_cannot_be_served_is_refused() {
    let mut b = Bench::new(Config { max_queue: 1, ..config(2, 1) });
    b.arrive(4, 0);
    assert_eq!(b.try_arrive(5, 0), Err(EventError::QueueFull { max_queue: 1 }));
    let ask = |id, prompt_tokens, max_tokens| {
        Event::Arrive(Arrival { id: RequestId(id), adapter: None, received: 0, prompt_tokens, max_tokens })
    };
    let mut b = Bench::new(config(2, 1));
    b.arrive(4, 0);
    let mut refuse = |event| b.scheduler.handle(0, event, &mut b.out).unwrap_err();
    assert_eq!(refuse(ask(4, 1, 1)), EventError::IdOrder { id: RequestId(4), at_least: RequestId(5) });
    assert_eq!(refuse(ask(9, 0, 1)), EventError::Empty(RequestId(9)));
    assert_eq!(refuse(ask(9, 4352, 1)), EventError::TooLong { tokens: 4353, max_model_len: 4352 });
    assert_eq!(refuse(Event::SwapDone(SlotId(0))), EventError::NotLoading(SlotId(0)));
    assert_eq!(refuse(Event::StepDone { stopped: &[], stalled: &[] }), EventError::NoStep);
    assert!(Scheduler::new(config(2, 3)).is_err());
    assert!(Scheduler::new(config(2, 0)).is_err());
    assert!(Scheduler::new(Config { host_loras: Some(1), ..config(4, 2) }).is_err());
}

#[test]
fn each_cause_of_waiting_is_told_apart() {
    let parts_of = |b: &Bench, id| {
        b.out.notices.iter().find_map(|n| match n {
            Notice::FirstToken { id: i, parts } if *i == RequestId(id) => Some(*parts),
            _ => None,
        })
    };
    // One slot: 1 waits for the step under way, then for the slot until 0's last token, then starts.
    let mut b = Bench::new(Config { swap_mode: SwapMode::Blocking, ..config(3, 1) });
    b.arrive(0, 0);
    b.plan();
    b.now += 4;
    b.arrive(1, 1);
    b.now += 6;
    for _ in 0..3 {
        b.step_done();
        b.plan();
    }
    assert_eq!(b.plan.seqs[0].id, RequestId(1));
    b.event(Event::SwapDone(SlotId(0)));
    b.step_done();
    let parts = parts_of(&b, 1).unwrap();
    assert_eq!((parts.queue, parts.slot, parts.swap, parts.prefill), (16, 20, 10, 10), "{parts:?}");

    // No place: queue.
    let mut b = Bench::new(Config { max_num_seqs: 1, ..config(3, 3) });
    b.arrive(0, 0);
    b.arrive(1, 1);
    for _ in 0..4 {
        b.plan();
        b.step_done();
    }
    let parts = parts_of(&b, 1).unwrap();
    assert_eq!((parts.queue, parts.prefill), (30, 10), "{parts:?}");
}
