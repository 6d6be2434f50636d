//! `profile residuals`: a run's log against the costs that it was made with gives nothing, and a cost that is wrong
//! shows where it counts and nowhere else.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use lora_hbm::profile::{CostModel, Profile};
use lora_hbm::report::decision_log::{LogHeader, LogLine, LoggedEnd, LoggedSeq};
use lora_hbm::sim::{
    Device, Done, Input, ModelDevice, Observer, Outcome, Residual, ResidualKind, ResidualReport, Residuals,
    SimRequest, run,
};
use lora_sched::{AdapterSpec, Config, FetchPlan, Nanos, Scheduler, SlotId, StepPlan, SwapMode, SwapPlan};
use predicates::prelude::*;

use crate::oracles::machine;

/// Nothing but the rounding of each time to a nanosecond: of milliseconds, a millionth.
const ROUNDING: f64 = 1e-5;

/// A device that logs what it is told and when it says that things end, as an engine does.
struct Logged {
    device: ModelDevice,
    shared: bool,
    lines: Vec<LogLine>,
    step: Option<(StepPlan, Nanos)>,
    copies: Vec<(SwapPlan, Nanos)>,
    /// When each copy that has ended was asked for, and its end.
    ended: Vec<(Nanos, Nanos)>,
}

impl Logged {
    fn step_done(&mut self, t: Nanos) {
        let (plan, submitted) = self.step.take().unwrap();
        let stalled = self.device.stalled().iter().map(|&(slot, ns)| (slot.0, ns)).collect();
        self.lines.push(LogLine::StepDone { t, step: plan.step, stopped: Vec::new(), stalled });
        self.lines.push(LogLine::Step {
            step: plan.step,
            formed: submitted,
            submitted,
            started: submitted,
            ended: t,
            done: t,
            seqs: plan.seqs.iter().map(LoggedSeq::from).collect(),
            loading: plan.loading.iter().map(|s| s.0).collect(),
            waited: plan.wait_for_swaps,
        });
    }

    fn swap_done(&mut self, t: Nanos, slot: SlotId) {
        let at = self.copies.iter().position(|c| c.0.slot == slot).unwrap();
        let (swap, asked) = self.copies.remove(at);
        // Those that were asked for at once share the engine, or go one after another.
        let before = self.ended.iter().filter(|e| !self.shared || e.0 < asked).map(|e| e.1).max();
        self.ended.push((asked, t));
        self.lines.push(LogLine::SwapDone { t, slot: slot.0 });
        self.lines.push(LogLine::Swap {
            adapter: swap.adapter.0,
            slot: slot.0,
            evicted: swap.evicted.map(|a| a.0),
            bytes: swap.bytes,
            prefetch: false,
            decided: asked,
            submitted: asked,
            started: before.unwrap_or(0).max(asked),
            ended: t,
            done: t,
        });
    }
}

impl Device for Logged {
    fn gap(&mut self) -> Nanos {
        self.device.gap()
    }

    fn submit_step(&mut self, now: Nanos, plan: &StepPlan) {
        self.device.submit_step(now, plan);
        self.step = Some((plan.clone(), now));
    }

    fn submit_swap(&mut self, now: Nanos, swap: &SwapPlan) {
        self.device.submit_swap(now, swap);
        self.copies.push((*swap, now));
    }

    fn submit_fetch(&mut self, now: Nanos, fetch: &FetchPlan) {
        self.device.submit_fetch(now, fetch);
    }

    fn next(&mut self) -> Option<(Nanos, Done)> {
        self.device.next()
    }

    fn complete(&mut self, now: Nanos, done: Done) {
        self.device.complete(now, done);
        match done {
            Done::Step => self.step_done(now),
            Done::Swap(slot) => self.swap_done(now, slot),
            Done::Fetch { .. } => {}
        }
    }

    fn stalled(&self) -> &[(SlotId, Nanos)] {
        self.device.stalled()
    }
}

#[derive(Default)]
struct Outcomes(Vec<Outcome>);

impl Observer for Outcomes {
    const EVERY_STEP: bool = true;

