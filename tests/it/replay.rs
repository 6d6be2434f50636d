//! The simulator is the same machine as the engine: what the engine logged, replayed on the
//! simulator's clock, gives the same decisions and first tokens; with another rule it must not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lora_hbm::report::decision_log::{DecisionLog, LogHeader, LogLine};
use lora_hbm::sim::{Recorded, replay};
use lora_sched::{Config, Evict, Policy, SwapMode};
use predicates::str::contains;

use crate::support::{MS, PATIENCE, config, engine, idle, request, until};

/// Serves a burst of mixed requests, some of them cancelled, and gives the recording.
fn record(config: &Config) -> Recorded {
    recorded(config, &serve(config))
}

fn recorded(config: &Config, lines: &[LogLine]) -> Recorded {
    Recorded::new(&LogHeader::new("emulated", 1, config), lines).unwrap()
}

/// The log of such a burst.
fn serve(config: &Config) -> Vec<LogLine> {
    let (log, lines) = DecisionLog::in_memory();
    let (engine, _) = engine(config.clone(), 2, 3, Some(log));
    let mut kept = Vec::new();
    for i in 0..60u32 {
        // Enough adapters that many are swapped in however requests bunch together, and some more often than
        // others, so that eviction rules differ.
        let of = if i % 2 == 0 { i * 7 % 12 } else { i * i * 7 % 12 };
        let adapter = (i % 5 > 0).then_some(of);
        let handle = engine.submit(request(20 + (i as usize * 37) % 200, adapter, 1 + i % 9)).unwrap();
        // Dropping a handle cancels its request, whatever its phase.
        if i % 11 != 7 {
            kept.push(handle);
        }
        std::thread::sleep(Duration::from_micros(u64::from(i % 7) * 900));
    }
    for handle in kept {
        handle.wait().unwrap();
    }
    until(&engine, "idle", idle);
    engine.shutdown();
    let lines = lines.lock().unwrap();
    lines.clone()
}

fn twelve_adapters(swap_mode: SwapMode, policy: Policy) -> Config {
    let adapters = Config::with_adapters(12, 3, 8, 1000).adapters;
    Config { adapters, gpu_loras: 3, swap_mode, policy, ..config() }
}

#[test]
fn every_swap_mode_and_policy_replays() {
    for &swap_mode in SwapMode::ALL {
        for &policy in Policy::ALL {
            let config = twelve_adapters(swap_mode, policy);
            let recorded = record(&config);
            let report = replay(&recorded, config).unwrap();
            assert!(report.swaps > 4 && report.steps > 40, "{swap_mode} {policy}: too little: {report:?}");
            assert!(report.holds(), "{swap_mode} {policy}: {report:#?}");
        }
    }
}

#[test]
fn prefetch_and_every_eviction_rule_replay() {
    for &evict in Evict::ALL {
        let config = Config { evict, prefetch: 3, ..twelve_adapters(SwapMode::Overlap, Policy::Skip) };
        let report = replay(&record(&config), config).unwrap();
        assert!(report.holds(), "{evict}: {report:#?}");
    }
}

/// What the queue refuses as a whole, the scheduler never saw, nor does the log tell of it.
#[test]
fn requests_that_are_refused_together_replay() {
    let config = Config { max_queue: 5, max_num_seqs: 2, ..twelve_adapters(SwapMode::Overlap, Policy::Skip) };
    let (log, lines) = DecisionLog::in_memory();
    let (engine, times) = engine(config.clone(), 1, 1, Some(log));
    let (mut taken, mut refused) = (0, 0);
    for i in 0..120 {
        let together = (0..1 + i % 4).map(|k| request(20, Some((i * 5 + k) % 12), 1 + i % 3)).collect();
        let handles = engine.submit_all(together).unwrap();
        let ids: Vec<_> = handles.iter().map(|h| h.id().0).collect();
        assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ids:?}");
        // Every third caller waits; the others let go of theirs in whatever phase.
        if i % 3 == 0 {
            let outs: Vec<_> = handles.into_iter().map(|h| h.wait()).collect();
            assert!(outs.iter().all(Result::is_ok) || outs.iter().all(Result::is_err), "{outs:?}");
            let count = if outs[0].is_ok() { &mut taken } else { &mut refused };
            *count += outs.len();
        }
    }
    assert!(taken > 0, "{refused} were refused");
    // A full queue for as long as it takes to ask, on any machine.
    until(&engine, "idle", idle);
    times.step.store(1000 * MS, Ordering::Relaxed);
    let five = || (0..5).map(|_| request(200, None, 1)).collect();
    let first = engine.submit_all(five()).unwrap();
    assert!(engine.submit_all(five()).unwrap().into_iter().all(|h| h.wait().is_err()));
    times.step.store(MS, Ordering::Relaxed);
    assert!(first.into_iter().all(|h| h.wait().is_ok()));
    until(&engine, "idle", idle);
    let accepted = engine.stats().accepted;
    engine.shutdown();
    let lines = lines.lock().unwrap();
    let told = |line: &&LogLine| matches!(line, LogLine::Arrive { refused: None, .. });
    assert_eq!(lines.iter().filter(told).count() as u64, accepted);
    let report = replay(&recorded(&config, &lines), config).unwrap();
    assert!(report.holds(), "{report:#?}");
}

