//! Running a cell on the simulator.

use lora_sched::{AdapterSpec, Config, ConfigError, EventError, Nanos, Scheduler};

use super::tally::Tally;
use super::{Cell, EngineSettings, SizeError, parse_size};
use crate::profile::{CostModel, Profile, ProfileError, Scale, ScaleError, nearest};
use crate::report::record::{PartsS, RequestRecord, Status};
use crate::report::results::{ResultRow, RunContext};
use crate::sim::{FrontEnd, ModelDevice, Observer, Outcome, SimRequest, Totals, run};
use crate::workload::arrivals::Arrivals;
use crate::workload::pool::PromptPool;
use crate::workload::spec::{Amount, MOST_REQUESTS, MOST_SECONDS, Requests, WorkloadError, WorkloadSpec};
use crate::workload::trace::{Trace, TraceRequest};

/// Requests in the burst whose draining gives the saturation rate, at least.
pub const BURST: u64 = 200;
/// And so many for each sequence place: while the last ones drain, places are empty, which a saturated engine's never
/// are.
const BURST_A_PLACE: u64 = 4;

/// Later than this nothing can arrive, ten times what workloads are refused at by their rate: the clock counts nanoseconds
/// to the end of its 64 bits, and arrivals would pile up there.
const LATEST_NS: Nanos = 10 * MOST_SECONDS as Nanos * 1_000_000_000;

/// A cell that cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The profile does not cover it.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A factor on its costs that is none.
    #[error(transparent)]
    Scale(#[from] ScaleError),
    /// Impossible settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A size that is not one.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The trace asks for an adapter that there is not, or similar.
    #[error("the simulator broke down: {0}")]
    Event(#[from] EventError),
    /// A workload that cannot be drawn.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A request that comes too late for the clock.
    #[error("a request arrives later than {:e} s after the start: raise the rate", LATEST_NS as f64 / 1e9)]
    Late,
    /// Requests that the engine would refuse.
    #[error(
        "{refused} of {all} requests are longer than max_model_len ({max_model_len} tokens): raise it, or use another regime"
    )]
    Refused {
        /// How many.
        refused: u64,
        /// Of how many.
        all: u64,
        /// The limit.
        max_model_len: usize,
    },
}

impl SimulateError {
    /// Whether it is a matter of the budget: with fewer slots there would be room.
    pub fn is_of_the_budget(&self) -> bool {
        matches!(self, Self::Profile(e) if e.is_of_the_budget())
    }
}

/// What came of a simulated run.
#[derive(Clone, Debug)]
pub struct Simulated {
    /// One a request, in order of the trace.
    pub records: Vec<RequestRecord>,
    /// Sums.
    pub totals: Totals,
}

/// A profile made ready to simulate with.
#[derive(Clone, Debug)]
pub struct Simulator {
    profile: Profile,
    cost: CostModel,
}

impl Simulator {
    /// A simulator of the profile's machine.
    pub fn new(profile: Profile) -> Result<Self, ProfileError> {
        let cost = CostModel::new(&profile)?;
        Ok(Self { profile, cost })
    }

    /// A simulator of a machine with other rates.
    pub fn scaled(&self, by: Scale) -> Result<Self, SimulateError> {
        Ok(Self::new(self.profile.scaled(by)?)?)
    }

    /// Requests in the burst that tells an engine's saturation rate: they follow from the engine alone.
    pub fn burst(engine: &EngineSettings) -> u64 {
        BURST.max(BURST_A_PLACE * u64::from(engine.max_num_seqs)).min(MOST_REQUESTS)
    }