    fn outcome(&mut self, outcome: &Outcome) {
        self.0.push(*outcome);
    }
}

/// One term for decodes and two for prompts, of which one looks back; copies that slow steps and are slowed by them.
fn profile() -> Profile {
    let terms = [("decode/decodes:0-", 4e5), ("mixed/tokens:0-", 2e4), ("mixed/hot_rows:0-", 40.0)];
    let mut profile = machine(&terms, 0, 50_000);
    profile.swap.bytes_per_s = 1e9;
    profile.swap.busy_bytes_per_s = 8e8;
    profile.swap.step_slowdown = 0.3;
    profile.host.front_s = 2e-4;
    profile.host.tokenize_s_per_byte = 1e-7;
    profile.signed()
}

fn config(gpu_loras: usize, swap_mode: SwapMode) -> Config {
    let adapters = (0..8).map(|a| AdapterSpec::new(8 + a % 2 * 56, 2_000_000)).collect();
    Config { adapters, gpu_loras, swap_mode, ..Config::with_adapters(8, gpu_loras, 8, 1) }
}

/// The log of a simulated run of this machine.
fn log(profile: &Profile, config: &Config) -> (LogHeader, Vec<LogLine>) {
    let cost = CostModel::new(profile).unwrap();
    let inputs: Vec<Input> = (0..200u32)
        .map(|i| {
            let prompt_tokens = 20 + i * 37 % 200;
            // Bunches, with pauses between them after which the device has rested.
            let received = Nanos::from(i / 10) * 150_000_000 + Nanos::from(i % 10) * 3_000_000;
            let queued = received + cost.front_ns(prompt_tokens);
            let adapter = (i % 5 > 0).then_some((i * 5 + i / 8) % 8);
            let (id, output_tokens) = (i.into(), 1 + i % 9);
            Input::Arrive(SimRequest { id, received, queued, adapter, prompt_tokens, output_tokens })
        })
        .collect();
    let mut inputs = inputs;
    inputs.sort_by_key(Input::at);
    let ranks = config.adapters.iter().map(|a| a.rank).collect();
    let mut device = Logged {
        device: ModelDevice::new(cost, ranks, config.swap_mode),
        shared: config.swap_mode == SwapMode::Layered,
        lines: Vec::new(),
        step: None,
        copies: Vec::new(),
        ended: Vec::new(),
    };
    for input in &inputs {
        let Input::Arrive(r) = *input else { unreachable!() };
        let SimRequest { adapter, received, prompt_tokens, .. } = r;
        let (t, id, max_tokens, refused) = (r.queued, r.id, r.output_tokens, None);
        device.lines.push(LogLine::Arrive { t, id, adapter, received, prompt_tokens, max_tokens, refused });
    }
    let mut outcomes = Outcomes::default();
    run(&mut Scheduler::new(config.clone()).unwrap(), &mut device, inputs, &mut outcomes).unwrap();
    assert_eq!(outcomes.0.len(), 200);
    let ended = |o: &Outcome| LogLine::Ended { t: o.last, id: o.request.id, why: LoggedEnd::Length };
    device.lines.extend(outcomes.0.iter().map(ended));
    (LogHeader::new(&profile.model, 1, config), device.lines)
}

fn report(profile: &Profile, (header, lines): &(LogHeader, Vec<LogLine>)) -> ResidualReport {
    let mut residuals = Residuals::new(profile).unwrap();
    residuals.add(header, lines).unwrap();
    residuals.report()
}

/// Whether every single one is off by `error`.
fn all_off_by(residual: &Residual, error: f64, within: f64) -> bool {
    let errors = [residual.error, residual.median_error, residual.p10_error, residual.p90_error];
    errors.iter().all(|e| e.is_some_and(|e| (e - error).abs() <= within))
}

use ResidualKind::*;

const STEPS_BESIDE_COPIES: [ResidualKind; 3] = [DecodesBesideCopies, PromptsBesideCopies, MixedBesideCopies];
const PROMPTS: [ResidualKind; 4] = [Prompts, PromptsBesideCopies, Mixed, MixedBesideCopies];
const COPIES: [ResidualKind; 4] = [Copies, CopiesBesideSteps, Bytes, BytesBesideSteps];

