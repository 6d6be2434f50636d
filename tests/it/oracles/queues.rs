//! Waiting times of single and multiple servers.

use lora_hbm::sim::{Observer, Outcome};
use lora_hbm::workload::popularity::Popularity;
use lora_sched::{Nanos, StepPlan, SwapPlan};

use super::{Flaw, SERVICE, Service, System, holds_and_catches, mean_is, mean_is_between, replicates};

/// Times from arrival to the last token and to the start of service, after a warm-up.
#[derive(Debug, Default)]
struct Times {
    skip: u64,
    /// From arrival to the first step's submission, in services, summed.
    waits: f64,
    sojourns: Vec<f64>,
    /// Requests that run now, by arrival, with the time at which they were first in a step.
    started: Vec<(u64, Nanos)>,
    swaps: u64,
}

impl Observer for Times {
    fn outcome(&mut self, outcome: &Outcome) {
        let at = self.started.iter().position(|s| s.0 == outcome.arrival).expect("it was in a step");
        let (_, started) = self.started.swap_remove(at);
        if outcome.arrival >= self.skip {
            let services = |ns: Nanos| ns as f64 / SERVICE as f64;
            self.waits += services(started - outcome.request.queued);
            self.sojourns.push(services(outcome.last - outcome.request.queued));
        }
    }

    fn step(&mut self, plan: &StepPlan) {
        self.started.extend(plan.seqs.iter().filter(|s| s.start == 0).map(|s| (s.id.0, plan.formed)));
    }

    fn swap(&mut self, _: Nanos, _: &SwapPlan) {
        self.swaps += 1;
    }
}

/// Requests that let a queue at a load of 0.8 forget that it started empty.
const WARM_UP: usize = 2_000;

fn times(system: &System, seed: u64, count: usize) -> Times {
    let mut times = Times { skip: WARM_UP as u64, ..Times::default() };
    system.run(seed, WARM_UP + count, &mut times);
    times
}

/// Mean wait in services, of each of `seeds` replicates of `count` requests.
fn waits(system: &System, seeds: u64, count: usize) -> Vec<f64> {
    replicates(seeds, |seed| {
        let times = times(system, seed, count);
        times.waits / times.sojourns.len() as f64
    })
}

#[test]
fn a_server_of_exponential_services_is_an_m_m_1_queue() {
    let oracle = |system: &System| {
        let rho = system.rho;
        mean_is("mean wait", &waits(system, 40, 40_000), rho / (1.0 - rho), 0.0)
    };
    let flaws = [Flaw::Service(1.01), Flaw::Gaps(0.99), Flaw::Gap(SERVICE / 50), Flaw::Sequences(1)];
    holds_and_catches(oracle, &System::queue(0.8, Service::Exponential), flaws);
}

#[test]
fn quantiles_of_the_sojourn_in_an_m_m_1_queue() {
    for p in [50.0, 90.0, 99.0] {
        let oracle = |system: &System| {
            let seen = replicates(20, |seed| {
                let sorted = lora_hbm::report::stats::sorted(&times(system, seed, 30_000).sojourns);
                lora_hbm::report::stats::percentile(&sorted, p).unwrap()
            });
            let expected = -(1.0 - p / 100.0f64).ln() / (1.0 - system.rho);
            mean_is(&format!("p{p} of the sojourn"), &seen, expected, 0.0)
        };
        holds_and_catches(oracle, &System::queue(0.5, Service::Exponential), [Flaw::Service(1.03)]);
    }
}

#[test]
fn a_server_of_equal_services_is_an_m_d_1_queue() {
    let oracle = |system: &System| {
        let rho = system.rho;
        mean_is("mean wait", &waits(system, 30, 40_000), rho / (2.0 * (1.0 - rho)), 0.0)
    };
    let flaws = [Flaw::Service(1.01), Flaw::Gaps(1.01)];
    holds_and_catches(oracle, &System::queue(0.8, Service::Fixed), flaws);
}

/// The chance that an arrival finds all `c` servers busy, with `offered` = λ/μ.
fn erlang_c(c: usize, offered: f64) -> f64 {
    let mut blocked = 1.0;
    for k in 1..=c {
        blocked = offered * blocked / (k as f64 + offered * blocked);
    }
    let rho = offered / c as f64;
    blocked / (1.0 - rho + rho * blocked)
}

