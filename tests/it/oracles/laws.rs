//! Little's law, which holds of every run whatever its distributions.

use std::collections::HashMap;

use lora_hbm::sim::{Observer, Outcome};
use lora_hbm::workload::popularity::Popularity;
use lora_sched::{Nanos, Scheduler, StepPlan, SwapMode};

use super::{Flaw, SERVICE, Service, System, holds_and_catches};

/// Numbers in the system as the scheduler counts them, over time; and times in the system as the
/// requests' own events tell them. Nothing is shared between the two.
#[derive(Debug, Default)]
struct Ledger {
    last: Nanos,
    waiting: usize,
    running: usize,
    /// Integrals of the two, in request-nanoseconds.
    waiting_time: u128,
    running_time: u128,

    started: HashMap<u64, Nanos>,
    waits: u128,
    runs: u128,
    outcomes: u64,
    /// One outcome in so many goes missing.
    lost: Option<u64>,
}

impl Observer for Ledger {
    fn outcome(&mut self, outcome: &Outcome) {
        self.outcomes += 1;
        if self.lost.is_some_and(|n| self.outcomes.is_multiple_of(n)) {
            return;
        }
        let started = self.started[&outcome.arrival];
        self.waits += u128::from(started - outcome.request.queued);
        self.runs += u128::from(outcome.last - started);
    }

    fn step(&mut self, plan: &StepPlan) {
        for seq in &plan.seqs {
            // A preempted request starts anew; the stage that it was in first counts.
            self.started.entry(seq.id.0).or_insert(plan.formed);
        }
    }

    fn state(&mut self, now: Nanos, scheduler: &Scheduler) {
        let passed = u128::from(now - self.last);
        self.waiting_time += passed * self.waiting as u128;
        self.running_time += passed * self.running as u128;
        self.last = now;
        self.waiting = scheduler.waiting();
        self.running = scheduler.running();
    }
}

fn little(system: &System) -> Result<(), String> {
    let lost = match system.flaw {
        Flaw::Lost(n) => Some(n),
        _ => None,
    };
    let mut ledger = Ledger { lost, ..Ledger::default() };
    system.run(5, 20_000, &mut ledger);
    if ledger.waiting + ledger.running > 0 {
        return Err(format!("{} wait and {} run at the end", ledger.waiting, ledger.running));
    }
    for (stage, integral, sum) in [
        ("waiting", ledger.waiting_time, ledger.waits),
        ("running", ledger.running_time, ledger.runs),
        ("all", ledger.waiting_time + ledger.running_time, ledger.waits + ledger.runs),
    ] {
        let (integral, sum) = (integral as f64, sum as f64);
        if (integral - sum).abs() > 1e-9 * sum.max(1.0) {
            return Err(format!("{stage}: the integral of N is {integral}, the sum of W {sum}"));
        }
    }
    Ok(())
}

#[test]
fn little_s_law_holds_stage_by_stage() {
    let swaps = System {
        sequences: 4,
        adapters: 12,
        slots: 3,
        popularity: Popularity::Zipf { s: 0.8 },
        swap: SERVICE / 5,
        ..System::queue(0.7, Service::Geometric { steps: 10 })
    };
    for system in [System::queue(0.8, Service::Exponential), System::queue(1.2, Service::Fixed), swaps] {
        holds_and_catches(little, &system, [Flaw::Lost(1000)]);
    }
}

/// Every scheduler setting: what is preempted, chunked, prefetched or overlapped is in one stage or
/// the other all the same.
#[test]
fn little_s_law_holds_in_every_swap_mode() {
    for &swap_mode in SwapMode::ALL {
        let mut ledger = Ledger::default();
        super::metamorphic::serving(swap_mode, 1, 3).run(11, 4_000, &mut ledger);
        assert_eq!((ledger.waiting, ledger.running), (0, 0));
        assert_eq!(ledger.waiting_time + ledger.running_time, ledger.waits + ledger.runs, "{swap_mode}");
    }
}