/// Kinds of which the run has some.
fn met(report: &ResidualReport) -> Vec<ResidualKind> {
    report.kinds.iter().filter(|k| k.residual.count > 0).map(|k| k.kind).collect()
}

#[test]
fn a_simulated_run_is_what_its_own_profile_predicts() {
    let profile = profile();
    let resident = report(&profile, &log(&profile, &config(8, SwapMode::Overlap)));
    assert_eq!(met(&resident), [Decodes, Prompts, Mixed, Gaps, FrontEnd]);
    let copying = report(&profile, &log(&profile, &config(3, SwapMode::Overlap)));
    let expected: Vec<_> = ResidualKind::ALL.into_iter().filter(|k| *k != Waited).collect();
    assert_eq!(met(&copying), expected, "{copying:#?}");
    for (report, but) in [(&resident, None), (&copying, Some(Gaps))] {
        for k in report.kinds.iter().filter(|k| k.residual.count > 0 && Some(k.kind) != but) {
            assert!(all_off_by(&k.residual, 0.0, ROUNDING), "{k:?}");
        }
        let shares: f64 = report.kinds.iter().filter_map(|k| k.share).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        assert_eq!(report.waited_s, 0.0);
    }
    // Ranges hold what their kinds do.
    let counted = |kinds: &[ResidualKind]| kinds.iter().map(|&k| copying.of_kind(k).count).sum::<usize>();
    let ranged = |of: &[lora_hbm::sim::RangeResidual]| of.iter().map(|r| r.residual.count).sum::<usize>();
    assert_eq!(ranged(&copying.prompts_by_recent), counted(&PROMPTS));
    assert_eq!(ranged(&copying.prompts_by_load), counted(&PROMPTS));
    assert_eq!(ranged(&copying.decodes_by_load), counted(&[Decodes, DecodesBesideCopies]));
    assert!(copying.prompts_by_recent.len() == 3 && copying.prompts_by_load.len() > 1, "{copying:#?}");
}

#[test]
fn waits_for_adapters_are_counted_apart_and_held_against_nobody() {
    let mut profile = profile();
    // What a step lost to waiting is told to the nanosecond only where copies do not slow it besides.
    profile.swap.step_slowdown = 0.0;
    let profile = profile.signed();
    let layered = report(&profile, &log(&profile, &config(3, SwapMode::Layered)));
    assert!(layered.of_kind(Waited).count > 5 && layered.waited_s > 0.001, "{layered:#?}");
    assert!(all_off_by(&layered.of_kind(Waited), 0.0, ROUNDING), "{:?}", layered.of_kind(Waited));
    assert!(layered.of_kind(CopiesBesideSteps).count > 5);
    assert!(all_off_by(&layered.of_kind(CopiesBesideSteps), 0.0, ROUNDING), "{layered:#?}");
    // What it takes more to read an adapter under way is no wait, and no cost where the step has waited before.
    let mut reading = profile.clone();
    reading.swap.reading_s = 7e-4;
    let reading = reading.signed();
    for mode in [SwapMode::Layered, SwapMode::Blocking] {
        let run = log(&reading, &config(3, mode));
        let right = report(&reading, &run);
        let all = right.kinds.iter().filter(|k| k.residual.count > 0 && k.kind != Gaps);
        assert!(all.clone().all(|k| all_off_by(&k.residual, 0.0, ROUNDING)), "{mode}: {right:#?}");
        // A profile that does not know of it predicts too little, of steps that read one and of no others.
        let without = report(&profile, &run);
        let missed = without.of_kind(Waited).effect_s;
        let layered = mode == SwapMode::Layered;
        assert!(if layered { missed < -2e-3 } else { missed.abs() < 1e-6 }, "{mode}: {without:#?}");
        assert!(all_off_by(&without.of_kind(Decodes), 0.0, ROUNDING), "{mode}: {without:#?}");
    }
    let blocking = report(&profile, &log(&profile, &config(3, SwapMode::Blocking)));
    assert!(blocking.of_kind(Waited).count > 5, "{blocking:#?}");
    assert!(all_off_by(&blocking.of_kind(Waited), 0.0, ROUNDING), "{:?}", blocking.of_kind(Waited));
}