/// A killed server leaves a log that ends anywhere: what it does not tell of is no difference.
#[test]
fn every_beginning_of_a_log_replays_as_far_as_it_goes() {
    let (blocking, overlap, layered) = (SwapMode::Blocking, SwapMode::Overlap, SwapMode::Layered);
    for (swap_mode, prefetch) in [(blocking, 0), (overlap, 0), (overlap, 3), (layered, 0), (layered, 3)] {
        let config = Config { prefetch, ..twelve_adapters(swap_mode, Policy::Skip) };
        let lines = serve(&config);
        for end in 0..lines.len() {
            let report = replay(&recorded(&config, &lines[..end]), config.clone()).unwrap();
            assert!(report.holds(), "{swap_mode}, prefetch {prefetch}, {end} lines: {report:#?}");
        }
    }
}

/// The same negative control for a log that was cut short: a step that the engine ran is missing, or it is
/// replayed by another rule.
#[test]
fn half_a_log_is_still_told_from_another() {
    let config = twelve_adapters(SwapMode::Overlap, Policy::Skip);
    let lines = serve(&config);
    let ends = lines.len() * 2 / 3..lines.len();
    let half = ends.map(|end| recorded(&config, &lines[..end])).find(|half| half.under_way > 0).unwrap();
    assert!(half.steps.len() > 20);
    let mut other = half.clone();
    other.steps[15].seqs.pop();
    assert!(!replay(&other, config.clone()).unwrap().holds());
    // The engine was idle after the last step that it tells of: then no other was under way.
    let mut other = half.clone();
    other.steps.pop();
    other.last_idle = Some(half.end);
    let report = replay(&other, config.clone()).unwrap();
    assert!(report.first_difference.is_some_and(|d| d.contains("the engine ran")));
    assert!(!replay(&half, Config { swap_mode: SwapMode::Blocking, ..config }).unwrap().holds());
}

/// Requests for which each rule decides something that another rule would not, however busy the machine.
fn telling(config: &Config) -> Recorded {
    let (log, lines) = DecisionLog::in_memory();
    let (engine, times) = engine(config.clone(), 20, 100, Some(log));
    let ask = |adapter, tokens| engine.submit(request(20, Some(adapter), tokens)).unwrap();
    // The adapter used longest ago is the one used most: 3 takes its slot.
    for adapter in [0, 0, 0, 1, 2, 3] {
        ask(adapter, 1).wait().unwrap();
    }
    // Every slot is held, so that 5 waits; one behind it, whose adapter is there, goes first.
    let mut holders = [1, 2, 3].map(|adapter| ask(adapter, 400)).into_iter();
    until(&engine, "all slots held", |s| s.running == 3);
    let late = ask(5, 2);
    until(&engine, "one waits", |s| s.waiting == 1);
    ask(1, 2).wait().unwrap();
    assert_eq!(engine.stats().waiting, 1);
    // Its copy goes on beside several steps of those that still run.
    drop(holders.next());
    late.wait().unwrap();
    drop(holders);
    times.step.store(MS, Ordering::Relaxed);
    until(&engine, "idle", idle);
    engine.shutdown();
    let lines = lines.lock().unwrap();
    Recorded::new(&LogHeader::new("emulated", 1, config), &lines).unwrap()
}

/// The negative control: a replay that would pass whatever it is given shows nothing.
#[test]
fn another_rule_does_not_replay() {
    let skip = twelve_adapters(SwapMode::Overlap, Policy::Skip);
    let config = Config { max_skip_age: PATIENCE.as_nanos() as u64, ..skip };
    let recorded = telling(&config);
    assert!(replay(&recorded, config.clone()).unwrap().holds());
    for other in [
        Config { evict: Evict::Lfu, ..config.clone() },
        Config { policy: Policy::Fcfs, ..config.clone() },
        Config { swap_mode: SwapMode::Blocking, ..config.clone() },
    ] {
        let same = replay(&recorded, other.clone()).unwrap().holds();
        assert!(!same, "{other:?} replays as if nothing were different");
    }
}

#[test]
fn the_command_replays_a_log_and_tells_another_rule_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let config = twelve_adapters(SwapMode::Overlap, Policy::Skip);
    let log = DecisionLog::to_file(&path, &LogHeader::new("emulated", 1, &config)).unwrap();
    let (engine, _) = engine(config, 1, 1, Some(log));
    // One after another: the slots begin with 0, 1 and 2, so the first in is the one just used.
    for adapter in [1, 2, 0, 3, 0, 1] {
        engine.submit(request(20, Some(adapter), 2)).unwrap().wait().unwrap();
    }
    until(&engine, "idle", idle);
    engine.shutdown();
    let replay = |more: &[&str]| {
        let mut command = assert_cmd::Command::cargo_bin("lora-hbm").unwrap();
        command.arg("replay").arg(&path).args(more).assert()
    };
    replay(&[]).code(0);
    // With the same requests in both, it is the slots that differ.
    replay(&["--evict", "fifo"]).code(3).stdout(contains("the engine slot"));
    replay(&["--policy", "credit"]).code(0);
    replay(&["--evict", "best"]).code(2);
    // A log that was cut short, and one that tells of nothing yet.
    let text = std::fs::read_to_string(&path).unwrap();
    let cut = |lines: usize| {
        let text: Vec<_> = text.lines().take(lines).collect();
        std::fs::write(&path, text.join("\n")).unwrap();
        replay(&[])
    };
    let first_token =
        text.lines().collect::<Vec<_>>().iter().rposition(|line| line.contains("\"first\"")).unwrap();
    cut(first_token + 1).code(0).stdout(contains("the log ends before 1 of its requests"));
    cut(1).code(1).stderr(contains("there is nothing to replay"));
}
