//! A run in the keys of `vllm bench serve`, for scripts that read its results.

use serde_json::{Map, Value, json};

use super::run::LoadOutcome;
use crate::report::record::{RequestRecord, Status};
use crate::report::stats::{Summary, std_dev};

/// Times in milliseconds as that program measures them: all at the client, from sending.
pub fn bench_keys(outcome: &LoadOutcome) -> Map<String, Value> {
    let ok: Vec<&RequestRecord> = outcome.records.iter().filter(|r| r.status == Status::Ok).collect();
    let input: u64 = ok.iter().map(|r| u64::from(r.prompt_tokens)).sum();
    let output: u64 = ok.iter().map(|r| u64::from(r.output_tokens)).sum();
    let per_second = |n: u64| n as f64 / outcome.wall_s;
    let mut keys = Map::new();
    let mut put = |key: &str, value: Value| keys.insert(key.to_owned(), value);
    put("duration", json!(outcome.wall_s));
    put("num_prompts", json!(outcome.records.len()));
    put("completed", json!(ok.len()));
    put("failed", json!(outcome.records.len() - ok.len()));
    put("total_input_tokens", json!(input));
    put("total_output_tokens", json!(output));
    put("request_throughput", json!(per_second(ok.len() as u64)));
    put("output_throughput", json!(per_second(output)));
    put("total_token_throughput", json!(per_second(input + output)));
    let ttft = |r: &RequestRecord| Some(r.first_s? - r.sent_s);
    let tpot = |r: &RequestRecord| {
        let after_first = r.output_tokens.checked_sub(1).filter(|n| *n > 0)?;
        Some((r.last_s? - r.first_s?) / f64::from(after_first))
    };
    let e2el = |r: &RequestRecord| r.latency_s;
    // Of all requests together, so that a long one counts as often as it has gaps.
    let times = outcome.records.iter().zip(&outcome.token_times);
    let of_ok = times.filter(|(r, _)| r.status == Status::Ok).map(|(_, times)| times);
    let itl = of_ok.flat_map(|times| times.windows(2).map(|pair| pair[1] - pair[0])).collect();
    let seconds: [(&str, Vec<f64>); 4] = [
        ("ttft", ok.iter().copied().filter_map(ttft).collect()),
        ("tpot", ok.iter().copied().filter_map(tpot).collect()),
        ("itl", itl),
        ("e2el", ok.iter().copied().filter_map(e2el).collect()),
    ];
    for (name, seconds) in seconds {
        let ms: Vec<f64> = seconds.iter().map(|s| s * 1e3).collect();
        let Some(summary) = Summary::of(&ms) else { continue };
        put(&format!("mean_{name}_ms"), json!(summary.mean));
        put(&format!("median_{name}_ms"), json!(summary.median));
        put(&format!("std_{name}_ms"), json!(std_dev(&ms).unwrap_or_default()));
        put(&format!("p99_{name}_ms"), json!(summary.p99));
    }
    keys
}
