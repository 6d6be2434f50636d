//! Times steps and copies of the engine while it serves: prompts arrive at random over HTTP, are computed beside the
//! decodes of those before them, and go; their adapters are copied in meanwhile.
//!
//! What a step takes depends on more than its composition: on the clock that a device has come down to by its load, on
//! whether its graph was the last one that ran, on the threads beside the step loop. And some costs are not there at all
//! when an executor is timed alone: of kernels that look whether their adapter has come, of copies that are submitted
//! between two steps. So the engine itself is driven, with arrivals, lengths and adapters of the calibration's own, and
//! its decision log says what each step and copy took.

mod samples;

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, Exp1};
use tokio_util::sync::CancellationToken;

use super::host::HostError;
use crate::engine::server::LocalServer;
use crate::engine::setup::Loaded;
use crate::loadgen::{Endpoint, LoadOptions, LoadOutcome, prepare, run_load};
use crate::report::decision_log::DecisionLog;
use crate::report::record::Status;
use crate::sim::LogTimes;
use crate::workload::streams::stream;
use crate::workload::trace::{SCHEMA, Trace, TraceHeader, TraceRequest};
pub use samples::ReadingSample;
use samples::ServedTimes;
pub(super) use samples::fit_reading;

/// What is sent, as far as it is chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traffic {
    /// How long all of it takes, about.
    pub time: Duration,
    /// Longest prompt, tokens.
    pub longest: u32,
    /// Of arrivals, lengths and adapters.
    pub seed: u64,
}

/// Whom requests ask for.
#[derive(Clone, Copy, Debug)]
struct Mixture {
    /// Adapters that are asked for, all alike.
    adapters: usize,
    /// The share of requests with one.
    with_adapter: f64,
}

/// Prompt lengths, and at which loads they come.
#[derive(Clone, Copy, Debug)]
struct Prompts {
    /// Even in their logarithms.
    tokens: (u32, u32),
    /// The longest output.
    outputs: u32,
    /// The share of the time.
    share: f64,
    /// Shares of what the engine can do, after a burst by which it is found what that is.
    loads: &'static [f64],
}

const SHORT: (u32, u32) = (16, 1024);
const OUTPUTS: u32 = 32;
const SHORT_LOADS: &[f64] = &[0.2, 0.5, 0.8];
/// The share of the time for prompts from the longest short one to the longest of all. They come at one load, so that
/// its time is enough for some.
const LONG_SHARE: f64 = 0.2;
const LONG_LOADS: &[f64] = &[0.5];
/// Of so many sequences one has a slot, where most requests are to swap: with fewer slots yet, few sequences would run.
const FEW: usize = 2;
/// The share of requests with an adapter, where some are to have none.
const SOME: f64 = 0.5;
/// Requests of a first burst for each sequence that may run.
const BURST: usize = 2;
/// No stretch is shorter: a client takes some time to begin.
const SHORTEST: Duration = Duration::from_millis(100);
/// Requests of a burst, at most: more at once would keep the client busy beside the engine.
const MOST_AT_ONCE: usize = 512;

/// Serves `traffic` with few slots, of which most requests find no adapter in, and with `most` slots, which hold all
/// adapters that are asked for. `progress` is told the share that is done.
pub(super) fn time_served(
    loaded: &Loaded,
    most: usize,
    traffic: Traffic,
    mut progress: impl FnMut(f64),
) -> Result<ServedTimes, HostError> {
    let all = Mixture { adapters: loaded.settings().total_loras, with_adapter: 1.0 };
    let resident = Mixture { adapters: most.min(all.adapters), ..all };
    let budgets = [
        ((most / FEW).max(1), vec![all]),
        (most, vec![resident, Mixture { with_adapter: SOME, ..resident }]),
    ];
    let mixtures: usize = budgets.iter().map(|(_, mixtures)| mixtures.len()).sum();
    let traffic = Traffic { time: traffic.time / mixtures as u32, ..traffic };
    let mut times = ServedTimes::default();
    let mut done = 0;
    for (slots, mixtures_of) in budgets {
        done += mixtures_of.len();
        serve(loaded, slots, &mixtures_of, traffic, &mut times)?;
        progress(done as f64 / mixtures as f64);
    }
    Ok(times)
}

