//! The step loop over an emulated device: what is generated, in what order, and what is given back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lora_hbm::engine::emulated::EmulatedExecutor;
use lora_hbm::engine::executor::{Completion, Executor, ExecutorError, StepFeed, StepResult, Waker};
use lora_hbm::engine::{Finish, GenerateParams, GenerateRequest, SubmitError, SwapCounts};
use lora_hbm::report::decision_log::{DecisionLog, LogHeader, LogLine};
use lora_sched::{AdapterId, Config, EventError, Nanos, RequestId, StepPlan, SwapMode, SwapPlan};

use crate::support::{MS, config, engine, idle, letter, on, request, until};

/// The text that the emulated model says to a request.
fn said(id: RequestId, prompt: usize, tokens: usize) -> String {
    (0..tokens).map(|i| char::from((letter(id, (prompt + i) as u32) - 3) as u8)).collect()
}

#[test]
fn every_request_gets_its_own_tokens_to_its_length() {
    for swap_mode in [SwapMode::Blocking, SwapMode::Overlap, SwapMode::Layered] {
        let (engine, _) = engine(Config { swap_mode, ..config() }, 1, 1, None);
        let handles: Vec<_> = (0..12)
            .map(|i| {
                let adapter = (i % 5 != 4).then_some(i as u32 % 5);
                (i, engine.submit(request(10 + 37 * i, adapter, 1 + i as u32)).unwrap())
            })
            .collect();
        for (i, handle) in handles {
            let id = handle.id();
            let out = handle.wait().unwrap();
            assert_eq!(out.text, said(id, 10 + 37 * i, 1 + i), "{swap_mode}");
            assert_eq!((out.finish, out.tokens.len()), (Finish::Length, 1 + i));
            let first = out.first.unwrap();
            assert_eq!(first.parts.total(), first.at - out.received, "parts sum to the TTFT");
        }
        until(&engine, "idle", idle);
        assert!(engine.stats().swaps >= 2, "adapters 2 and 3 were copied in");
        assert_eq!(engine.open_requests(), 0);
    }
}

#[test]
fn a_preempted_request_goes_on_where_it_was() {
    // Four sequences of up to 128 tokens and blocks for little more than one.
    let config = Config { max_model_len: 160, kv_blocks: 12, ..config() };
    let (engine, times) = engine(config, 200, 0, None);
    let handles: Vec<_> = (0..4).map(|i| engine.submit(request(20, Some(i % 2), 100)).unwrap()).collect();
    // Together, not one after the other.
    until(&engine, "all there", |s| s.running + s.waiting == 4);
    times.step.store(0, Ordering::Relaxed);
    for handle in handles {
        let id = handle.id();
        assert_eq!(handle.wait().unwrap().text, said(id, 20, 100));
    }
    assert!(engine.stats().preempted > 0);
    until(&engine, "idle", idle);
}

#[test]
fn stop_tokens_and_stop_strings_end_the_output_before_them() {
    let (engine, _) = engine(config(), 0, 0, None);
    let with = |params: GenerateParams| GenerateRequest { params, ..request(10, None, 0) };
    let whole = said(RequestId(0), 10, 12);

    let stop = [whole[4..7].to_owned(), whole[5..6].to_owned()].into();
    let params = GenerateParams { max_tokens: 12, stop, ..GenerateParams::default() };
    let out = engine.submit(with(params)).unwrap().wait().unwrap();
    // The second string is complete one token before the first.
    assert_eq!((out.text.as_str(), out.finish), (&whole[..5], Finish::Stop));
    assert!(out.first.is_some());

    let whole = said(RequestId(1), 10, 12);
    let at = |i: u32| letter(RequestId(1), 10 + i);
    let stop_token_ids = [at(1), at(3)].into();
    let params =
        GenerateParams { max_tokens: 12, min_tokens: 3, stop_token_ids, ..GenerateParams::default() };
    let out = engine.submit(with(params)).unwrap().wait().unwrap();
    assert_eq!((out.text.as_str(), out.finish, out.tokens.len()), (&whole[..3], Finish::Stop, 4));

    let whole = said(RequestId(2), 10, 12);
    let stop = [whole[..1].to_owned()].into();
    let params = GenerateParams { max_tokens: 12, stop, ..GenerateParams::default() };
    let out = engine.submit(with(params)).unwrap().wait().unwrap();
    assert_eq!((out.text.as_str(), out.finish), ("", Finish::Stop));
    assert!(out.first.is_some(), "a stop string in the first token still leaves a TTFT");

    // A beginning of a stop string that never completes comes out in the end.
    let whole = said(RequestId(3), 10, 12);
    let stop = [format!("{}!", &whole[11..])].into();
    let params = GenerateParams { max_tokens: 12, stop, ..GenerateParams::default() };
    let out = engine.submit(with(params)).unwrap().wait().unwrap();
    assert_eq!((out.text, out.finish), (whole, Finish::Length));
    until(&engine, "idle", idle);
}