#[test]
fn a_cost_that_is_a_tenth_too_high_shows_where_it_counts_and_nowhere_else() {
    type Change = fn(&mut Profile);
    let changes: [(Change, &[ResidualKind]); 5] = [
        (|p| p.step.coef_ns[0] *= 1.1, &[Decodes, DecodesBesideCopies]),
        (|p| p.step.coef_ns[1..].iter_mut().for_each(|c| *c *= 1.1), &PROMPTS),
        (
            |p| {
                p.swap.bytes_per_s /= 1.1;
                p.swap.busy_bytes_per_s /= 1.1;
            },
            &COPIES,
        ),
        (|p| p.host.loop_s *= 1.1, &[Gaps]),
        (
            |p| {
                p.host.front_s *= 1.1;
                p.host.tokenize_s_per_byte *= 1.1;
            },
            &[FrontEnd],
        ),
    ];
    let right = profile();
    let resident = log(&right, &config(8, SwapMode::Overlap));
    let copying = log(&right, &config(3, SwapMode::Overlap));
    for (change, touched) in changes {
        let mut wrong = right.clone();
        change(&mut wrong);
        let wrong = wrong.signed();
        let mut shown = Vec::new();
        // Gaps where nobody ever waits for a copy: this log has no line of plans of nothing.
        for (log, but) in [(&resident, None), (&copying, Some(Gaps))] {
            for k in report(&wrong, log).kinds.iter().filter(|k| k.residual.count > 0 && Some(k.kind) != but)
            {
                let error = if touched.contains(&k.kind) { 0.1 } else { 0.0 };
                assert!(all_off_by(&k.residual, error, ROUNDING), "{touched:?}: {k:?}");
                let effect = k.residual.measured_s * error;
                assert!((k.residual.effect_s - effect).abs() <= ROUNDING * k.residual.measured_s, "{k:?}");
                shown.extend((error > 0.0).then_some(k.kind));
            }
        }
        assert!(touched.iter().all(|kind| shown.contains(kind)), "{touched:?}, met {shown:?}");
    }
}

#[test]
fn costs_that_depend_on_what_was_before_or_beside_show_there() {
    let right = profile();
    let log = log(&right, &config(3, SwapMode::Overlap));
    // Without the term that looks back: the more, the busier the device was.
    let mut cold = right.clone();
    cold.step.coef_ns[2] = 0.0;
    let cold = report(&cold.signed(), &log);
    let errors: Vec<f64> = cold.prompts_by_recent.iter().filter_map(|r| r.residual.error).collect();
    assert!(errors.len() == 3 && errors.is_sorted_by(|a, b| a > b) && errors[2] < -0.01, "{errors:?}");
    assert!(all_off_by(&cold.of_kind(Decodes), 0.0, ROUNDING));

    let mut slower = right.clone();
    slower.swap.step_slowdown = 0.6;
    let slower = report(&slower.signed(), &log);
    for k in slower.kinds.iter().filter(|k| k.residual.count > 0 && k.kind != Gaps) {
        if STEPS_BESIDE_COPIES.contains(&k.kind) {
            // At most what the whole of each step would have lost.
            assert!(k.residual.error.is_some_and(|e| e > 0.01 && e < 1.6 / 1.3 - 1.0 + ROUNDING), "{k:?}");
        } else {
            assert!(all_off_by(&k.residual, 0.0, ROUNDING), "{k:?}");
        }
    }
}

fn write_log(path: &Path, (header, lines): &(LogHeader, Vec<LogLine>)) {
    let lines = lines.iter().map(|line| serde_json::to_string(line).unwrap());
    let all: Vec<String> = std::iter::once(serde_json::to_string(header).unwrap()).chain(lines).collect();
    std::fs::write(path, all.join("\n") + "\n").unwrap();
}

