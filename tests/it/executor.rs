//! What the CPU executor promises to a driver, apart from the numbers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lora_hbm::engine::executor::{Completion, Executor};
use lora_sched::{AdapterId, SlotId, SwapKind, SwapPlan};

use crate::rig::{Rig, Share};

fn swap(adapter: u32, slot: u32, kind: SwapKind) -> SwapPlan {
    SwapPlan { adapter: AdapterId(adapter), slot: SlotId(slot), evicted: None, bytes: 0, kind }
}

const PROMPT: [u32; 5] = [3, 9, 4, 20, 7];

#[test]
fn completions_are_stamped_in_order_on_one_clock() {
    let mut rig = Rig::new("llama", 2, 1);
    let before = rig.executor.clock();
    for i in 0..20 {
        rig.executor.submit_swap(&swap(i % 4, i % 2, SwapKind::Demand)).unwrap();
    }
    let mut last = before;
    for _ in 0..20 {
        let Completion::Swap { started, ended, .. } = rig.executor.wait().unwrap() else { panic!() };
        assert!(before <= started && started <= ended && last <= ended);
        last = ended;
    }
    assert!(last <= rig.executor.clock());
}

#[test]
fn the_waker_is_called_for_every_completion() {
    let mut rig = Rig::new("llama", 2, 1);
    let woken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&woken);
    rig.executor.set_waker(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    rig.swap(2, 0);
    rig.step(&[Share { place: 0, who: Some(2), start: 0, tokens: Some(&PROMPT) }]);
    // The waker runs after the completion can be polled: the last call may be a moment away.
    while woken.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    assert_eq!(rig.executor.poll().unwrap(), None);
    assert!(rig.executor.wait().unwrap_err().to_string().contains("nothing is in flight"));
}

#[test]
fn a_step_with_another_adapter_than_the_slot_holds_fails_and_says_so() {
    let mut rig = Rig::new("llama", 2, 1);
    rig.swap(3, 0);
    rig.slots.insert(0, 0);
    let message = rig
        .try_step(&[Share { place: 0, who: Some(0), start: 0, tokens: Some(&PROMPT) }])
        .unwrap_err()
        .to_string();
    assert!(message.contains("adapter 0 in slot 0, which holds adapter 3"), "{message}");
}

#[test]
fn plans_that_cannot_be_carried_out_are_refused() {
    let mut rig = Rig::new("llama", 2, 1);
    let mut refuse = |plan: &SwapPlan, said: &str| {
        let message = rig.executor.submit_swap(plan).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    };
    refuse(&swap(0, 7, SwapKind::Demand), "slot 7 of 2");
    refuse(&swap(9, 0, SwapKind::Demand), "adapter 9 is not in host memory");
    let share = Share { place: 0, who: None, start: 0, tokens: Some(&[3, 4000]) };
    let message = rig.try_step(&[share]).unwrap_err().to_string();
    assert!(message.contains("token id 4000"), "{message}");
    let preload: Vec<_> = (0..3).map(AdapterId).collect();
    assert!(rig.executor.preload(&preload).is_err());
    // Refusals leave the executor usable.
    rig.step(&[Share { place: 0, who: Some(1), start: 0, tokens: Some(&PROMPT) }]);
}

#[test]
fn dropping_it_with_work_in_flight_ends_its_threads() {
    let mut rig = Rig::new("opt", 2, 2);
    for i in 0..30 {
        rig.executor.submit_swap(&swap(i % 4, i % 2, SwapKind::Prefetch)).unwrap();
    }
    rig.submit(&[Share { place: 0, who: None, start: 0, tokens: Some(&PROMPT) }]);
    drop(rig);
}
