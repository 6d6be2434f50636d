//! `measure`, `probe` and `bench loadgen` over the OpenAI-compatible interface.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::load_support::mock::{Behaviour, Mock};
use crate::load_support::openai::{Instead, OpenAi};
use crate::load_support::{program, stderr, stdout};

fn measure(folder: &Path, url: &str, more: &[&str]) -> assert_cmd::assert::Assert {
    program(folder)
        .args(["--format", "json", "measure", "-e", url, "--api", "openai", "--gpu-loras", "2"])
        .args(["-n", "40", "-r", "400", "--max-tokens", "3", "--requests-out", "q.jsonl"])
        .args(more)
        .assert()
}

fn server(openai: OpenAi) -> Mock {
    Mock::start(Behaviour { openai, ..Behaviour::default() })
}

fn requests(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("q.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn report(done: &assert_cmd::assert::Assert) -> Value {
    serde_json::from_str(&stdout(done)).unwrap()
}

#[test]
fn requests_name_adapters_and_counts_are_the_servers() {
    let (mock, folder) = (server(OpenAi::default()), tempfile::tempdir().unwrap());
    let done = measure(folder.path(), &mock.url(), &["--total-loras", "128", "-o", "r.csv"]).success();
    let sent = mock.requests();
    assert_eq!(sent.len(), 40);
    for body in &sent {
        let adapter = body["model"].as_str().unwrap().strip_prefix("lora-").unwrap();
        assert!(adapter.parse::<u32>().unwrap() < 128, "{body}");
        assert_eq!(body["stream_options"], json!({"include_usage": true}));
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(3), &json!(true)));
    }
    let report = report(&done);
    assert_eq!((&report["successful"], &report["model"]), (&json!(40), &json!("stand-in")));
    assert_eq!((&report["prompt_tokens_min"], &report["prompt_tokens_max"]), (&json!(300), &json!(300)));
    assert_eq!((&report["total_output_tokens"], &report["errors_by_kind"]), (&json!(120), &json!({})));
    assert!(report["mean_ttft_ms"].as_f64().unwrap() >= 2.0, "{report}");
    let csv = std::fs::read_to_string(folder.path().join("r.csv")).unwrap();
    assert_eq!(csv.lines().count(), 2);
}

#[test]
fn without_usage_tokens_are_messages_with_text() {
    let mock = server(OpenAi { usage: false, empty_first: true, ..OpenAi::default() });
    let folder = tempfile::tempdir().unwrap();
    let done = measure(folder.path(), &mock.url(), &["--total-loras", "128"]).success();
    assert_eq!(report(&done)["total_output_tokens"], 120);
}

/// The empty chunk comes before the delay and the first token after it.
#[test]
fn a_chunk_without_text_is_no_first_token() {
    let delay = Duration::from_millis(60);
    let openai = OpenAi { empty_first: true, ..OpenAi::default() };
    let mock = Mock::start(Behaviour { delay, openai, ..Behaviour::default() });
    let folder = tempfile::tempdir().unwrap();
    measure(folder.path(), &mock.url(), &["--total-loras", "128"]).success();
    for request in requests(folder.path()) {
        assert!(request["ttft_s"].as_f64().unwrap() >= delay.as_secs_f64(), "{request}");
    }
}

#[test]
fn failures_are_counted_by_kind() {
    let folder = tempfile::tempdir().unwrap();
    for (instead, kind, said) in [
        (Instead::Error, "error in the stream", "out of luck"),
        (Instead::End, "stream cut off", "before the output did"),
        (Instead::Garbage, "unexpected answer", "in an event's data"),
        (Instead::NoText, "no text", "no first token"),
        (Instead::Whole, "unexpected answer", "application/json, not text/event-stream"),
    ] {
        let mock = server(OpenAi { instead, ..OpenAi::default() });
        let failed = measure(folder.path(), &mock.url(), &["--total-loras", "128"]).code(1);
        assert_eq!(report(&failed)["errors_by_kind"], json!({kind: 40}), "{}", stdout(&failed));
        assert!(stderr(&failed).contains(said), "{}", stderr(&failed));
    }
    let mock = Mock::start(Behaviour {
        refuse: Some(axum::http::StatusCode::SERVICE_UNAVAILABLE),
        ..Behaviour::default()
    });
    let failed = measure(folder.path(), &mock.url(), &["--total-loras", "128"]).code(1);
    assert_eq!(report(&failed)["errors_by_kind"], json!({"HTTP 503": 40}));
    assert!(stderr(&failed).contains("HTTP 503: not today"), "{}", stderr(&failed));
}

