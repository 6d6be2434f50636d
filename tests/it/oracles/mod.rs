//! The simulator held against queueing and caching theory: each formula is a test, and beside it run
//! systems that are slightly wrong and that the test must tell from the right one.
//!
//! Seeds are fixed, so a test passes or fails for good. Levels are family-wise: [`CHECKS`]
//! comparisons share [`LEVEL`], so that a sound simulator with other seeds would fail one of the
//! whole family about once in a thousand families.

mod caches;
mod laws;
mod metamorphic;
mod queues;
mod samplers;

use lora_hbm::profile::{
    AdapterCosts, CostModel, EngineFacts, Holdout, HostCosts, Kind, Profile, Quantiles, SCHEMA_VERSION,
    StepCosts, SwapCosts,
};
use lora_hbm::report::stats::{Interval, mean_interval};
use lora_hbm::sim::{Input, ModelDevice, Observer, SimRequest, Totals};
use lora_hbm::workload::arrivals::{ArrivalTimes, Arrivals};
use lora_hbm::workload::popularity::{AdapterDraw, Popularity};
use lora_hbm::workload::streams::stream;
use lora_sched::{AdapterSpec, Config, Evict, Nanos, Policy, Scheduler, SwapMode};
use rand::distr::Distribution as _;
use rand_distr::{Exp1, Geometric};

/// Chance that a sound simulator fails any check of the family.
const LEVEL: f64 = 1e-3;
/// Comparisons with a random outcome in all of these files, at most.
const CHECKS: f64 = 50.0;

/// The mean service time of the queues: a millisecond.
pub const SERVICE: Nanos = 1_000_000;

/// How prompts or outputs, and with them services, are distributed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Service {
    /// One prompt of `SERVICE` tokens of a nanosecond each.
    Fixed,
    /// Prompts of exponential length, likewise.
    Exponential,
    /// Outputs of geometric length, in steps of `SERVICE / steps`.
    Geometric {
        /// Mean number of steps.
        steps: u32,
    },
}

/// What is wrong with a system.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Flaw {
    /// Nothing.
    #[default]
    None,
    /// Every step takes so many times as long.
    Service(f64),
    /// Every swap takes so many times as long.
    Swap(f64),
    /// Gaps between arrivals are drawn with so many times the mean.
    Gaps(f64),
    /// One request in so many is lost: it enters and nothing is ever heard of it.
    Lost(u64),
    /// Another eviction rule.
    Evict(Evict),
    /// So many slots more (or fewer) than configured.
    Slots(isize),
    /// So many sequences more.
    Sequences(usize),
    /// Time between a step's end and the next submission.
    Gap(Nanos),
}

/// A queue with adapters: what the formulas are about, in the words of the scheduler.
#[derive(Clone, Debug)]
pub struct System {
    /// Load of one sequence's server, swaps left out: arrival rate times mean service over sequences.
    pub rho: f64,
    pub service: Service,
    pub sequences: usize,
    pub adapters: u32,
    pub slots: usize,
    pub popularity: Popularity,
    pub evict: Evict,
    /// Duration of a swap, before which the step that needs it does not start.
    pub swap: Nanos,
    pub flaw: Flaw,
}

impl System {
    /// One sequence, one adapter that is resident.
    pub fn queue(rho: f64, service: Service) -> Self {
        Self {
            rho,
            service,
            sequences: 1,
            adapters: 1,
            slots: 1,
            popularity: Popularity::Uniform,
            evict: Evict::Lru,
            swap: 0,
            flaw: Flaw::None,
        }
    }

    pub fn with(&self, flaw: Flaw) -> Self {
        Self { flaw, ..self.clone() }
    }

    /// Mean arrivals a nanosecond.
    pub fn rate(&self) -> f64 {
        self.rho * self.sequences as f64 / SERVICE as f64
    }

    pub fn config(&self) -> Config {
        let slots = match self.flaw {
            Flaw::Slots(more) => self.slots.saturating_add_signed(more),
            _ => self.slots,
        };
        let sequences = match self.flaw {
            Flaw::Sequences(more) => self.sequences + more,
            _ => self.sequences,
        };
        // Blocks and batches of any length: nothing binds but sequences and slots.
        let unbounded = 1 << 30;
        Config {
            adapters: vec![AdapterSpec::new(8, 1); self.adapters as usize],
            gpu_loras: slots,
            max_num_seqs: sequences,
            max_num_batched_tokens: unbounded,
            max_model_len: unbounded,
            block_size: unbounded,
            kv_blocks: 2 * sequences,
            policy: Policy::Fcfs,
            evict: match self.flaw {
                Flaw::Evict(evict) => evict,
                _ => self.evict,
            },
            swap_mode: SwapMode::Blocking,
            ..Config::default()
        }
    }

    fn profile(&self) -> Profile {
        let scale = match self.flaw {
            Flaw::Service(scale) => scale,
            _ => 1.0,
        };
        let swap_scale = match self.flaw {
            Flaw::Swap(scale) => scale,
            _ => 1.0,
        };
        let gap = match self.flaw {
            Flaw::Gap(gap) => gap,
            _ => 0,
        };
        let (per_step, per_token) = match self.service {
            Service::Fixed | Service::Exponential => (0.0, 1.0),
            Service::Geometric { steps } => (SERVICE as f64 / f64::from(steps), 0.0),
        };
        let costs = [("step", per_step * scale), ("tokens:0-", per_token * scale)];
        machine(&costs, (self.swap as f64 * swap_scale) as Nanos, gap)
    }