    /// The profile.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The scheduler's configuration for these settings on the profile's machine.
    pub fn config(&self, engine: &EngineSettings) -> Result<Config, SimulateError> {
        self.profile.expect_model(&engine.model)?;
        let ranks = engine.ranks();
        let adapters = (0..engine.total_loras as usize).map(|i| {
            let rank = ranks[i % ranks.len()];
            Ok(AdapterSpec::new(rank, self.profile.adapter_bytes(rank)?))
        });
        let max_model_len = engine.max_model_len.unwrap_or(self.profile.engine.max_model_len) as usize;
        let kv_memory = engine.kv_memory.as_deref().map(parse_size).transpose()?;
        let kv_blocks = self.profile.kv_blocks(
            engine.gpu_loras as usize,
            ranks.iter().copied().max().unwrap_or(engine.max_r),
            engine.block_size as usize,
            max_model_len,
            kv_memory,
        )?;
        // More than the sequences can use is not allocated.
        let useful = engine.max_num_seqs as usize * max_model_len.div_ceil(engine.block_size as usize);
        let config = Config {
            adapters: adapters.collect::<Result<_, ProfileError>>()?,
            gpu_loras: engine.gpu_loras as usize,
            max_num_seqs: engine.max_num_seqs as usize,
            max_num_batched_tokens: engine.max_num_batched_tokens as usize,
            max_model_len,
            block_size: engine.block_size as usize,
            kv_blocks: kv_blocks.min(useful),
            chunked_prefill: !engine.no_enable_chunked_prefill,
            policy: engine.policy,
            evict: engine.evict,
            swap_mode: engine.swap_mode,
            prefetch: engine.prefetch as usize,
            max_skip_age: (engine.max_skip_age * 1e9) as Nanos,
            host_loras: None,
            max_queue: usize::MAX,
        };
        config.validate()?;
        Ok(config)
    }

    /// Replays a trace on a cell's engine.
    pub fn run(&self, engine: &EngineSettings, trace: &Trace) -> Result<Simulated, SimulateError> {
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(trace.requests.len());
        let totals = self.observe(engine, trace.requests.iter().map(Asked::of), &mut outcomes)?;
        outcomes.sort_by_key(|o| o.request.id);
        let ranks = engine.ranks();
        let deliver = self.cost.deliver_ns;
        let records = outcomes.iter().map(|o| record(o, &ranks, deliver)).collect();
        Ok(Simulated { records, totals })
    }

    /// Simulates requests one by one as they come, for statistics alone: memory grows by the requests
    /// that wait and by a TTFT each. `expected` is how many are expected, of which the first `warm_up`
    /// are left out of the statistics.
    pub fn stream(
        &self,
        engine: &EngineSettings,
        requests: impl IntoIterator<Item = TraceRequest>,
        (expected, warm_up): (usize, u64),
        context: &RunContext,
    ) -> Result<ResultRow, SimulateError> {
        let mut tally = Tally::new(expected, warm_up, self.cost.deliver_ns);
        let asked = requests.into_iter().map(|r| Asked::of(&r));
        let totals = self.observe(engine, asked, &mut tally)?;
        let mut row = tally.row(context);
        row.duration_seconds = Some(totals.end as f64 * 1e-9);
        row.swap_count = Some(totals.swaps);
        Ok(row)
    }

    /// The highest rate that the engine sustains on requests like these: [`BURST`] of them at once, or four a sequence
    /// place if that is more, over the time that they take. A trace that is shorter comes over again. Requests a second.
    pub fn saturation_rate(&self, engine: &EngineSettings, trace: &Trace) -> Result<f64, SimulateError> {
        self.burst_rate(engine, trace.requests.iter().cycle().map(Asked::of))
    }

    /// [`Self::saturation_rate`] of requests that are drawn, as many as it takes whatever `spec` says of their number.
    pub fn saturation_rate_of(
        &self,
        engine: &EngineSettings,
        spec: &WorkloadSpec,
        pool: &PromptPool,
    ) -> Result<f64, SimulateError> {
        let spec = WorkloadSpec {
            arrivals: Arrivals::Fixed,
            rate: 1.0,
            amount: Amount::Requests(Self::burst(engine)),
            ..spec.clone()
        };
        self.burst_rate(engine, Requests::new(&spec, pool)?.map(|r| Asked::of(&r)))
    }

    fn burst_rate(
        &self,
        engine: &EngineSettings,
        requests: impl Iterator<Item = Asked>,
    ) -> Result<f64, SimulateError> {
        let burst = (0..Self::burst(engine)).zip(requests).map(|(id, asked)| Asked { id, at: 0, ..asked });
        let totals = self.observe(engine, burst, &mut Nobody)?;
        Ok(totals.requests as f64 / (totals.end.max(1) as f64 * 1e-9))
    }

    /// What these settings ask of the profile beyond what was calibrated, in words.
    pub fn extrapolated(&self, engine: &EngineSettings) -> Option<String> {
        let calibrated = self.profile.engine.max_num_seqs;
        (engine.max_num_seqs > calibrated).then(|| {
            format!(
                "max_num_seqs is {} and the profile was calibrated with up to {calibrated} sequences: what larger steps take \
                 is extrapolated",
                engine.max_num_seqs
            )
        })
    }