#[test]
fn a_stop_string_is_counted_as_what_the_client_is_told() {
    let (engine, _) = engine(config(), 20, 0, None);
    let stop = [said(RequestId(0), 10, 3)[2..].to_owned()].into();
    let params = GenerateParams { max_tokens: 400, stop, ..GenerateParams::default() };
    let out = engine.submit(GenerateRequest { params, ..request(10, None, 0) }).unwrap().wait().unwrap();
    assert_eq!(out.finish, Finish::Stop);
    // The step that ran when it was found goes on.
    until(&engine, "idle", idle);
    let stats = engine.stats();
    assert_eq!((stats.finished_stop, stats.finished_length, stats.cancelled), (1, 0, 0));
}

/// A device that does steps until it fails, and takes its time to be given back.
struct Failing {
    inner: EmulatedExecutor,
    steps: usize,
}

impl Drop for Failing {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_secs(1));
    }
}

impl Executor for Failing {
    fn submit_step(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), ExecutorError> {
        if self.steps == 0 {
            return Err(ExecutorError { device: "this one", message: "it fell off the bus".into() });
        }
        self.steps -= 1;
        self.inner.submit_step(plan, feed)
    }

    fn submit_swap(&mut self, swap: &SwapPlan) -> Result<(), ExecutorError> {
        self.inner.submit_swap(swap)
    }

    fn poll(&mut self) -> Result<Option<Completion>, ExecutorError> {
        self.inner.poll()
    }

    fn wait(&mut self) -> Result<Completion, ExecutorError> {
        self.inner.wait()
    }

    fn step_result(&self) -> &StepResult {
        self.inner.step_result()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.inner.set_waker(waker);
    }

    fn clock(&self) -> Nanos {
        self.inner.clock()
    }

    fn preload(&mut self, adapters: &[AdapterId]) -> Result<(), ExecutorError> {
        self.inner.preload(adapters)
    }
}

#[test]
fn a_device_that_fails_is_told_of_before_it_is_given_back() {
    let costs = (|_: &StepPlan| MS, |_: &SwapPlan| MS);
    let inner = EmulatedExecutor::new(costs, letter, 4).unwrap();
    let engine = on(Box::new(Failing { inner, steps: 3 }), config(), None);
    let handles = [0, 1].map(|adapter| engine.submit(request(10, Some(adapter), 50)).unwrap());
    for handle in handles {
        assert_eq!(handle.wait().unwrap().finish, Finish::Abort);
        let failure = engine.failure().expect("whoever is aborted finds the reason");
        assert!(failure.contains("it fell off the bus"), "{failure}");
    }
    let refused = engine.submit(request(10, None, 1)).unwrap_err().to_string();
    assert!(refused.contains("it fell off the bus"), "{refused}");
}

#[test]
fn impossible_requests_are_refused_before_they_queue() {
    let (engine, _) = engine(config(), 0, 0, None);
    let refused = |r| match engine.submit(r) {
        Err(e) => e,
        Ok(_) => panic!("taken"),
    };
    let error = refused(request(500, None, 13));
    assert_eq!(error, SubmitError::Refused(EventError::TooLong { tokens: 513, max_model_len: 512 }));
    assert!(matches!(refused(request(1, Some(4), 1)), SubmitError::Refused(EventError::UnknownAdapter(_))));
    let bad = GenerateRequest { prompt: [259].into(), ..request(1, None, 1) };
    assert_eq!(refused(bad), SubmitError::NoSuchToken { id: 259, vocab: 259 });
    assert!(engine.submit(request(500, None, 12)).unwrap().wait().is_ok());
}

#[test]
fn a_full_queue_refuses_and_counts() {
    let (engine, times) = engine(Config { max_queue: 2, max_num_seqs: 1, ..config() }, 200, 0, None);
    let running = engine.submit(request(10, None, 100)).unwrap();
    until(&engine, "running", |s| s.running == 1);
    let waiting: Vec<_> = (0..2).map(|_| engine.submit(request(10, None, 2)).unwrap()).collect();
    let error = engine.submit(request(10, None, 2)).unwrap().wait().unwrap_err();
    assert!(error.is_overload(), "{error}");
    assert_eq!(engine.stats().refused, 1);
    times.step.store(0, Ordering::Relaxed);
    assert_eq!(running.wait().unwrap().tokens.len(), 100);
    for handle in waiting {
        assert_eq!(handle.wait().unwrap().tokens.len(), 2);
    }
}

#[test]
fn a_dropped_handle_gives_everything_back_in_every_phase() {
    // Queued: one place, taken by another request.
    let (engine, times) = engine(Config { max_num_seqs: 1, ..config() }, 100, 0, None);
    let running = engine.submit(request(10, Some(0), 400)).unwrap();
    until(&engine, "running", |s| s.running == 1);
    let queued = engine.submit(request(10, Some(1), 400)).unwrap();
    until(&engine, "queued", |s| s.waiting == 1);
    drop(queued);
    until(&engine, "gone from the queue", |s| s.waiting == 0);
    assert_eq!(engine.stats().running, 1, "the other one goes on");
    // Prefilling or decoding: its step has begun and is waited for.
    drop(running);
    until(&engine, "idle", idle);
    assert_eq!(engine.stats().cancelled, 2);
    times.step.store(0, Ordering::Relaxed);
    assert!(engine.submit(request(10, Some(0), 2)).unwrap().wait().is_ok());
}

