//! Hit rates of the slots, one sequence at a time: each request is one reference of a cache trace.

use lora_hbm::sim::{Input, Observer, Outcome};
use lora_hbm::workload::popularity::{AdapterDraw, Popularity};
use lora_sched::{Evict, Nanos, SwapPlan};

use super::{Flaw, SERVICE, Service, System, holds_and_catches, mean_is, replicates};

/// Swaps after a warm-up.
#[derive(Debug)]
struct Misses {
    skip: u64,
    outcomes: u64,
    misses: u64,
}

impl Observer for Misses {
    fn outcome(&mut self, _: &Outcome) {
        self.outcomes += 1;
    }

    fn swap(&mut self, _: Nanos, _: &SwapPlan) {
        self.misses += u64::from(self.outcomes >= self.skip);
    }
}

const WARM_UP: usize = 5_000;

fn hit_rate(system: &System, seed: u64, count: usize) -> f64 {
    let mut misses = Misses { skip: WARM_UP as u64, outcomes: 0, misses: 0 };
    system.run(seed, WARM_UP + count, &mut misses);
    1.0 - misses.misses as f64 / count as f64
}

fn cache(adapters: u32, slots: usize, popularity: Popularity, evict: Evict) -> System {
    System { adapters, slots, popularity, evict, swap: SERVICE / 2, ..System::queue(0.3, Service::Fixed) }
}

/// Popularities from the most popular on. Which adapter has which does not matter to the formulas.
fn popularities(system: &System) -> Vec<f64> {
    let mut p = AdapterDraw::new(system.popularity, system.adapters, 0).probabilities();
    p.sort_by(|a, b| b.total_cmp(a));
    p
}

/// The root of an increasing function on the positive numbers.
fn root(f: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    while f(high) < 0.0 {
        high *= 2.0;
    }
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        if f(middle) < 0.0 { low = middle } else { high = middle }
    }
    low
}

#[test]
fn under_uniform_popularity_lru_hits_in_proportion_to_its_slots() {
    for slots in [1, 8, 32, 100] {
        let oracle = |system: &System| {
            let seen = replicates(12, |seed| hit_rate(system, seed, 40_000));
            mean_is("hit rate", &seen, system.slots as f64 / f64::from(system.adapters), 0.0)
        };
        let system = cache(128, slots, Popularity::Uniform, Evict::Lru);
        holds_and_catches(oracle, &system, [Flaw::Slots(1)]);
    }
}

#[test]
fn lru_with_two_slots_is_king_s_formula() {
    let oracle = |system: &System| {
        let p = popularities(system);
        let mut hits = 0.0;
        for (i, a) in p.iter().enumerate() {
            for (_, b) in p.iter().enumerate().filter(|(j, _)| *j != i) {
                hits += (a + b) * a * b / (1.0 - a);
            }
        }
        mean_is("hit rate", &replicates(12, |seed| hit_rate(system, seed, 60_000)), hits, 0.0)
    };
    // The nearer to uniform, the more first in, first out hits as often.
    for s in [1.0, 1.5] {
        let system = cache(16, 2, Popularity::Zipf { s }, Evict::Lru);
        holds_and_catches(oracle, &system, [Flaw::Evict(Evict::Fifo), Flaw::Slots(1)]);
    }
    holds_and_catches(oracle, &cache(16, 2, Popularity::Zipf { s: 0.7 }, Evict::Lru), [Flaw::Slots(1)]);
}

#[test]
fn lru_under_zipf_popularity_is_che_s_approximation() {
    let oracle = |system: &System| {
        let p = popularities(system);
        let full = |t: f64| p.iter().map(|p| 1.0 - (-p * t).exp()).sum::<f64>() - system.slots as f64;
        let t = root(full);
        let hits: f64 = p.iter().map(|p| p * (1.0 - (-p * t).exp())).sum();
        let seen = replicates(12, |seed| hit_rate(system, seed, 60_000));
        mean_is("hit rate", &seen, hits, 0.0015 / hits)
    };
    for slots in [12, 40] {
        let system = cache(128, slots, Popularity::Zipf { s: 1.0 }, Evict::Lru);
        holds_and_catches(oracle, &system, [Flaw::Evict(Evict::Fifo), Flaw::Slots(1)]);
    }
}

#[test]
fn first_in_first_out_hits_as_random_eviction_would() {
    let oracle = |system: &System| {
        let p = popularities(system);
        let t = root(|t| p.iter().map(|p| p * t / (1.0 + p * t)).sum::<f64>() - system.slots as f64);
        let hits: f64 = p.iter().map(|p| p * p * t / (1.0 + p * t)).sum();
        let seen = replicates(12, |seed| hit_rate(system, seed, 60_000));
        mean_is("hit rate", &seen, hits, 0.0015 / hits)
    };
    let system = cache(128, 32, Popularity::Zipf { s: 1.0 }, Evict::Fifo);
    holds_and_catches(oracle, &system, [Flaw::Evict(Evict::Lru), Flaw::Slots(1)]);
}

/// Misses of the clairvoyant rule, which evicts what is wanted again last (Belady, 1966), on a trace
/// of adapters, with `0..slots` resident at first.
fn belady(trace: &[u32], adapters: u32, slots: usize) -> u64 {
    let mut next = vec![usize::MAX; trace.len()];
    let mut seen = vec![usize::MAX; adapters as usize];
    for (i, &adapter) in trace.iter().enumerate().rev() {
        next[i] = std::mem::replace(&mut seen[adapter as usize], i);
    }
    let mut resident: Vec<(u32, usize)> = (0..slots as u32).map(|a| (a, seen[a as usize])).collect();
    let mut misses = 0;
    for (i, &adapter) in trace.iter().enumerate() {
        let slot = match resident.iter().position(|r| r.0 == adapter) {
            Some(slot) => slot,
            None => {
                misses += 1;
                (0..slots).max_by_key(|&s| resident[s].1).unwrap()
            }
        };
        resident[slot] = (adapter, next[i]);
    }
    misses
}

fn adapters_of(system: &System, seed: u64, count: usize) -> Vec<u32> {
    let arrivals = system.requests(seed).take(count);
    arrivals
        .filter_map(|input| match input {
            Input::Arrive(request) => request.adapter,
            Input::Cancel { .. } | Input::Adapter { .. } => None,
        })
        .collect()
}

#[test]
fn no_rule_beats_the_clairvoyant_one_nor_in_the_long_run_the_most_popular_adapters() {
    let count = 60_000;
    let clairvoyant = |system: &System| {
        let trace = adapters_of(system, 3, count);
        let least = belady(&trace, system.adapters, system.slots);
        let mut misses = Misses { skip: 0, outcomes: 0, misses: 0 };
        system.run(3, count, &mut misses);
        if misses.misses >= least {
            return Ok(());
        }
        Err(format!("{} misses, {least} at least", misses.misses))
    };
    let popular = |system: &System| {
        let most: f64 = popularities(system)[..system.slots].iter().sum();
        let seen = replicates(12, |seed| hit_rate(system, seed, count));
        super::mean_is_between("hit rate", &seen, 0.0, most)
    };
    for &evict in Evict::ALL {
        let system = cache(64, 8, Popularity::Zipf { s: 1.0 }, evict);
        // Slots that nobody configured: what a leak of slots would look like.
        holds_and_catches(clairvoyant, &system, [Flaw::Slots(40)]);
        holds_and_catches(popular, &system, [Flaw::Slots(40)]);
    }
}