/// A folder with the profile and the log of its run, and the command on them.
fn set_up() -> (tempfile::TempDir, PathBuf, impl Fn(&[&str]) -> Command) {
    let dir = tempfile::tempdir().unwrap();
    let profile = profile();
    std::fs::write(dir.path().join("p.json"), serde_json::to_string(&profile).unwrap()).unwrap();
    let path = dir.path().join("log.jsonl");
    write_log(&path, &log(&profile, &config(3, SwapMode::Overlap)));
    let folder = dir.path().to_owned();
    let residuals = move |args: &[&str]| {
        let mut command = Command::cargo_bin("lora-hbm").unwrap();
        command.current_dir(&folder).args(["profile", "residuals", "p.json"]).args(args);
        command
    };
    (dir, path, residuals)
}

#[test]
fn the_command_says_all_of_it_and_takes_several_logs_together() {
    let (_dir, _, residuals) = set_up();
    let table = residuals(&["log.jsonl"]).assert().success();
    let table = String::from_utf8_lossy(&table.get_output().stdout).into_owned();
    for said in
        ["prompts beside decodes, beside copies", "host: front end", "by tokens a second", "by sequences"]
    {
        assert!(table.contains(said), "{said}: {table}");
    }
    assert!(!table.contains("warning") && !table.contains("steps that waited"), "{table}");
    let json = |args: &[&str]| -> serde_json::Value {
        let output = residuals(args).args(["--format", "json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    };
    let (once, twice) = (json(&["log.jsonl"]), json(&["log.jsonl", "log.jsonl"]));
    let kinds = once["kinds"].as_array().unwrap();
    assert_eq!(kinds.len(), ResidualKind::ALL.len());
    for (i, kind) in kinds.iter().enumerate() {
        assert_eq!(twice["kinds"][i]["count"].as_u64(), kind["count"].as_u64().map(|n| 2 * n), "{kind}");
        assert_eq!(twice["kinds"][i]["median_error"], kind["median_error"], "{kind}");
    }
    assert_eq!(once["model"], "theory");
    assert_eq!(once["other_models"], serde_json::json!([]));
}

#[test]
fn a_log_of_another_model_is_warned_of() {
    let (_dir, path, residuals) = set_up();
    let profile = profile();
    let (header, lines) = log(&profile, &config(3, SwapMode::Overlap));
    write_log(&path, &(LogHeader { model: "practice".into(), ..header }, lines));
    let said = "warning: a log is of practice, the profile of theory";
    residuals(&["log.jsonl"]).assert().success().stdout(predicate::str::contains(said));
    let json = residuals(&["log.jsonl", "--format", "json"]).assert().success();
    json.stdout(predicate::str::contains("\"other_models\":[\"practice\"]"));
}

#[test]
fn what_is_no_log_is_refused_by_name() {
    let (dir, path, residuals) = set_up();
    let refused = |text: &str, said: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let mut assert = residuals(&["log.jsonl"]).assert().code(1).stdout("");
        for said in ["decision log log.jsonl"].iter().chain(said) {
            assert = assert.stderr(predicate::str::contains(*said));
        }
    };
    let good = std::fs::read_to_string(&path).unwrap();
    let header = good.lines().next().unwrap().to_owned() + "\n";
    let step = good.lines().find(|line| line.contains("\"line\":\"step\"")).unwrap();
    refused("", &["is empty", "serve --decision-log"]);
    refused(&format!("{header}no line\n{step}\n"), &["line 2", "serve --decision-log"]);
    refused(&good.replacen("[8,2000000,false]", "[8]", 1), &["line 1"]);
    let never = step.replace("\"done\":", "\"done\":0,\"was\":");
    refused(&format!("{header}{never}\n"), &["step 0 has times that do not follow", "serve --decision-log"]);
    residuals(&["no.jsonl"]).assert().code(1).stderr(predicate::str::contains("no.jsonl"));
    residuals(&[]).assert().code(2);
    std::fs::write(dir.path().join("log.jsonl"), &header).unwrap();
    let nothing = residuals(&["log.jsonl"]).assert().code(1);
    nothing.stderr(predicate::str::contains("nothing has ended in log.jsonl"));
    std::fs::write(dir.path().join("p.json"), "{}").unwrap();
    residuals(&["log.jsonl"]).assert().code(1).stderr(predicate::str::contains("p.json"));
}

#[cfg(feature = "server")]
mod emulated {
    use std::time::Duration;

    use lora_hbm::engine::emulation::Emulation;
    use lora_hbm::report::decision_log::DecisionLog;
    use lora_hbm::workload::tokenizer::Tokenizer;

    use super::*;
    use crate::support::{idle, request, until};

    /// Steps and swaps of an emulation end when they should or later, however busy the machine is. Without what was
    /// later, they take what the profile says.
    #[test]
    fn an_emulated_engine_takes_what_its_profile_says_and_the_hosts_own_time() {
        let terms = [("decode/decodes:0-", 4e5), ("mixed/tokens:0-", 2e4), ("mixed/hot_rows:0-", 40.0)];
        let mut profile = machine(&terms, 3_000_000, 0);
        profile.swap.reading_s = 5e-4;
        let profile = profile.signed();
        for &mode in SwapMode::ALL {
            let config = Config { max_num_seqs: 4, max_model_len: 512, kv_blocks: 128, ..config(3, mode) };
            let emulation = Emulation::new(profile.clone(), config, Tokenizer::byte_level(), None, 7);
            let header = emulation.log_header();
            let (log, lines) = DecisionLog::in_memory();
            let engine = emulation.start(Some(log)).unwrap();
            let submit = |i: u32| {
                std::thread::sleep(Duration::from_millis(u64::from(i % 4)));
                engine.submit(request(30 + i as usize * 17 % 150, Some(i * 5 % 8), 1 + i % 6)).unwrap()
            };
            let handles: Vec<_> = (0..24).map(submit).collect();
            handles.into_iter().for_each(|handle| _ = handle.wait().unwrap());
            until(&engine, "idle", idle);
            engine.shutdown();
            let mut lines = lines.lock().unwrap().clone();

            let met = report(&profile, &(header.clone(), lines.clone()));
            let lines_of = |of: fn(&LogLine) -> bool| lines.iter().filter(|line| of(line)).count();
            let count = |kinds: &[ResidualKind]| kinds.iter().map(|&k| met.of_kind(k).count).sum::<usize>();
            let steps = [&[Decodes, DecodesBesideCopies, Waited][..], &PROMPTS].concat();
            assert_eq!(count(&steps), lines_of(|l| matches!(l, LogLine::Step { .. })), "{mode}: {met:#?}");
            assert_eq!(count(&[FrontEnd]), 24);
            let swaps = lines_of(|l| matches!(l, LogLine::Swap { .. }));
            assert!(swaps >= 5 && count(&[Copies, CopiesBesideSteps]) == swaps, "{mode}: {met:#?}");
            assert!(count(&[Gaps]) > 5 && count(&[Gaps]) < count(&steps), "{mode}: {met:#?}");
            // Under `layered` it depends on how requests bunch.
            if mode != SwapMode::Layered {
                assert_eq!(met.of_kind(Waited).count > 0, mode == SwapMode::Blocking, "{mode}: {met:#?}");
            }
            for &kind in steps.iter().filter(|&&kind| met.of_kind(kind).count > 0) {
                assert!(met.of_kind(kind).p90_error <= Some(ROUNDING), "{mode}: {:?}", met.of_kind(kind));
            }

            for line in &mut lines {
                if let LogLine::Step { submitted, started, ended, done, .. } = line {
                    (*submitted, *done) = (*started, *ended);
                }
            }
            let exact = report(&profile, &(header, lines));
            for &kind in steps.iter().filter(|&&kind| exact.of_kind(kind).count > 0) {
                let residual = exact.of_kind(kind);
                assert!(all_off_by(&residual, 0.0, ROUNDING), "{mode} {kind:?}: {residual:?}");
            }
        }
    }
}