#[test]
fn a_request_that_goes_while_its_adapter_comes_leaves_no_pin() {
    for swap_mode in [SwapMode::Blocking, SwapMode::Overlap, SwapMode::Layered] {
        let (engine, times) = engine(Config { swap_mode, ..config() }, 1, 150, None);
        let swapping = engine.submit(request(10, Some(3), 5)).unwrap();
        until(&engine, "swapping", |_| engine.swap_stats().runtime.swap_count == 1);
        drop(swapping);
        until(&engine, "idle", idle);
        // Both slots can be had again: no pin is left.
        times.swap.store(MS, Ordering::Relaxed);
        let two: Vec<_> = [1, 2].map(|a| engine.submit(request(10, Some(a), 2)).unwrap()).into();
        for handle in two {
            assert_eq!(handle.wait().unwrap().tokens.len(), 2, "{swap_mode}");
        }
        until(&engine, "idle", idle);
    }
}

#[test]
fn swap_statistics_follow_the_references_rules() {
    let (engine, _) = engine(config(), 1, 1, None);
    let of = |swap_calls, swap_count| SwapCounts { swap_calls, swap_count };
    assert_eq!(engine.swap_stats().init, of(1, 2));
    for adapter in [0, 1, 0] {
        engine.submit(request(10, Some(adapter), 1)).unwrap().wait().unwrap();
    }
    assert_eq!(engine.swap_stats().runtime, of(0, 0), "residents are not copied");
    engine.submit(request(10, Some(2), 1)).unwrap().wait().unwrap();
    engine.submit(request(10, Some(3), 1)).unwrap().wait().unwrap();
    assert_eq!(engine.swap_stats().runtime, of(2, 2));
    engine.reset_swap_stats();
    assert_eq!(engine.swap_stats().runtime, of(0, 0));
    assert_eq!(engine.swap_stats().init, of(1, 2));
}

#[test]
fn a_stopped_engine_aborts_what_runs_and_takes_nothing() {
    let (engine, _) = engine(config(), 50, 0, None);
    let running = engine.submit(request(10, None, 400)).unwrap();
    until(&engine, "running", |s| s.running == 1);
    engine.shutdown();
    assert_eq!(running.wait().unwrap().finish, Finish::Abort);
    assert!(engine.submit(request(10, None, 1)).is_err());
    assert_eq!(engine.open_requests(), 0);
}

#[test]
fn the_decision_log_has_every_request_step_and_swap_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let log = DecisionLog::to_file(&path, &LogHeader::new("emulated", 1, &config())).unwrap();
    let (engine, _) = engine(config(), 1, 1, Some(log));
    let handles: Vec<_> = (0..8).map(|i| engine.submit(request(30, Some(i % 4), 3)).unwrap()).collect();
    for handle in handles {
        handle.wait().unwrap();
    }
    until(&engine, "idle", idle);
    let (steps, swaps) = (engine.stats().steps as usize, engine.stats().swaps as usize);
    drop(engine);

    let (header, lines) = lora_hbm::report::decision_log::read(&path).unwrap();
    assert_eq!(Config::try_from(&header.config).unwrap(), config());
    let count = |f: fn(&LogLine) -> bool| lines.iter().filter(|l| f(l)).count();
    assert_eq!(count(|l| matches!(l, LogLine::Arrive { refused: None, .. })), 8);
    assert_eq!(count(|l| matches!(l, LogLine::First { .. })), 8);
    assert_eq!(count(|l| matches!(l, LogLine::Ended { .. })), 8);
    assert_eq!(count(|l| matches!(l, LogLine::Step { .. })), steps);
    assert_eq!(count(|l| matches!(l, LogLine::StepDone { .. })), steps);
    assert_eq!(count(|l| matches!(l, LogLine::Swap { .. })), swaps);
    assert!(swaps >= 2);
    let mut last = 0;
    for line in &lines {
        match line {
            LogLine::Arrive { t, received, .. } => assert!(received <= t),
            LogLine::Step { formed, submitted, started, ended, done, .. } => {
                let times = [formed, submitted, started, ended, done];
                assert!(times.is_sorted(), "{line:?}");
                assert!(*ended - *started >= MS);
            }
            LogLine::Swap { decided, submitted, started, ended, done, .. } => {
                assert!([decided, submitted, started, ended, done].is_sorted(), "{line:?}");
            }
            _ => {}
        }
        let t = match line {
            LogLine::Arrive { t, .. }
            | LogLine::Cancel { t, .. }
            | LogLine::StepDone { t, .. }
            | LogLine::SwapDone { t, .. }
            | LogLine::Idle { t } => *t,
            _ => continue,
        };
        assert!(t > last, "no two events at one time: {line:?}");
        last = t;
    }
}
