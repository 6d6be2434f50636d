//! What must not change, or must change in proportion, when something else does.

use lora_hbm::profile::{CostModel, Profile};
use lora_hbm::sim::{Input, ModelDevice, Observer, Outcome, SimRequest, Totals};
use lora_hbm::workload::popularity::Popularity;
use lora_sched::{AdapterSpec, Config, Evict, Nanos, Scheduler, SwapMode};

use super::{Flaw, Service, System, machine};

/// A server of batches with everything at once: chunks, swaps, host gaps, tight KV memory.
#[derive(Clone, Debug)]
pub struct Serving {
    config: Config,
    profile: Profile,
    /// Of arrival times and of the age bound; the profile has its own.
    times: Nanos,
}

/// All of its costs and arrivals `scale` times those of `serving(_, 1, _)`.
pub fn serving(swap_mode: SwapMode, scale: Nanos, gpu_loras: usize) -> Serving {
    let ns = |n: f64| n * scale as f64;
    // Costs are whole and divide by the layers, so that no rounding comes in.
    let costs = [
        ("step", ns(400_000.0)),
        ("tokens:0-64", ns(3_000.0)),
        ("tokens:64-", ns(1_000.0)),
        ("decode_context:0-", ns(20.0)),
    ];
    let profile = machine(&costs, 800_000 * scale, 40_000 * scale);
    let config = Config {
        adapters: vec![AdapterSpec::new(8, 1); 24],
        gpu_loras,
        max_num_seqs: 6,
        max_num_batched_tokens: 512,
        max_model_len: 1200,
        kv_blocks: 150,
        swap_mode,
        max_skip_age: 30_000_000 * scale,
        ..Config::default()
    };
    Serving { config, profile, times: scale }
}

impl Serving {
    pub fn run<O: Observer>(&self, seed: u64, count: usize, observer: &mut O) -> Totals {
        let system = System {
            adapters: self.config.adapters.len() as u32,
            popularity: Popularity::Zipf { s: 0.6 },
            ..System::queue(0.28, Service::Geometric { steps: 12 })
        };
        let inputs = system.requests(seed).take(count).map(|input| match input {
            Input::Arrive(r) => {
                let at = r.queued * self.times;
                let prompt_tokens = 100 + (r.id * 7919 % 900) as u32;
                Input::Arrive(SimRequest { received: at, queued: at, prompt_tokens, ..r })
            }
            cancel => cancel,
        });
        let ranks = self.config.adapters.iter().map(|a| a.rank).collect();
        let mut device =
            ModelDevice::new(CostModel::new(&self.profile).unwrap(), ranks, self.config.swap_mode);
        let mut scheduler = Scheduler::new(self.config.clone()).unwrap();
        lora_hbm::sim::run(&mut scheduler, &mut device, inputs, observer).unwrap()
    }

    /// First and last token of each request, in order of arrival.
    fn times(&self) -> Vec<(Nanos, Nanos)> {
        let mut outcomes: Vec<Outcome> = Vec::new();
        self.run(29, 2_000, &mut outcomes);
        outcomes.sort_by_key(|o| o.arrival);
        outcomes.iter().map(|o| (o.first, o.last)).collect()
    }
}

#[test]
fn all_times_so_many_times_as_long_give_all_results_so_many_times_as_long() {
    let scale = 3;
    let forgotten_gap = |mode| {
        let mut serving = serving(mode, scale, 4);
        serving.profile.host.loop_s /= scale as f64;
        serving.profile = serving.profile.signed();
        serving.times()
    };
    let forgotten_bound = |mode| {
        let mut serving = serving(mode, scale, 4);
        serving.config.max_skip_age /= scale;
        serving.times()
    };
    for mode in [SwapMode::Blocking, SwapMode::Overlap] {
        let scaled: Vec<_> =
            serving(mode, 1, 4).times().into_iter().map(|(a, b)| (scale * a, scale * b)).collect();
        assert!(serving(mode, scale, 4).times() == scaled, "{mode}");
        assert!(forgotten_gap(mode) != scaled, "{mode}: an unscaled host gap went unnoticed");
        assert!(forgotten_bound(mode) != scaled, "{mode}: an unscaled age bound went unnoticed");
    }
    // Copies that share the copy engine end between nanoseconds and are rounded: to be compared as a
    // whole.
    let mean =
        |times: &[(Nanos, Nanos)]| times.iter().map(|t| (t.0 + t.1) as f64).sum::<f64>() / times.len() as f64;
    let mode = SwapMode::Layered;
    let expected = mean(&serving(mode, 1, 4).times()) * scale as f64;
    let off = |seen: &[(Nanos, Nanos)]| (mean(seen) / expected - 1.0).abs();
    assert!(off(&serving(mode, scale, 4).times()) < 1e-6);
    assert!(off(&forgotten_gap(mode)) > 1e-5, "an unscaled host gap went unnoticed");
}

