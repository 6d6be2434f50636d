//! Properties that hold for every workload, configuration and interleaving of events.

mod driver;

use driver::{Driver, Load, changing_load, load};
use lora_sched::{Ended, Policy, SwapMode};
use proptest::prelude::*;

fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { cases: n, max_shrink_iters: 2000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(600))]

    /// After every event: blocks, places, slots, pins and queue are conserved; no swap writes a slot
    /// that is pinned or that the step in flight reads; steps stay within their limits and cover
    /// each sequence's tokens once, in order. In the end every request has ended and nothing is held.
    #[test]
    fn invariants_hold_and_every_request_ends(load in load()) {
        let run = Driver::new(&load).run()?;
        for request in &load.requests {
            let ended = run.ended.get(&request.id);
            prop_assert!(ended.is_some(), "request {} never ended", request.id);
            if !load.is_cancelled(request.id) {
                prop_assert_ne!(ended, Some(&Ended::Cancelled));
                prop_assert!(run.first_token.contains_key(&request.id));
            }
        }
        prop_assert_eq!(run.kv_used_at_end, 0);
        prop_assert_eq!(run.pins_at_end, 0);
    }

    /// The same while adapters come, go, are pinned and cannot be read: who was taken ends, whoever was
    /// removed goes, and whoever is pinned has a slot in the end.
    #[test]
    fn adapters_come_and_go(load in changing_load()) {
        let run = Driver::new(&load).run()?;
        for request in &load.requests {
            let ended = run.ended.get(&request.id);
            prop_assert_eq!(ended.is_none(), run.refused.contains(&request.id), "{:?}", request);
            let failed = ended == Some(&Ended::Failed);
            prop_assert!(!failed || run.fetches_failed > 0);
            if ended.is_some() && !failed && !load.is_cancelled(request.id) {
                prop_assert_ne!(ended, Some(&Ended::Cancelled));
                prop_assert!(run.first_token.contains_key(&request.id));
            }
        }
        prop_assert_eq!(&run.removed, &run.gone);
        prop_assert_eq!(run.kv_used_at_end, 0);
        prop_assert_eq!(run.pins_at_end, 0);
        for (id, (at, parts)) in &run.first_token {
            let received = load.requests.iter().find(|r| r.id == *id).map_or(0, |r| r.received);
            prop_assert_eq!(parts.total(), at - received, "request {}: {:?}", id, parts);
        }
        let again = Driver::new(&load).run()?;
        prop_assert_eq!(run.decisions, again.decisions);
    }

    /// The parts of a TTFT sum to it, to the nanosecond.
    #[test]
    fn ttft_parts_sum_to_ttft(load in load()) {
        let run = Driver::new(&load).run()?;
        for (id, (at, parts)) in &run.first_token {
            let received = load.requests.iter().find(|r| r.id == *id).map_or(0, |r| r.received);
            prop_assert_eq!(parts.total(), at - received, "request {}: {:?}", id, parts);
        }
    }

    /// The same calls give the same decisions.
    #[test]
    fn same_inputs_same_decisions(load in load()) {
        let (a, b) = (Driver::new(&load).run()?, Driver::new(&load).run()?);
        prop_assert_eq!(a.decisions, b.decisions);
    }

    /// Under `skip` and `affinity`, who needs a slot does not go past a request that has waited for
    /// one longer than the bound. (Who was given a slot before may start.)
    #[test]
    fn the_age_bound_holds(mut load in load(), affinity in any::<bool>()) {
        load.config.policy = if affinity { Policy::Affinity } else { Policy::Skip };
        load.config.max_skip_age /= 20;
        Driver::new(&load).checking_age_bound().run()?;
    }

    /// Under `fcfs` requests start in order of arrival, but for those that held a slot already.
    #[test]
    fn fcfs_starts_in_order(mut load in load()) {
        load.config.policy = Policy::Fcfs;
        load.config.swap_mode = SwapMode::Blocking;
        load.config.prefetch = 0;
        load.config.kv_blocks = 100_000;
        load.cancels.clear();
        let run = Driver::new(&load).run()?;
        prop_assert!(run.started.is_sorted(), "{:?}", run.started);
    }

    /// With every adapter resident nothing is swapped and nobody waits for slot or swap.
    #[test]
    fn all_resident_means_no_swaps(mut load in load()) {
        load.config.gpu_loras = load.config.adapters.len();
        load.config.host_loras = None;
        let run = Driver::new(&load).run()?;
        prop_assert_eq!(run.swaps, 0);
        for (_, parts) in run.first_token.values() {
            prop_assert_eq!(parts.slot + parts.swap, 0);
        }
    }
}

/// The generator reaches the corners that the properties are about.
#[test]
fn the_generator_reaches_every_corner() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut preempted, mut swaps, mut cancelled, mut chunked, mut prefetched) = (0, 0, 0, 0, 0);
    for _ in 0..200 {
        let load: Load = load().new_tree(&mut runner).unwrap().current();
        let run = Driver::new(&load).run().unwrap();
        preempted += run.preempted;
        swaps += run.swaps;
        prefetched += run.prefetched;
        cancelled += run.ended.values().filter(|&&e| e == Ended::Cancelled).count();
        chunked += run.chunks;
    }
    let (mut fetches, mut failed, mut gone, mut pinned, mut refused) = (0, 0, 0, 0, 0);
    for _ in 0..200 {
        let load: Load = changing_load().new_tree(&mut runner).unwrap().current();
        let run = Driver::new(&load).run().unwrap();
        fetches += run.fetches;
        failed += run.ended.values().filter(|&&e| e == Ended::Failed).count();
        gone += run.gone.len();
        pinned += run.pinned;
        refused += run.refused.len();
    }
    for (what, count) in [
        ("reads from disk", fetches),
        ("requests whose adapter could not be read", failed),
        ("adapters removed", gone),
        ("pins", pinned),
        ("requests for adapters that are not there", refused),
        ("preemptions", preempted),
        ("swaps", swaps),
        ("prefetches", prefetched),
        ("cancellations", cancelled),
        ("chunked prompts", chunked),
    ] {
        assert!(count > 50, "only {count} {what} in 200 runs");
    }
}
