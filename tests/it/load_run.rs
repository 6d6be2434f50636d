//! The load generator as a library.

use std::time::Duration;

use lora_hbm::loadgen::{Endpoint, LoadOptions, LoadOutcome, PreparedRequest, prepare, run_load};
use lora_hbm::report::record::Status;
use lora_hbm::workload::arrivals::Arrivals;
use lora_hbm::workload::pool::PromptPool;
use lora_hbm::workload::popularity::Popularity;
use lora_hbm::workload::regime::Regime;
use lora_hbm::workload::spec::{Amount, WorkloadSpec, generate_trace};
use lora_hbm::workload::tokenizer::Tokenizer;

use crate::load_support::mock::{Behaviour, Mock};

fn requests(n: u64, rate: f64) -> Vec<PreparedRequest> {
    let spec = WorkloadSpec {
        regime: Regime::Short,
        arrivals: Arrivals::Fixed,
        rate,
        popularity: Popularity::Uniform,
        total_loras: 128,
        amount: Amount::Requests(n),
        max_tokens: 4,
        seed: 1,
        ranks: vec![8],
    };
    let trace = generate_trace(&spec, &PromptPool::embedded(Regime::Short)).unwrap();
    prepare(&trace, &Tokenizer::byte_level()).unwrap()
}

fn run(mock: &Mock, requests: &[PreparedRequest], options: &LoadOptions) -> LoadOutcome {
    let server = Endpoint::new(&mock.url(), None).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut last = 0;
    let outcome = runtime.block_on(run_load(&server, requests, options, |p| last = p.ended));
    assert!(last <= requests.len());
    assert_eq!(outcome.records.len(), requests.len());
    outcome
}

#[test]
fn a_request_is_recorded_with_all_its_times() {
    let mock = Mock::start(Behaviour::default());
    let requests = requests(20, 200.0);
    let outcome = run(&mock, &requests, &LoadOptions::default());
    assert_eq!(outcome.cut_short, None);
    for (record, request) in outcome.records.iter().zip(&requests) {
        assert_eq!((record.id, record.adapter, record.rank), (request.id, request.adapter, Some(8)));
        assert_eq!((record.status, record.output_tokens), (Status::Ok, 4), "{:?}", record.error);
        assert_eq!(record.scheduled_s, request.scheduled_s);
        assert!(record.sent_s >= record.scheduled_s);
        let (first, last) = (record.first_s.unwrap(), record.last_s.unwrap());
        assert!(record.sent_s < first && first <= last && last <= outcome.wall_s);
        assert_eq!(record.ttft_s, Some(0.0125));
        assert!((record.parts.unwrap().total() - 0.0125).abs() < 1e-12);
        assert!((record.latency_s.unwrap() - (last - record.sent_s)).abs() < 1e-12);
    }
    let lag = outcome.lag;
    assert!(lag.median_s >= 0.0 && lag.median_s <= lag.p99_s && lag.p99_s <= lag.max_s);
}

#[test]
fn the_server_gets_what_the_trace_says() {
    let mock = Mock::start(Behaviour::default());
    let requests = requests(10, 200.0);
    run(&mock, &requests, &LoadOptions::default());
    let mut bodies: Vec<Vec<u8>> = mock.requests().iter().map(|b| b.to_string().into_bytes()).collect();
    let mut sent: Vec<Vec<u8>> = requests
        .iter()
        .map(|r| serde_json::from_slice::<serde_json::Value>(&r.body).unwrap().to_string().into_bytes())
        .collect();
    bodies.sort();
    sent.sort();
    assert_eq!(bodies, sent);
    for request in &requests {
        let body: serde_json::Value = serde_json::from_slice(&request.body).unwrap();
        // Byte-level: BOS and a token a byte.
        assert_eq!(body["prompt"].as_str().unwrap().len() + 1, request.prompt_tokens as usize);
        assert_eq!((&body["stream"], &body["ignore_eos"]), (&true.into(), &true.into()));
    }
}

#[test]
fn requests_are_sent_whether_or_not_earlier_ones_have_ended() {
    let mock = Mock::start(Behaviour { delay: Duration::from_secs(3), ..Behaviour::default() });
    let outcome = run(&mock, &requests(30, 100.0), &LoadOptions::default());
    assert!(outcome.records.iter().all(|r| r.status == Status::Ok));
    // A closed loop, or a pool with a limit, would have fewer.
    assert_eq!(mock.most_in_flight(), 30);
}

#[test]
fn refusals_cut_streams_and_time_outs_are_told_apart() {
    let refuse = Some(axum::http::StatusCode::SERVICE_UNAVAILABLE);
    for (behaviour, status, said) in [
        (Behaviour { refuse, ..Behaviour::default() }, Status::Error, "HTTP 503: not today"),
        (Behaviour { cuts: true, ..Behaviour::default() }, Status::Error, "ended before the output did"),
        (Behaviour { hangs: true, ..Behaviour::default() }, Status::Timeout, "no end after 0.3 s"),
    ] {
        let mut options = LoadOptions::default();
        if behaviour.hangs {
            options.timeout = Duration::from_millis(300);
        }
        let mock = Mock::start(behaviour);
        let outcome = run(&mock, &requests(3, 100.0), &options);
        for record in &outcome.records {
            assert_eq!((record.status, record.last_s, record.latency_s), (status, None, None));
            assert!(record.error.as_ref().unwrap().contains(said), "{:?}", record.error);
        }
        assert_eq!(outcome.cut_short, None);
    }
}

#[test]
fn a_server_that_goes_away_ends_the_run_with_every_request_accounted_for() {
    let mock = Mock::start(Behaviour { dies_after: Some(10), ..Behaviour::default() });
    // The whole trace would take a minute: the run must notice before. It has three seconds of requests to do so.
    let mut requests = requests(400, 100.0);
    requests[300..].iter_mut().for_each(|r| r.scheduled_s += 60.0);
    let outcome = run(&mock, &requests, &LoadOptions::default());
    assert!(outcome.cut_short.as_ref().unwrap().contains("went away"), "{:?}", outcome.cut_short);
    let ok = outcome.records.iter().filter(|r| r.status == Status::Ok).count();
    assert!(ok <= 10, "{ok}");
    assert!(outcome.records[399].error.as_ref().unwrap().contains("not sent"));
    assert!(outcome.records[399].status == Status::Error && outcome.wall_s < 50.0);
}

#[test]
fn a_run_can_be_stopped() {
    let mock = Mock::start(Behaviour { hangs: true, ..Behaviour::default() });
    let options = LoadOptions::default();
    let stop = options.stop.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        stop.cancel();
    });
    let outcome = run(&mock, &requests(1000, 100.0), &options);
    assert!(outcome.cut_short.as_ref().unwrap().contains("interrupted"));
    assert!(outcome.records.iter().all(|r| r.status == Status::Error));
}
