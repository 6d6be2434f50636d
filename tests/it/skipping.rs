//! Runs of decode steps taken at once come out, to the nanosecond, as the same steps one by one.

use lora_hbm::profile::CostModel;
use lora_hbm::sim::{Input, ModelDevice, Observer, Outcome, SimRequest, Totals};
use lora_sched::{AdapterSpec, Config, Evict, Nanos, Policy, Scheduler, StepPlan, SwapMode, SwapPlan};
use rand::seq::IndexedRandom as _;
use rand::{Rng, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::oracles::machine;

/// What a run tells, with or without a look at each step.
#[derive(Debug, Default, PartialEq)]
struct Seen<const EVERY: bool> {
    outcomes: Vec<Outcome>,
    swaps: Vec<(Nanos, SwapPlan)>,
    /// Steps that were told of.
    told: u64,
}

impl<const EVERY: bool> Observer for Seen<EVERY> {
    const EVERY_STEP: bool = EVERY;

    fn outcome(&mut self, outcome: &Outcome) {
        self.outcomes.push(*outcome);
    }

    fn step(&mut self, _: &StepPlan) {
        self.told += 1;
    }

    fn swap(&mut self, now: Nanos, swap: &SwapPlan) {
        self.swaps.push((now, *swap));
    }
}

struct Case {
    config: Config,
    costs: Vec<(&'static str, f64)>,
    swap: Nanos,
    slowdown: f64,
    reading_s: f64,
    gap: Nanos,
    inputs: Vec<Input>,
}

/// A configuration in which everything may bind: places, tokens, blocks, slots, ages.
fn case(seed: u64) -> Case {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let adapters = rng.random_range(1..12);
    let max_num_seqs = rng.random_range(1..7);
    let block_size = *[1, 4, 16].choose(rng).unwrap();
    let max_model_len = rng.random_range(60..400);
    let chunked = rng.random_bool(0.8);
    let swap_mode = *SwapMode::ALL.choose(rng).unwrap();
    let tight = usize::div_ceil(max_model_len, block_size) + max_num_seqs;
    let config = Config {
        adapters: (0..adapters).map(|i| AdapterSpec::new(if i % 2 == 0 { 8 } else { 64 }, 1)).collect(),
        gpu_loras: rng.random_range(1..=adapters),
        max_num_seqs,
        max_num_batched_tokens: if chunked { rng.random_range(8..200) } else { max_model_len },
        max_model_len,
        block_size,
        kv_blocks: if rng.random_bool(0.5) { tight } else { tight * 6 },
        chunked_prefill: chunked,
        policy: *Policy::ALL.choose(rng).unwrap(),
        evict: *Evict::ALL.choose(rng).unwrap(),
        swap_mode,
        prefetch: if swap_mode == SwapMode::Blocking { 0 } else { rng.random_range(0..4) },
        max_skip_age: rng.random_range(1..20_000_000),
        host_loras: None,
        max_queue: usize::MAX,
    };
    let mean_gap = *[300_000, 3_000_000, 30_000_000].choose(rng).unwrap();
    Case {
        costs: vec![
            ("step", rng.random_range(0.0..900_000.0)),
            ("tokens:0-", rng.random_range(0.0..3_000.0)),
            ("prefill_pairs", 0.3),
            ("decode_context:0-300", rng.random_range(0.0..90.0)),
            ("decode_context:300-700", 0.0),
            ("decode_context:700-", rng.random_range(0.0..90.0)),
            ("adapters", rng.random_range(0.0..9_000.0)),
            ("lora_token_ranks", 1.7),
        ],
        swap: rng.random_range(0..4_000_000),
        slowdown: if rng.random_bool(0.5) { 0.0 } else { 0.13 },
        gap: if rng.random_bool(0.3) { 0 } else { rng.random_range(0..80_000) },
        inputs: inputs(rng, &config, mean_gap),
        reading_s: if rng.random_bool(0.5) { 0.0 } else { rng.random_range(0.0..9e-4) },
        config,
    }
}

fn inputs(rng: &mut impl Rng, config: &Config, mean_gap: u64) -> Vec<Input> {
    let mut at = 0;
    let mut inputs = Vec::new();
    for id in 0..rng.random_range(1..40) {
        at += rng.random_range(0..2 * mean_gap);
        let prompt_tokens = rng.random_range(1..config.max_model_len as u32 - 1);
        let output_tokens = rng.random_range(1..=config.max_model_len as u32 - prompt_tokens);
        let adapter = rng.random_bool(0.9).then(|| rng.random_range(0..config.adapters.len() as u32));
        let request = SimRequest { id, received: at, queued: at, adapter, prompt_tokens, output_tokens };
        inputs.push(Input::Arrive(request));
        if rng.random_bool(0.1) {
            inputs.push(Input::Cancel { at: at + rng.random_range(0..40_000_000), arrival: id });
        }
    }
    inputs.sort_by_key(Input::at);
    inputs
}

fn run<const EVERY: bool>(case: &Case) -> (Seen<EVERY>, Totals, Scheduler) {
    let mut profile = machine(&case.costs, case.swap, case.gap);
    profile.swap.step_slowdown = case.slowdown;
    profile.swap.reading_s = case.reading_s;
    let cost = CostModel::new(&profile.signed()).unwrap();
    let ranks = case.config.adapters.iter().map(|a| a.rank).collect();
    let mut device = ModelDevice::new(cost, ranks, case.config.swap_mode);
    let mut scheduler = Scheduler::new(case.config.clone()).unwrap();
    let mut seen = Seen::default();
    let inputs = case.inputs.iter().copied();
    let totals = lora_hbm::sim::run(&mut scheduler, &mut device, inputs, &mut seen).unwrap();
    scheduler.audit().unwrap();
    (seen, totals, scheduler)
}

#[test]
fn a_thousand_configurations_come_out_the_same_step_by_step() {
    let (mut skipped, mut steps, mut preemptions) = (0, 0, 0);
    for seed in 0..1_000 {
        let case = case(seed);
        let (one_by_one, totals, by_steps) = run::<true>(&case);
        let (at_once, same_totals, by_runs) = run::<false>(&case);
        assert_eq!(totals, same_totals, "seed {seed}");
        assert_eq!(one_by_one.outcomes, at_once.outcomes, "seed {seed}");
        assert_eq!(one_by_one.swaps, at_once.swaps, "seed {seed}");
        // Down to which blocks are free in which order, which the next plan would show.
        assert_eq!(format!("{by_steps:?}"), format!("{by_runs:?}"), "seed {seed}");
        assert_eq!(one_by_one.told, totals.steps);
        skipped += totals.steps - at_once.told;
        steps += totals.steps;
        preemptions += totals.preemptions;
    }
    // Otherwise this would compare nothing with nothing.
    assert!(skipped * 3 > steps, "{skipped} of {steps} steps were skipped");
    assert!(preemptions > 500, "{preemptions} preemptions");
}

/// The same seeds on one thread and on several.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    use rayon::prelude::*;
    let of = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            (0..60u64).into_par_iter().map(|seed| run::<false>(&case(seed)).0).collect::<Vec<_>>()
        })
    };
    assert_eq!(of(1), of(4));
}