/// Starts an engine, sends it one mixture's requests after the other's, `traffic` of each, and takes what it logs.
fn serve(
    loaded: &Loaded,
    slots: usize,
    mixtures: &[Mixture],
    traffic: Traffic,
    times: &mut ServedTimes,
) -> Result<(), HostError> {
    let (log, lines) = DecisionLog::in_memory();
    let server = LocalServer::start(loaded, slots, Some(log))?;
    let endpoint = Endpoint::new(&server.url(), None)?;
    let rng = stream(traffic.seed, &format!("calibrate served {slots}"));
    let mut client = Client { loaded, server: &server, endpoint, seed: traffic.seed, rng };
    for mixture in mixtures {
        for prompts in prompts(loaded, traffic.longest) {
            let stretches = 1 + prompts.loads.len() as u32;
            let time = (traffic.time.mul_f64(prompts.share) / stretches).max(SHORTEST);
            let most = client.burst(mixture, &prompts, time)?;
            for load in prompts.loads {
                client.arrivals(mixture, &prompts, load * most, time)?;
            }
        }
    }
    server.stop();
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    times.take(&LogTimes::new(&loaded.log_header(slots), &lines)?);
    Ok(())
}

/// What the engine takes: short prompts, and long ones where there are any.
fn prompts(loaded: &Loaded, longest: u32) -> Vec<Prompts> {
    let most = loaded.scheduler_config(1).max_model_len as u32;
    let outputs = OUTPUTS.min(most / 2).max(1);
    let longest = longest.min(most.saturating_sub(outputs)).max(1);
    let tokens = (SHORT.0.min(longest), SHORT.1.min(longest));
    let short = Prompts { tokens, outputs, share: 1.0, loads: SHORT_LOADS };
    if longest <= SHORT.1 {
        return vec![short];
    }
    let long = Prompts { tokens: (SHORT.1, longest), share: LONG_SHARE, loads: LONG_LOADS, ..short };
    vec![Prompts { share: 1.0 - LONG_SHARE, ..short }, long]
}

/// What became of requests that were sent.
struct Sent {
    /// Those whose answers were whole.
    ended: usize,
    /// From the client's start to its end.
    took: Duration,
}

/// Who asks a server.
struct Client<'a> {
    loaded: &'a Loaded,
    server: &'a LocalServer,
    endpoint: Endpoint,
    seed: u64,
    rng: ChaCha8Rng,
}

impl Client<'_> {
    /// Keeps requests waiting for about `time`. Gives the requests that were served, a second.
    fn burst(&mut self, mixture: &Mixture, prompts: &Prompts, time: Duration) -> Result<f64, HostError> {
        let running = self.loaded.settings().max_num_seqs;
        let (mut count, mut left) = (BURST * running, time);
        let (mut served, mut took_s) = (0.0, 0.0);
        loop {
            let asked = count.clamp(1, MOST_AT_ONCE);
            let requests = (0..asked as u64).map(|id| self.request(id, 0.0, mixture, prompts)).collect();
            let sent = self.send(requests, left)?;
            // Those that were being served when the time was over had come half the way, in the mean.
            served += sent.ended as f64 + (asked - sent.ended).min(running) as f64 / 2.0;
            took_s += sent.took.as_secs_f64();
            left = left.saturating_sub(sent.took);
            let rate = served / took_s;
            if left < SHORTEST {
                return Ok(rate);
            }
            // The emptying at a burst's end should count little: half as many again as there is time for.
            count = ((1.5 * rate * left.as_secs_f64()) as usize).max(running);
        }
    }

    /// Sends `rate` requests a second for `time`, at random.
    fn arrivals(
        &mut self,
        mixture: &Mixture,
        prompts: &Prompts,
        rate: f64,
        time: Duration,
    ) -> Result<(), HostError> {
        let mut requests = Vec::new();
        let mut at = 0.0;
        loop {
            let gap: f64 = Exp1.sample(&mut self.rng);
            at += gap / rate;
            if at >= time.as_secs_f64() {
                break;
            }
            requests.push(self.request(requests.len() as u64, at, mixture, prompts));
        }
        self.send(requests, time).map(|_| ())
    }

    fn request(&mut self, id: u64, arrival_s: f64, mixture: &Mixture, prompts: &Prompts) -> TraceRequest {
        let (least, most) = prompts.tokens;
        let length = self.rng.random_range(f64::from(least).ln()..=f64::from(most).ln()).exp();
        let has_adapter = self.rng.random_bool(mixture.with_adapter);
        TraceRequest {
            id,
            arrival_s,
            prompt_tokens: (length.round() as u32).clamp(least, most),
            output_tokens: self.rng.random_range(1..=prompts.outputs),
            adapter: has_adapter.then(|| self.rng.random_range(0..mixture.adapters as u32)),
            rank: None,
            prompt: None,
        }
    }

    /// Sends requests at their times, and goes away after `time`.
    fn send(&self, requests: Vec<TraceRequest>, time: Duration) -> Result<Sent, HostError> {
        let header = TraceHeader {
            schema: SCHEMA,
            source: "calibration".to_owned(),
            seed: self.seed,
            popularity: "uniform".to_owned(),
        };
        let prepared = prepare(&Trace { header, requests }, self.loaded.tokenizer())?;
        let stop = CancellationToken::new();
        let options = LoadOptions { stop: stop.clone(), ..LoadOptions::default() };
        let begun = Instant::now();
        let outcome = self.server.block_on(async {
            let load = run_load(&self.endpoint, &prepared, &options, |_| {});
            tokio::pin!(load);
            tokio::select! {
                outcome = &mut load => return outcome,
                () = tokio::time::sleep(time) => stop.cancel(),
            }
            load.await
        });
        let took = begun.elapsed();
        let ended = outcome.records.iter().filter(|r| r.status == Status::Ok).count();
        match refusal(&outcome) {
            // A queue may be too short for some of them; an engine that takes nothing has nothing to be timed.
            Some(why) if ended == 0 => Err(HostError::Request(why)),
            _ => Ok(Sent { ended, took }),
        }
    }
}