    /// Runs requests through a cell's engine under an observer's eyes.
    pub fn observe(
        &self,
        engine: &EngineSettings,
        requests: impl IntoIterator<Item = Asked>,
        observer: &mut impl Observer,
    ) -> Result<Totals, SimulateError> {
        let config = self.config(engine)?;
        let ranks: Vec<u32> = config.adapters.iter().map(|a| a.rank).collect();
        let late = std::cell::Cell::new(false);
        let in_time = requests.into_iter().take_while(|asked| {
            late.set(asked.at > LATEST_NS);
            !late.get()
        });
        let inputs = FrontEnd::new(in_time.map(|asked| SimRequest {
            id: asked.id,
            received: asked.at,
            queued: asked.at + self.cost.front_ns(asked.prompt_tokens),
            adapter: asked.adapter,
            prompt_tokens: asked.prompt_tokens,
            output_tokens: asked.output_tokens,
        }));
        let max_model_len = config.max_model_len;
        let mut device = ModelDevice::new(self.cost.clone(), ranks, config.swap_mode);
        let mut scheduler = Scheduler::new(config)?;
        let totals = run(&mut scheduler, &mut device, inputs, observer)?;
        if late.get() {
            return Err(SimulateError::Late);
        }
        if totals.refused > 0 {
            let all = totals.requests + totals.refused;
            return Err(SimulateError::Refused { refused: totals.refused, all, max_model_len });
        }
        Ok(totals)
    }
}

/// A request as a trace tells it, times in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its number in the trace.
    pub id: u64,
    /// When the server gets it.
    pub at: Nanos,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// Prompt length.
    pub prompt_tokens: u32,
    /// Output length.
    pub output_tokens: u32,
}

impl Asked {
    /// A trace's request.
    pub fn of(request: &TraceRequest) -> Self {
        Self {
            id: request.id,
            // What is too late stays too late, and a number of nanoseconds.
            at: nearest((request.arrival_s * 1e9).min(1.5 * LATEST_NS as f64)),
            adapter: request.adapter,
            prompt_tokens: request.prompt_tokens,
            output_tokens: request.output_tokens,
        }
    }
}

/// Where only the totals matter.
struct Nobody;

impl Observer for Nobody {}

/// `ranks` are those that adapters cycle through.
fn record(outcome: &Outcome, ranks: &[u32], deliver: Nanos) -> RequestRecord {
    let s = |ns: Nanos| ns as f64 * 1e-9;
    let Outcome { request, first, last, parts, .. } = outcome;
    let arrival = s(request.received);
    RequestRecord {
        id: request.id,
        adapter: request.adapter,
        rank: request.adapter.map(|a| ranks[a as usize % ranks.len()]),
        prompt_tokens: request.prompt_tokens,
        output_tokens: request.output_tokens,
        scheduled_s: arrival,
        sent_s: arrival,
        first_s: Some(s(first + deliver)),
        last_s: Some(s(last + deliver)),
        ttft_s: Some(s(first + deliver - request.received)),
        latency_s: Some(s(last + deliver - request.received)),
        status: Status::Ok,
        parts: Some(PartsS {
            front: s(parts.front),
            queue: s(parts.queue),
            kv: s(parts.kv),
            slot: s(parts.slot),
            swap: s(parts.swap),
            prefill: s(parts.prefill),
            deliver: s(deliver),
        }),
        error: None,
    }
}

/// Whether a rate is beyond what an engine sustains, by a saturation rate of its own budget.
pub fn is_saturated(rate: f64, saturation_rate: f64) -> bool {
    rate > 0.95 * saturation_rate
}

