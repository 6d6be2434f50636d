//! `lora-hbm serve` itself, on the `tiny` model: flags, start, mixed requests, SIGTERM.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lora_hbm::engine::setup::{EngineSettings, Loaded};
use lora_hbm::engine::{GenerateParams, GenerateRequest};
use lora_sched::{AdapterId, SwapMode};
use serde_json::{Value, json};

use crate::support::PATIENCE;

/// A `serve` process, killed when the test is done with it.
pub struct Serve {
    pub child: Child,
    pub url: String,
}

impl Drop for Serve {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora-hbm"));
    command.arg("serve").args(args).env_remove("LORA_HBM_LOG");
    command
}

/// What a `serve` that does not start says, and its exit status.
fn refused(args: &[&str]) -> (i32, String) {
    let out = command(args).output().unwrap();
    (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
}

/// Starts `tiny` with these flags and waits until it serves; the lines that it said are returned.
pub fn start(args: &[&str]) -> (Serve, Vec<String>) {
    start_with(args, &[])
}

/// The same with these variables in its environment.
fn start_with(args: &[&str], variables: &[(&str, &str)]) -> (Serve, Vec<String>) {
    let mut all = vec!["--model", "tiny", "--port", "0"];
    all.extend(args);
    let mut child = command(&all).envs(variables.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    let url = loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended after {said:#?}")).unwrap();
        let url = line.split("serving on ").nth(1).map(str::to_owned);
        said.push(line);
        if let Some(url) = url {
            break url;
        }
    };
    // Keep reading, so that it never waits for a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (Serve { child, url }, said)
}

/// Writes a profile for `--emulate` of `tiny` on a machine with these costs of steps and swaps, in nanoseconds.
pub fn emulated(folder: &Path, costs: &[(&str, f64)], swap: u64) -> PathBuf {
    let file = folder.join("machine.json");
    let mut profile = crate::oracles::machine(costs, swap, 0);
    profile.model = "tiny".to_owned();
    std::fs::write(&file, serde_json::to_string(&profile.signed()).unwrap()).unwrap();
    file
}

/// Waits for its end; fails when patience ends.
pub fn status(serve: &mut Serve) -> i32 {
    let begun = Instant::now();
    loop {
        if let Some(status) = serve.child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn signal(serve: &Serve, name: &str) {
    let sent = Command::new("kill").args([name, &serve.child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn impossible_flags_are_usage_errors_that_name_the_remedy() {
    for (args, says) in [
        (&["--gpu-loras", "2"][..], "--total-loras"),
        (&["--total-loras", "2"], "--gpu-loras"),
        (&["--total-loras", "2", "--gpu-loras", "3"], "greater than total_loras"),
        (&["--total-loras", "2", "--gpu-loras", "0"], "gpu_loras must be at least 1"),
        (&["--total-loras", "0", "--gpu-loras", "0"], "total_loras must be at least 1"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--block-size", "12"], "8, 16 or 32"),
        (&["--total-loras", "2", "--gpu-loras", "2", "-tp", "2"], "tensor-parallel-size 2"),
        (&["--total-loras", "2", "--gpu-loras", "2", "-pp=4"], "pipeline-parallel-size 4"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--policy", "lifo"], "skip, fcfs, affinity"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--evict", "best"], "lru"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--dtype", "half"], "use auto, which is"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--kv-memory", "much"], "2GiB"),
        (&["--total-loras", "2", "--gpu-loras", "2", "--max-num-batched-tokens", "8"], "max_num_seqs"),
    ] {
        let mut all = vec!["--model", "tiny", "--port", "0"];
        all.extend(args);
        let (status, message) = refused(&all);
        assert_eq!(status, 2, "{args:?}: {message}");
        assert!(message.contains(says), "{args:?}: {message}");
    }
}

#[test]
fn what_cannot_be_had_fails_with_its_reason() {
    let two = ["--total-loras", "2", "--gpu-loras", "2", "--port", "0"];
    let with = |more: &[&str]| refused(&[&two[..], more].concat());
    let (status, message) = with(&["--model", "no/such-model"]);
    assert!(status == 1 && message.contains("presets"), "{message}");
    let (status, message) = with(&["--model", "tiny", "--kv-memory", "1MiB"]);
    assert!(status == 1 && message.contains("KV"), "{message}");
    let (status, message) = with(&["--model", "tiny", "--adapters", "/no/such/folder"]);
    assert!(status == 1 && message.contains("/no/such/folder"), "{message}");
    // A tokenizer whose ids the model does not have.
    let dir = tempfile::tempdir().unwrap();
    let words: serde_json::Map<_, _> = (0..400).map(|i| (format!("w{i}"), json!(i))).collect();
    let other = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    let file = dir.path().join("tokenizer.json");
    std::fs::write(&file, other.to_string()).unwrap();
    let (status, message) = with(&["--model", "tiny", "--tokenizer", file.to_str().unwrap()]);
    assert!(message.contains("400 ids") && message.contains("--tokenizer"), "{message}");
    assert_eq!(status, 2, "{message}");
    std::fs::write(&file, "{").unwrap();
    let (status, message) = with(&["--model", "tiny", "--tokenizer", file.to_str().unwrap()]);
    assert!(status == 1 && message.contains("tokenizer.json that can be used"), "{message}");
    // Sixteen thousand 7B adapters and their slots fit in no machine that runs this.
    let huge = ["--model", "meta-llama/Llama-2-7b-hf", "--total-loras", "16000", "--gpu-loras", "16000"];
    let (status, message) = refused(&[&huge[..], &["--port", "0"]].concat());
    assert!(status == 1 && message.contains("GB required") && message.contains("--gpu-loras"), "{message}");
    assert!(message.contains("adapter slots"), "the table is shown: {message}");
}

#[test]
fn a_port_in_use_is_told_before_the_model_is_loaded() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (status, message) =
        refused(&["--model", "no/such", "--total-loras", "2", "--gpu-loras", "2", "--port", &port]);
    assert_eq!(status, 1);
    assert!(message.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{message}");
    assert!(!message.contains("no/such"), "{message}");
}

#[test]
fn a_decision_log_that_cannot_be_one_is_told_before_the_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (kept, below) = (dir.path().join("kept.jsonl"), dir.path().join("kept.jsonl/log.jsonl"));
    std::fs::write(&kept, "an earlier run's\n").unwrap();
    for (log, wanted, says) in [(&kept, 2, "name another file"), (&below, 1, "cannot write")] {
        let log = log.to_str().unwrap();
        let args = ["--model", "no/such", "--total-loras", "2", "--gpu-loras", "2", "--decision-log", log];
        let (status, message) = refused(&args);
        assert!(status == wanted && message.contains(says) && message.contains(log), "{message}");
        assert!(!message.contains("no/such"), "{message}");
    }
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "an earlier run's\n");
}

/// One exchange, waited for: the body of what comes back.
fn exchange(request: reqwest::RequestBuilder) -> reqwest::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { request.send().await?.text().await })
}

fn generate(url: &str, body: &Value) -> reqwest::Result<String> {
    exchange(reqwest::Client::new().post(format!("{url}/generate")).json(body))
}

pub fn get(url: &str) -> String {
    exchange(reqwest::Client::new().get(url)).unwrap()
}

#[test]
fn it_says_what_it_serves_and_drains_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("decisions.jsonl");
    let log_flag = log.to_str().unwrap();
    let (mut serve, said) = start(&[
        "--total-loras",
        "8",
        "--gpu-loras",
        "2",
        "--use-dummy-weights",
        "--ranks",
        "4,8,2",
        "--max-r",
        "8",
        "--policy",
        "credit",
        "--kv-memory",
        "256MiB",
        "--decision-log",
        log_flag,
    ]);
    let said = said.join("\n");
    for what in ["dummy weights", "byte-level", "adapter slots", "KV blocks", "credit"] {
        assert!(said.contains(what), "{what}: {said}");
    }
    let body = json!({"prompt": "Hello", "model_id": 5, "max_tokens": 16, "temperature": 0.0});
    let parsed = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    let answer = parsed(generate(&serve.url, &body).unwrap());
    let text = answer["text"][0].as_str().unwrap();
    assert!(text.starts_with("Hello") && text.len() >= 21, "{answer}");
    assert_eq!(answer, {
        let mut again = parsed(generate(&serve.url, &body).unwrap());
        for key in ["ttft", "completion_time", "ttft_parts"] {
            again[key] = answer[key].clone();
        }
        again
    });
    let health: lora_hbm::loadgen::endpoint::Health =
        serde_json::from_str(&get(&format!("{}/health", serve.url))).unwrap();
    assert_eq!(health.config.tokenizer.as_deref(), Some("byte-level"));
    assert_eq!((health.config.ranks, health.config.max_r), (Some(vec![4, 8, 2]), Some(8)));
    let stats = parsed(get(&format!("{}/swap_stats", serve.url)));
    assert_eq!(stats["init"], json!({"swap_calls": 1, "swap_count": 2}));
    assert_eq!(stats["runtime"], json!({"swap_calls": 1, "swap_count": 1}));

    let url = serve.url.clone();
    let taken = metric(&serve.url, "vllm:prompt_tokens_total");
    let streaming = std::thread::spawn(move || {
        let body = json!({"prompt": "Hello", "max_tokens": 2000, "stream": true, "temperature": 0.0});
        generate(&url, &body).unwrap()
    });
    until_metric(&serve.url, "vllm:prompt_tokens_total", |n| n > taken);
    signal(&serve, "-TERM");
    let stream = streaming.join().unwrap();
    assert_eq!(stream.matches('\0').count(), 2000);
    assert!(stream.contains("\"finished\": true"));
    assert_eq!(status(&mut serve), 0);

    let (header, lines) = lora_hbm::report::decision_log::read(&log).unwrap();
    assert_eq!((header.model.as_str(), header.config.gpu_loras), ("tiny", 2));
    let last = serde_json::to_value(lines.last().unwrap()).unwrap();
    assert_eq!(last["line"], "idle", "the log is whole: {last}");
}

pub fn metric(url: &str, name: &str) -> f64 {
    let text = get(&format!("{url}/metrics"));
    let line = text.lines().find(|l| l.starts_with(name)).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits for a figure; fails with it when patience ends.
pub fn until_metric(url: &str, name: &str, ok: impl Fn(f64) -> bool) {
    let begun = Instant::now();
    loop {
        let value = metric(url, name);
        if ok(value) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{name} is {value}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_key_may_come_from_the_environment() {
    let flags = ["--total-loras", "2", "--gpu-loras", "2", "--kv-memory", "256MiB"];
    let (serve, said) = start_with(&flags, &[("LORA_HBM_API_KEY", "of-the-environment")]);
    assert!(said.iter().all(|line| !line.contains("of-the-environment")), "{said:?}");
    let models = || reqwest::Client::new().get(format!("{}/v1/models", serve.url));
    assert!(exchange(models()).unwrap().contains("AuthenticationError"));
    assert!(exchange(models().bearer_auth("another")).unwrap().contains("AuthenticationError"));
    assert!(exchange(models().bearer_auth("of-the-environment")).unwrap().contains("lora-1"));
    assert!(get(&format!("{}/health", serve.url)).contains("\"ok\""), "needs none");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut serve, _) = start(&["--total-loras", "2", "--gpu-loras", "2", "--kv-memory", "256MiB"]);
    let url = serve.url.clone();
    std::thread::spawn(move || {
        let body = json!({"prompt": "a", "max_tokens": 8000});
        // Cut off, as it should be.
        let _ = generate(&url, &body);
    });
    until_metric(&serve.url, "vllm:num_requests_running", |n| n > 0.0);
    signal(&serve, "-TERM");
    std::thread::sleep(Duration::from_millis(50));
    assert!(serve.child.try_wait().unwrap().is_none(), "it drains");
    signal(&serve, "-INT");
    assert_eq!(status(&mut serve), 1);
}

/// `tiny` in this process, on one thread.
fn tiny(swap_mode: SwapMode) -> Loaded {
    Loaded::load(EngineSettings {
        model: "tiny".into(),
        total_loras: 6,
        gpu_loras: 2,
        ranks: vec![8, 4, 2],
        max_num_seqs: 4,
        max_num_batched_tokens: 96,
        max_model_len: Some(256),
        swap_mode,
        threads: 1,
        ..EngineSettings::default()
    })
    .unwrap()
}

#[test]
fn mixed_requests_get_what_each_gets_alone() {
    let requests: Vec<GenerateRequest> = (0..12u32)
        .map(|i| GenerateRequest {
            prompt: std::iter::once(1).chain((0..10 + 15 * i).map(|k| 35 + (k * (i + 3)) % 90)).collect(),
            adapter: (i % 7 != 6).then_some(AdapterId(i % 7 % 6)),
            params: GenerateParams {
                max_tokens: 6 + i,
                temperature: if i % 2 == 0 { 0.0 } else { 0.8 },
                seed: Some(u64::from(i)),
                ..GenerateParams::default()
            },
            received: None,
        })
        .collect();
    let loaded = tiny(SwapMode::Layered);
    // The budget is the one thing that may not change what is said.
    let alone = loaded.start(6, None).unwrap();
    let expected: Vec<_> =
        requests.iter().map(|r| alone.submit(r.clone()).unwrap().wait().unwrap().tokens).collect();
    assert!(expected.iter().zip(&expected[1..]).all(|(a, b)| a != b));
    drop(alone);
    for swap_mode in [SwapMode::Layered, SwapMode::Overlap, SwapMode::Blocking] {
        let engine = tiny(swap_mode).start(2, None).unwrap();
        let handles: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for (handle, expected) in handles.into_iter().zip(&expected) {
            assert_eq!(&handle.wait().unwrap().tokens, expected, "{swap_mode}");
        }
        assert!(engine.stats().swaps >= 4);
    }
}

#[test]
fn a_folder_without_adapters_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let settings = EngineSettings {
        model: "tiny".into(),
        adapters: Some(Path::new(dir.path()).to_owned()),
        ..EngineSettings::default()
    };
    let error = Loaded::load(settings).unwrap_err().to_string();
    assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
}

#[test]
fn an_emulated_engine_serves_a_profile_s_machine() {
    let dir = tempfile::tempdir().unwrap();
    let file = emulated(dir.path(), &[("step", 1e6), ("tokens:0-", 1e4)], 2_000_000);
    let path = file.to_str().unwrap();
    let (mut serve, said) = start(&["--total-loras", "8", "--gpu-loras", "2", "--emulate", path]);
    assert!(said.iter().any(|line| line.contains("nothing is computed")), "{said:?}");
    let health: Value = serde_json::from_str(&get(&format!("{}/health", serve.url))).unwrap();
    assert!(health["config"]["device"].as_str().is_some_and(|d| d.starts_with("emulated")), "{health}");

    let (status, message) = refused(&["--total-loras", "8", "--gpu-loras", "2", "--emulate", "no-such"]);
    assert!(status == 1 && message.contains("'no-such'"), "{message}");
    let other = ["--total-loras", "8", "--gpu-loras", "2", "--model", "some/other", "--emulate", path];
    let (status, message) = refused(&other);
    assert!(status == 1 && message.contains("some/other"), "{message}");
    // A model that was named is meant, though it be the one that is served where none is.
    let default =
        ["--total-loras", "8", "--gpu-loras", "2", "--model", "facebook/opt-125m", "--emulate", path];
    let (status, message) = refused(&default);
    assert!(status == 1 && message.contains("facebook/opt-125m"), "{message}");
    let both = ["--total-loras", "8", "--gpu-loras", "2", "--adapters", "x", "--emulate", path];
    let (status, message) = refused(&both);
    assert!(status == 2 && message.contains("--adapters"), "{message}");
    signal(&serve, "-TERM");
    assert_eq!(self::status(&mut serve), 0);
}