    /// Its requests, in order of arrival, without an end.
    pub fn requests(&self, seed: u64) -> impl Iterator<Item = Input> + use<> {
        let gaps = match self.flaw {
            Flaw::Gaps(scale) => scale,
            _ => 1.0,
        };
        let mut times = ArrivalTimes::new(Arrivals::Poisson, self.rate() * 1e9 / gaps, seed).unwrap();
        let mut adapters = AdapterDraw::new(self.popularity, self.adapters, seed);
        let mut services = stream(seed, "services");
        let service = self.service;
        (0..).map(move |id| {
            let queued = (times.next().unwrap() * 1e9) as Nanos;
            let (prompt_tokens, output_tokens) = match service {
                Service::Fixed => (SERVICE as u32, 1),
                Service::Exponential => {
                    let x: f64 = Exp1.sample(&mut services);
                    (((x * SERVICE as f64) as u32).max(1), 1)
                }
                Service::Geometric { steps } => {
                    // Failures before the first success, and the success.
                    let failures = Geometric::new(1.0 / f64::from(steps)).unwrap().sample(&mut services);
                    (1, failures as u32 + 1)
                }
            };
            let adapter = adapters.draw();
            Input::Arrive(SimRequest { id, received: queued, queued, adapter, prompt_tokens, output_tokens })
        })
    }

    /// Runs the first `count` requests to the end.
    pub fn run<O: Observer>(&self, seed: u64, count: usize, observer: &mut O) -> Totals {
        let config = self.config();
        let ranks = config.adapters.iter().map(|a| a.rank).collect();
        let cost = CostModel::new(&self.profile()).unwrap();
        let mut device = ModelDevice::new(cost, ranks, config.swap_mode);
        let mut scheduler = Scheduler::new(config).unwrap();
        let inputs = self.requests(seed).take(count);
        lora_hbm::sim::run(&mut scheduler, &mut device, inputs, observer).unwrap()
    }
}

/// A machine of these step costs (nanoseconds a unit), swap duration and host gap, and no others.
pub fn machine(costs: &[(&str, f64)], swap: Nanos, gap: Nanos) -> Profile {
    Profile {
        schema_version: SCHEMA_VERSION,
        kind: Kind::Engine,
        created: "2026-01-01T00:00:00Z".to_owned(),
        tool: "test".to_owned(),
        machine: serde_json::Value::Null,
        model: "theory".to_owned(),
        adapter: AdapterCosts { ranks: vec![8, 64], bytes: vec![1, 8] },
        engine: EngineFacts {
            device: "none".to_owned(),
            dtype: "none".to_owned(),
            threads: 1,
            layers: 4,
            block_size: 16,
            kv_block_bytes: 1 << 14,
            weights_bytes: 0,
            workspace_bytes: 0,
            memory_bytes: None,
            kv_memory_bytes: Some(1 << 40),
            max_model_len: 4352,
            max_num_batched_tokens: 4096,
            max_num_seqs: 16,
        },
        step: StepCosts {
            features: costs.iter().map(|c| c.0.to_owned()).collect(),
            coef_ns: costs.iter().map(|c| c.1).collect(),
        },
        swap: SwapCosts {
            fixed_s: swap as f64 * 1e-9,
            bytes_per_s: 1e30,
            busy_bytes_per_s: 1e30,
            step_slowdown: 0.0,
            reading_s: 0.0,
        },
        host: HostCosts {
            loop_s: gap as f64 * 1e-9,
            front_s: 0.0,
            tokenize_s_per_byte: 0.0,
            handover_s: 0.0,
            handover_bytes: 0.0,
            deliver_s: 0.0,
            bytes_per_token: 4.0,
        },
        residuals: Quantiles::default(),
        holdout: Holdout::default(),
        samples_file: None,
        sha256: String::new(),
    }
    .signed()
}

/// Asserts that the oracle holds of the sound system and of none of the flawed ones.
pub fn holds_and_catches(
    oracle: impl Fn(&System) -> Result<(), String>,
    sound: &System,
    flaws: impl IntoIterator<Item = Flaw>,
) {
    if let Err(message) = oracle(sound) {
        panic!("{message}\nof {sound:?}");
    }
    for flaw in flaws {
        assert!(oracle(&sound.with(flaw)).is_err(), "{flaw:?} went unnoticed in {sound:?}");
    }
}

/// Whether the mean of independent `values` may be `expected`, off by up to `bias` (a fraction of it)
/// either way that the formula itself does not account for.
pub fn mean_is(what: &str, values: &[f64], expected: f64, bias: f64) -> Result<(), String> {
    mean_is_between(what, values, expected * (1.0 - bias), expected * (1.0 + bias))
}

/// Whether the mean of independent `values` may lie between `low` and `high`.
pub fn mean_is_between(what: &str, values: &[f64], low: f64, high: f64) -> Result<(), String> {
    let seen = mean_interval(values, 1.0 - LEVEL / CHECKS).expect("more than one replicate");
    let Interval { low: from, high: to } = seen;
    if from <= high && low <= to {
        return Ok(());
    }
    Err(format!("{what}: {from:.6} to {to:.6} seen, {low:.6} to {high:.6} expected"))
}

/// `measure` of `count` seeds, on all cores.
pub fn replicates(count: u64, measure: impl Fn(u64) -> f64 + Sync) -> Vec<f64> {
    use rayon::prelude::*;
    (0..count).into_par_iter().map(&measure).collect()
}