/// What became of requests besides answers and the client's going away, if anything did.
fn refusal(outcome: &LoadOutcome) -> Option<String> {
    let kinds: Vec<&str> = outcome.faults.keys().map(String::as_str).collect();
    let refused: Vec<&str> =
        kinds.into_iter().filter(|kind| !["interrupted", "not sent"].contains(kind)).collect();
    (!refused.is_empty()).then(|| refused.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::swaps::{SwapTimes, fit_swaps};
    use super::super::{StepLimits, refit};
    use super::*;
    use crate::engine::setup::{DeviceKind, EngineSettings};
    use crate::profile::tests::round;

    #[test]
    fn an_engine_that_serves_gives_steps_copies_and_steps_that_read_adapters_under_way() {
        let loaded = Loaded::load(EngineSettings {
            model: "tiny".to_owned(),
            device: DeviceKind::Cpu,
            total_loras: 16,
            max_num_seqs: 4,
            max_model_len: Some(256),
            threads: 1,
            ..EngineSettings::default()
        })
        .unwrap();
        let mut traffic = Traffic { time: Duration::from_millis(900), longest: 64, seed: 3 };
        let mut shares = Vec::new();
        // A machine that is busy otherwise may come to little in so short a time.
        let served = loop {
            let served = time_served(&loaded, 5, traffic, |share| shares.push(share)).unwrap();
            if ![served.steps.len(), served.readings.len(), served.swaps.len()].contains(&0) {
                break served;
            }
            traffic.time *= 2;
        };
        assert!(shares.len() >= 2 && shares.last() == Some(&1.0), "{shares:?}");
        let limits = StepLimits::new(&loaded.scheduler_config(1), 1, 0);
        assert!(
            served.steps.iter().all(|s| s.ns > 0 && s.shape.tokens <= limits.max_num_batched_tokens as u64)
        );
        assert!(served.readings.iter().all(|r| r.shape.adapters > 0 && r.beside_ns <= r.ns));
        let bytes = loaded.pool().specs()[0].bytes;
        assert!(served.swaps.iter().all(|s| s.bytes == bytes && s.copy_ns > 0 && s.copy_ns <= s.ns));

        let swaps = fit_swaps(&SwapTimes { served: served.swaps, ..SwapTimes::default() });
        let fitted = [swaps.fixed_s, swaps.bytes_per_s, swaps.busy_bytes_per_s, swaps.step_slowdown];
        assert!(fitted.iter().all(|cost| cost.is_finite() && *cost >= 0.0), "{swaps:?}");
        let steps: Vec<_> = served.steps.iter().map(|s| (false, *s)).collect();
        // Checks that no cost is negative, nor none at all.
        let profile = refit(round(), &steps, &served.readings).unwrap();
        profile.check().unwrap();
    }

    #[test]
    fn prompts_longer_than_the_short_ones_have_a_share_of_the_time() {
        let loaded = |max_model_len| {
            Loaded::load(EngineSettings {
                model: "tiny".to_owned(),
                device: DeviceKind::Cpu,
                max_model_len: Some(max_model_len),
                ..EngineSettings::default()
            })
            .unwrap()
        };
        let of = |max_model_len, longest| -> Vec<_> {
            let prompts = prompts(&loaded(max_model_len), longest);
            assert!((prompts.iter().map(|p| p.share).sum::<f64>() - 1.0).abs() < 1e-12);
            prompts.iter().map(|p| (p.tokens, p.outputs)).collect()
        };
        assert_eq!(of(4352, 4096), [((16, 1024), 32), ((1024, 4096), 32)]);
        assert_eq!(of(4112, 4096), [((16, 1024), 32), ((1024, 4080), 32)]);
        assert_eq!(of(4352, 512), [((16, 512), 32)]);
        assert_eq!(of(10, 4096), [((5, 5), 5)]);
    }
}