impl Cell {
    /// The same cell with every adapter resident: what load is measured against.
    pub fn at_full_budget(&self) -> EngineSettings {
        EngineSettings { gpu_loras: self.engine.total_loras, ..self.engine.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::round;
    use crate::workload::popularity::Popularity;
    use crate::workload::regime::Regime;
    use crate::workload::spec::generate_trace;

    fn engine(gpu_loras: u32) -> EngineSettings {
        EngineSettings { model: "tiny".to_owned(), gpu_loras, ..EngineSettings::default() }
    }

    fn spec(rate: f64, requests: u64) -> WorkloadSpec {
        WorkloadSpec {
            regime: Regime::Short,
            arrivals: Arrivals::Poisson,
            rate,
            popularity: Popularity::Uniform,
            total_loras: 128,
            amount: Amount::Requests(requests),
            max_tokens: 16,
            seed: 1,
            ranks: vec![8],
        }
    }

    fn trace(rate: f64) -> Trace {
        generate_trace(&spec(rate, 400), &PromptPool::embedded(Regime::Short)).unwrap()
    }

    fn median(simulated: &Simulated) -> f64 {
        let ttft: Vec<f64> = simulated.records.iter().filter_map(|r| r.ttft_s).collect();
        crate::report::stats::median(&crate::report::stats::sorted(&ttft)).unwrap()
    }

    #[test]
    fn a_small_budget_makes_requests_wait_for_slots() {
        let simulator = Simulator::new(round()).unwrap();
        let rate = 0.6 * simulator.saturation_rate(&engine(128), &trace(1.0)).unwrap();
        let trace = trace(rate);
        let small = simulator.run(&engine(2), &trace).unwrap();
        let full = simulator.run(&engine(128), &trace).unwrap();
        assert_eq!((small.records.len(), full.totals.swaps), (400, 0));
        assert!(median(&small) > 2.0 * median(&full));
        let slot: f64 = small.records.iter().filter_map(|r| r.parts).map(|p| p.slot).sum();
        assert!(slot > 0.0);
        for r in &small.records {
            let sum = r.parts.unwrap().total();
            assert!((sum - r.ttft_s.unwrap()).abs() < 1e-9, "{r:?}");
        }
    }

    #[test]
    fn what_an_engine_sustains_does_not_hang_on_the_number_of_requests() {
        let simulator = Simulator::new(round()).unwrap();
        let pool = PromptPool::embedded(Regime::Short);
        for max_num_seqs in [16, 128] {
            let engine = EngineSettings { max_num_seqs, ..engine(16) };
            let rate = |n| simulator.saturation_rate_of(&engine, &spec(3.0, n), &pool).unwrap();
            let rates = [1, 10, 50, 200, 5000].map(rate);
            assert_eq!(rates, [rates[0]; 5], "{max_num_seqs} sequences");
            // The first of a long trace are the same requests; a short one comes over again.
            let long = generate_trace(&spec(3.0, 5000), &pool).unwrap();
            assert_eq!(simulator.saturation_rate(&engine, &long).unwrap(), rates[0]);
            let short = Trace { requests: long.requests[..10].to_vec(), ..long.clone() };
            let over_again =
                long.requests.iter().take(10).cycle().take(Simulator::burst(&engine) as usize).cloned();
            let over_again = Trace { requests: over_again.collect(), ..long.clone() };
            let rate = |trace| simulator.saturation_rate(&engine, trace).unwrap();
            assert_eq!(rate(&short), rate(&over_again));
        }
    }

    #[test]
    fn a_request_beyond_the_clock_is_refused() {
        let simulator = Simulator::new(round()).unwrap();
        let mut trace = trace(1.0);
        trace.requests[399].arrival_s = 1e11;
        let error = simulator.run(&engine(2), &trace).unwrap_err().to_string();
        assert!(error.contains("later than 1e10 s"), "{error}");
    }

    #[test]
    fn other_models_ranks_and_lengths_are_refused() {
        let simulator = Simulator::new(round()).unwrap();
        let refused = |engine: EngineSettings| simulator.run(&engine, &trace(1.0)).unwrap_err().to_string();
        assert!(
            refused(EngineSettings { model: "facebook/opt-125m".into(), ..engine(2) }).contains("opt-125m")
        );
        assert!(refused(EngineSettings { max_r: 64, ..engine(2) }).contains("--ranks 64"));
        assert!(refused(EngineSettings { max_model_len: Some(300), ..engine(2) }).contains("max_model_len"));
        assert!(
            refused(EngineSettings { kv_memory: Some("1MiB".into()), ..engine(2) })
                .contains("raise --kv-memory")
        );
        assert!(refused(EngineSettings { kv_memory: Some("lots".into()), ..engine(2) }).contains("'lots'"));
    }
}