#[test]
fn adapters_go_by_the_names_that_were_given_or_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let of = |names: &[&str]| {
        // Its /health says 128 adapters; of these there are as many as names.
        let adapters: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let total_loras = names.len() as u32;
        Mock::start(Behaviour {
            total_loras,
            openai: OpenAi { adapters, ..OpenAi::default() },
            ..Behaviour::default()
        })
    };
    let models = |mock: &Mock| {
        let mut names: Vec<String> =
            mock.requests().iter().map(|r| r["model"].as_str().unwrap().to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let mock = of(&["sql", "chat", "code"]);
    measure(folder.path(), &mock.url(), &["--total-loras", "3"]).success();
    assert_eq!(models(&mock), ["chat", "code", "sql"]);
    let mock = of(&["a-0-z", "a-1-z"]);
    measure(folder.path(), &mock.url(), &["--total-loras", "2", "--adapter-names", "a-{}-z"]).success();
    assert_eq!(models(&mock), ["a-0-z", "a-1-z"]);
    let mock = of(&["x", "y"]);
    let failed = measure(folder.path(), &mock.url(), &["--total-loras", "4"]).code(1);
    let said = stderr(&failed);
    assert!(said.contains("4 of the 4 adapters") && said.contains("x, y"), "{said}");
    let names = ["--total-loras", "4", "--adapter-names", "x,y"];
    let failed = measure(folder.path(), &mock.url(), &names).code(2);
    assert!(stderr(&failed).contains("2 names and --total-loras is 4"), "{}", stderr(&failed));
    assert!(mock.requests().is_empty());
}

#[test]
fn unknown_adapters_are_refusals_when_nobody_was_asked() {
    let (mock, folder) =
        (server(OpenAi { adapters: Vec::new(), ..OpenAi::default() }), tempfile::tempdir().unwrap());
    let failed = measure(folder.path(), &mock.url(), &["--total-loras", "4", "--skip-health-check"]).code(1);
    assert_eq!(report(&failed)["errors_by_kind"], json!({"HTTP 404": 40}));
}

#[test]
fn bodies_take_more_members_and_keys_stay_out_of_manifests() {
    let (mock, folder) = (server(OpenAi::default()), tempfile::tempdir().unwrap());
    let extra = r#"{"ignore_eos": null, "min_tokens": 3}"#;
    let more = ["--total-loras", "128", "--extra-body", extra, "--api-key", "s3cret-0123", "-o", "r.csv"];
    measure(folder.path(), &mock.url(), &more).success();
    assert!(mock.requests().iter().all(|r| r.get("ignore_eos").is_none() && r["min_tokens"] == 3));
    assert!(mock.keys().iter().all(|k| k.as_deref() == Some("Bearer s3cret-0123")));
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("s3cret"), "{}", path.display());
    }
    for (flags, said) in [
        (["--extra-body", "[1]"], "--extra-body '[1]' is not a JSON object"),
        (["--api", "generate"], "--adapter-names goes with --api=openai"),
    ] {
        let args = ["-e", &mock.url(), "--total-loras", "4", "--gpu-loras", "2"];
        let mut command = program(folder.path());
        command.arg("measure").args(args).args(flags);
        if flags[0] == "--extra-body" {
            command.args(["--api", "openai"]);
        } else {
            command.args(["--adapter-names", "x-{}"]);
        }
        let failed = command.assert().code(2);
        assert!(stderr(&failed).contains(said), "{}", stderr(&failed));
    }
}

#[test]
fn probe_speaks_it_too() {
    let (mock, folder) = (server(OpenAi::default()), tempfile::tempdir().unwrap());
    let args = ["probe", "-e", &mock.url(), "--api", "openai", "-r", "60", "-d", "0.5", "--max-tokens", "2"];
    let done = program(folder.path()).args(args).assert().success();
    assert!(
        stdout(&done).contains("100.0%") || stdout(&done).contains("Error rate: 0.00%"),
        "{}",
        stdout(&done)
    );
    assert!(!mock.requests().is_empty());
}

/// What it prints is a time; that it is a sum that holds is not.
#[test]
fn the_generator_tells_its_own_error() {
    let folder = tempfile::tempdir().unwrap();
    for api in ["openai", "generate"] {
        let args =
            ["--format", "json", "bench", "loadgen", "--api", api, "-r", "50", "-d", "1", "--delay-ms", "5"];
        let output = program(folder.path()).args(args).output().unwrap();
        // 3 is a machine that is too busy, which is no failure of the program.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
        let proof: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(proof["requests"].as_u64().unwrap() > 10, "{proof}");
        assert!(proof["server"]["min"].as_f64().unwrap() >= 0.005, "{proof}");
        assert!(proof["error"]["min"].as_f64().unwrap() > 0.0, "{proof}");
        assert!(proof["error_from_schedule"]["min"].as_f64() >= proof["error"]["min"].as_f64(), "{proof}");
    }
    let wrong = ["bench", "loadgen", "--delay-ms", "-1"];
    let failed = program(folder.path()).args(wrong).assert().code(2);
    assert!(stderr(&failed).contains("--delay-ms is -1"), "{}", stderr(&failed));
}