#[test]
fn without_swap_costs_budgets_that_do_not_bind_are_all_alike() {
    // With `overlap` a request waits for the next plan even where its copy takes no time.
    for mode in [SwapMode::Blocking, SwapMode::Layered] {
        let free = |gpu_loras: usize, swap: f64| {
            let mut serving = serving(mode, 1, gpu_loras);
            serving.profile.swap.fixed_s = swap;
            serving.profile = serving.profile.signed();
            serving.times()
        };
        let full = free(24, 0.0);
        // Six sequences pin six adapters at most; a seventh can always be loaded.
        for budget in [7, 10, 23] {
            assert!(free(budget, 0.0) == full, "{mode}, {budget} slots");
        }
        assert!(free(2, 0.0) != full, "{mode}: slots that bind went unnoticed");
        assert!(free(10, 2e-5) != full, "{mode}: swaps of 20 µs went unnoticed");
    }
}

/// Misses of one sequence at a time on a trace of adapters.
fn misses(trace: &[u32], adapters: u32, slots: usize, evict: Evict) -> u64 {
    let system = System { adapters, slots, evict, swap: 10, ..System::queue(0.5, Service::Fixed) };
    let config = system.config();
    let ranks = config.adapters.iter().map(|a| a.rank).collect();
    let cost = CostModel::new(&machine(&[("step", 100.0)], 10, 0)).unwrap();
    let mut device = ModelDevice::new(cost, ranks, config.swap_mode);
    let mut scheduler = Scheduler::new(config).unwrap();
    let inputs = trace.iter().zip(0u64..).map(|(&adapter, id)| {
        let at = id * 1_000;
        Input::Arrive(SimRequest {
            id,
            received: at,
            queued: at,
            adapter: Some(adapter),
            prompt_tokens: 1,
            output_tokens: 1,
        })
    });
    lora_hbm::sim::run(&mut scheduler, &mut device, inputs, &mut Vec::new()).unwrap().swaps
}

#[test]
fn with_one_sequence_lru_never_misses_more_for_more_slots() {
    let monotone = |trace: &[u32], adapters: u32, slots: &[usize], evict| {
        let seen: Vec<u64> = slots.iter().map(|&c| misses(trace, adapters, c, evict)).collect();
        if seen.is_sorted_by(|a, b| a >= b) { Ok(()) } else { Err(format!("{seen:?}")) }
    };
    for (seed, popularity) in [(1, Popularity::Uniform), (2, Popularity::Zipf { s: 1.0 })] {
        let system = System { adapters: 24, popularity, ..System::queue(0.5, Service::Fixed) };
        let trace: Vec<u32> = system
            .requests(seed)
            .take(3_000)
            .filter_map(|i| match i {
                Input::Arrive(r) => r.adapter,
                Input::Cancel { .. } | Input::Adapter { .. } => None,
            })
            .collect();
        let slots: Vec<usize> = (1..=24).collect();
        monotone(&trace, 24, &slots, Evict::Lru).unwrap();
    }
    // Belady's anomaly (1969): first in, first out misses 9 times with three slots and 10 with four.
    // Adapters 0 to 3 are what the slots hold at first and nobody asks for.
    let trace = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5].map(|a: u32| a + 3);
    monotone(&trace, 9, &[3, 4], Evict::Lru).unwrap();
    assert_eq!(monotone(&trace, 9, &[3, 4], Evict::Fifo), Err("[9, 10]".to_owned()));
}

/// The flaws of the other files are flaws of the system and not of the harness: without one, two
/// runs of a seed are the same.
#[test]
fn a_seed_gives_one_run() {
    let system = System { adapters: 8, slots: 4, swap: 50, ..System::queue(0.6, Service::Exponential) };
    let run = |system: &System, seed| {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let totals = system.run(seed, 2_000, &mut outcomes);
        (outcomes, totals)
    };
    assert_eq!(run(&system, 1), run(&system, 1));
    assert_ne!(run(&system, 1), run(&system, 2));
    assert_ne!(run(&system, 1), run(&system.with(Flaw::Swap(2.0)), 1));
}