#[test]
fn several_sequences_of_geometric_outputs_are_an_m_m_c_queue() {
    let steps = 50;
    let oracle = |system: &System| {
        let (c, rho) = (system.sequences, system.rho);
        let wait = erlang_c(c, rho * c as f64) / (c as f64 * (1.0 - rho));
        // Arrivals wait for the end of a step, and a geometric output varies a little less than an
        // exponential one: by 1/steps of its variance.
        let step = 1.0 / f64::from(steps);
        mean_is_between("mean wait", &waits(system, 20, 20_000), wait * (1.0 - step), wait + step / 2.0)
    };
    let system = System { sequences: 4, ..System::queue(0.8, Service::Geometric { steps }) };
    holds_and_catches(oracle, &system, [Flaw::Service(1.03), Flaw::Sequences(1), Flaw::Gaps(1.05)]);
}

/// `S = B + s·miss`, hits independent of chance C/N: least recently used under uniform popularity.
fn with_swaps(service: Service) -> System {
    System {
        adapters: 8,
        slots: 4,
        popularity: Popularity::Uniform,
        swap: SERVICE / 2,
        ..System::queue(0.55, service)
    }
}

#[test]
fn swaps_make_services_longer_as_in_an_m_g_1_queue() {
    for (service, second_moment) in [(Service::Fixed, 1.0), (Service::Exponential, 2.0)] {
        let oracle = |system: &System| {
            let miss = 1.0 - system.slots as f64 / f64::from(system.adapters);
            let swap = system.swap as f64 / SERVICE as f64;
            let rate = system.rate() * SERVICE as f64;
            let rho = rate * (1.0 + miss * swap);
            let second = second_moment + 2.0 * swap * miss + swap * swap * miss;
            mean_is("mean wait", &waits(system, 30, 40_000), rate * second / (2.0 * (1.0 - rho)), 0.0)
        };
        let flaws = [Flaw::Swap(1.05), Flaw::Slots(1), Flaw::Slots(-1), Flaw::Service(1.02)];
        holds_and_catches(oracle, &with_swaps(service), flaws);
    }
}

#[test]
fn the_server_is_busy_and_swaps_as_often_as_the_load_says() {
    let busy = |system: &System| {
        let seen = replicates(20, |seed| {
            let totals = system.run(seed, 50_000, &mut Times::default());
            totals.busy as f64 / totals.end as f64
        });
        mean_is("busy fraction", &seen, system.rho, 0.0)
    };
    let flaws = [Flaw::Service(1.01), Flaw::Gaps(1.01)];
    holds_and_catches(busy, &System::queue(0.8, Service::Exponential), flaws);

    let swaps = |system: &System| {
        let seen = replicates(20, |seed| {
            let totals = system.run(seed, 50_000, &mut Times::default());
            totals.swaps as f64 / totals.end as f64 * SERVICE as f64
        });
        let miss = 1.0 - system.slots as f64 / f64::from(system.adapters);
        mean_is("swaps a service", &seen, system.rate() * SERVICE as f64 * miss, 0.0)
    };
    holds_and_catches(swaps, &with_swaps(Service::Fixed), [Flaw::Slots(-1), Flaw::Gaps(1.01)]);
}

#[test]
fn an_idle_server_answers_after_its_own_work_and_the_swap() {
    let oracle = |system: &System| {
        let seen = replicates(20, |seed| {
            let times = times(system, seed, 10_000);
            times.sojourns.iter().sum::<f64>() / times.sojourns.len() as f64
        });
        let miss = 1.0 - system.slots as f64 / f64::from(system.adapters);
        // At one request in ten thousand services, half of that share meets another.
        mean_is("TTFT", &seen, 1.0 + miss * system.swap as f64 / SERVICE as f64, 1e-4)
    };
    let system = System { rho: 1e-4, ..with_swaps(Service::Fixed) };
    holds_and_catches(oracle, &system, [Flaw::Swap(1.05), Flaw::Slots(1), Flaw::Service(1.01)]);
}
