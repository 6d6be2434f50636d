//! `measure`, `probe` and `smoke-test` as users run them.

use std::path::Path;

use serde_json::Value;

use crate::load_support::mock::{Behaviour, Mock};
use crate::load_support::{program, stderr, stdout};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// `measure` of 40 quick requests against `url`, with more arguments.
fn measure(folder: &Path, url: &str, more: &[&str]) -> assert_cmd::assert::Assert {
    // The environment, so that a test can give any flag itself.
    program(folder)
        .env("LORA_HBM_TOTAL_LORAS", "128")
        .env("LORA_HBM_GPU_LORAS", "2")
        .env("LORA_HBM_NUM_REQUESTS", "40")
        .env("LORA_HBM_ARRIVAL_RATE", "400")
        .env("LORA_HBM_MAX_TOKENS", "3")
        .args(["measure", "-e", url])
        .args(more)
        .assert()
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn measure_writes_a_row_the_requests_and_a_manifest() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let more = ["-o", "r.csv", "--requests-out", "q.jsonl", "--show-swap-stats", "--popularity", "zipf:1"];
    let first = measure(folder.path(), &mock.url(), &more).success();
    let text = stdout(&first);
    for expected in [
        "RESULTS: total_loras=128, gpu_loras=2",
        "  Successful: 40",
        "TTFT (Time to First Token):",
        "  Median: 12.5 ms",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    assert!(text.contains(&format!("\"swap_count\":{}", mock.swaps())), "{text}");
    measure(folder.path(), &mock.url(), &more).success();

    let rows = lines(&folder.path().join("r.csv"));
    assert_eq!(rows.len(), 3, "{rows:?}");
    assert!(rows[0].starts_with(
        "run_timestamp,total_loras,gpu_loras,prompt_regime,arrival_rate,num_requests,ttft_median,ttft_p99,"
    ));
    let columns: Vec<&str> = rows[0].split(',').collect();
    let cell = |name: &str| {
        let place = columns.iter().position(|c| *c == name).unwrap();
        rows[2].split(',').nth(place).unwrap().to_owned()
    };
    assert_eq!(rows[2].split(',').count(), columns.len());
    for (name, value) in [
        ("total_loras", "128"),
        ("gpu_loras", "2"),
        ("prompt_regime", "short"),
        ("num_requests", "40"),
        ("successful", "40"),
        ("source", "measured"),
        ("model", "stand-in"),
        ("rank", "8"),
        ("popularity", "zipf:1"),
        ("arrivals", "poisson"),
        ("max_tokens", "3"),
        ("swap_mode", "layered"),
        ("ttft_median", "0.0125"),
        ("swap_count", &mock.swaps().to_string()),
    ] {
        assert_eq!(cell(name), value, "{name}");
    }
    assert!((cell("ttft_swap_mean").parse::<f64>().unwrap() - 0.004).abs() < 1e-9);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join(cell("manifest"))).unwrap()).unwrap();
    assert_eq!((&manifest["complete"], &manifest["seeds"][0]), (&true.into(), &42.into()));

    let requests = lines(&folder.path().join("q.jsonl"));
    assert_eq!(requests.len(), 80);
    let request: Value = serde_json::from_str(&requests[0]).unwrap();
    for key in [
        "id",
        "adapter",
        "scheduled_s",
        "sent_s",
        "first_s",
        "last_s",
        "ttft_s",
        "latency_s",
        "status",
        "parts",
    ] {
        assert!(!request[key].is_null(), "{key}: {request}");
    }
}

#[test]
fn measure_speaks_json_with_the_keys_of_vllm() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let done = measure(folder.path(), &mock.url(), &["--format", "json", "-o", "r.jsonl"]).success();
    let printed: Value = serde_json::from_str(&stdout(&done)).unwrap();
    let written: Value = serde_json::from_str(&lines(&folder.path().join("r.jsonl"))[0]).unwrap();
    assert_eq!(printed, written);
    assert_eq!(printed["type"], "measurement");
    for key in ["mean_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "mean_e2el_ms", "request_throughput"] {
        assert!(printed[key].as_f64().unwrap() > 0.0, "{key}: {printed}");
    }
    assert_eq!(printed["total_output_tokens"], 120);
    let itl = ["mean", "median", "std", "p99"].map(|of| printed[format!("{of}_itl_ms")].as_f64().unwrap());
    // Three tokens of one stream, which come as soon as they can: gaps are short, and there are some.
    assert!(itl.iter().all(|ms| *ms >= 0.0) && itl[0] > 0.0 && itl[1] <= itl[3], "{printed}");
    let e2el = printed["mean_e2el_ms"].as_f64().unwrap() - printed["mean_ttft_ms"].as_f64().unwrap();
    assert!((2.0 * itl[0] - e2el).abs() < 1e-6, "two gaps a request: {printed}");
}

#[test]
fn measure_sends_a_trace_as_it_is() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let trace = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/traces/peer-short-r8.jsonl");
    let args = ["--total-loras", "128", "--gpu-loras", "2", "--trace", trace, "-e", &mock.url()];
    let done = program(folder.path())
        .arg("measure")
        .args(args)
        .args(["-n", "9", "-r", "300", "-o", "r.csv"])
        .assert()
        .success();
    let adapters: Vec<u64> = mock.requests().iter().map(|r| r["model_id"].as_u64().unwrap()).collect();
    let mut expected = vec![73, 39, 12, 37, 73, 100, 84, 43, 100];
    let mut seen = adapters.clone();
    expected.sort_unstable();
    seen.sort_unstable();
    assert_eq!(seen, expected, "{}", stderr(&done));
    let rows = lines(&folder.path().join("r.csv"));
    assert!(rows[1].contains(",peer-short-r8,300") && rows[1].contains(",uniform,"), "{}", rows[1]);
}

#[test]
fn outputs_that_cannot_be_written_are_found_before_anything_is_sent() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    std::fs::write(folder.path().join("other.csv"), "a,b\n1,2\n").unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    for (more, said) in [
        (["-o", "other.csv"], "other.csv has another header"),
        (["-o", "file/r.csv"], "cannot write file/r.csv"),
        (["--requests-out", "file/q.jsonl"], "cannot write file/q.jsonl"),
    ] {
        let failed = measure(folder.path(), &mock.url(), &more).code(1);
        assert!(stderr(&failed).contains(said), "{}", stderr(&failed));
    }
    let probe = ["probe", "-e", &mock.url(), "-d", "1", "-o", "other.csv"];
    let failed = program(folder.path()).args(probe).assert().code(1);
    assert!(stderr(&failed).contains("other.csv has another header"), "{}", stderr(&failed));
    assert_eq!(lines(&folder.path().join("other.csv")), ["a,b", "1,2"]);
    assert!(mock.requests().is_empty());
}

#[test]
fn impossible_wishes_are_usage_errors() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let trace = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/traces/peer-short-r8.jsonl");
    for (more, said) in [
        (vec!["-r", "0"], "arrival rate is 0"),
        (vec!["-r", "-3"], "arrival rate is -3"),
        (vec!["-r", "fast"], "invalid"),
        (vec!["-n", "0"], "--num-requests is 0"),
        (vec!["-t", "-1"], "--timeout is -1"),
        (vec!["--max-tokens", "0"], "max_tokens is 0"),
        (vec!["--gpu-loras", "0"], "--gpu-loras is 0"),
        (vec!["--popularity", "pareto"], "unknown popularity 'pareto'"),
        (vec!["--arrivals", "sometimes"], "unknown arrivals 'sometimes'"),
        (vec!["--arrivals", "trace"], "--trace"),
        (vec!["--prompt-regime", "medium"], "unknown prompt regime 'medium'"),
        (vec!["--extra-body", "{}"], "--extra-body goes with --api=openai"),
        (vec!["--trace", trace, "--dataset", "d.json"], "cannot be used with"),
        (vec!["--trace", trace, "-n", "101"], "101 requests were asked for and the trace has 100"),
        (
            vec!["--trace", trace, "--total-loras", "4", "--gpu-loras", "2", "--skip-health-check"],
            "and there are 4",
        ),
        (vec!["--nonsense"], "unexpected argument"),
    ] {
        let failed = measure(folder.path(), &mock.url(), &more).code(2);
        assert!(stderr(&failed).contains(said), "{more:?}: {}", stderr(&failed));
    }
    for (budgets, said) in [
        (["8", "9"], "--gpu-loras (9) is greater than --total-loras (8)"),
        (["0", "0"], "--total-loras is 0"),
        (["4", "0"], "--gpu-loras is 0"),
    ] {
        let args = ["--total-loras", budgets[0], "--gpu-loras", budgets[1]];
        for command in ["measure", "smoke-test"] {
            let failed = program(folder.path()).arg(command).args(args).assert().code(2);
            assert!(stderr(&failed).contains(said), "{}", stderr(&failed));
        }
    }
    let missing = program(folder.path()).args(["measure", "--total-loras", "4"]).assert().code(2);
    assert!(stderr(&missing).contains("--gpu-loras is required"), "{}", stderr(&missing));
    for (args, said) in [
        (["--arrival-rates", "1,x"], "'x' is not a rate"),
        (["--arrival-rates", "1,0"], "arrival rate is 0"),
        (["-d", "-5"], "duration is -5"),
        (["--total-loras", "0"], "--total-loras is 0"),
    ] {
        let failed = program(folder.path()).arg("probe").args(args).assert().code(2);
        assert!(stderr(&failed).contains(said), "{}", stderr(&failed));
    }
    assert!(mock.requests().is_empty());
}

#[test]
fn a_server_that_is_not_there_or_not_the_one_meant_is_told() {
    let folder = folder();
    let url = format!("http://127.0.0.1:{}", Mock::start(Behaviour::default()).port);
    let failed = measure(folder.path(), &url, &[]).code(1);
    assert!(stderr(&failed).contains("no server answers at http://127.0.0.1:"), "{}", stderr(&failed));
    let failed = measure(folder.path(), &url, &["--skip-health-check"]).code(1);
    assert!(stderr(&failed).contains("went away"), "{}", stderr(&failed));

    let other = Mock::start(Behaviour { gpu_loras: 8, ..Behaviour::default() });
    let failed = measure(folder.path(), &other.url(), &[]).code(1);
    assert!(stderr(&failed).contains("gpu_loras 8 and 2 was given"), "{}", stderr(&failed));
    measure(folder.path(), &other.url(), &["--skip-health-check"]).success();
    assert_eq!(other.requests().len(), 40);
}

#[test]
fn a_server_gone_in_the_middle_of_a_run_loses_no_record() {
    let (mock, folder) = (Mock::start(Behaviour { dies_after: Some(15), ..Behaviour::default() }), folder());
    // Many more requests than it takes to see that it has gone, however late it goes.
    let more = ["-n", "400", "-r", "200", "-o", "r.csv", "--requests-out", "q.jsonl"];
    let failed = measure(folder.path(), &mock.url(), &more).code(1);
    assert!(stderr(&failed).contains("of 400 requests ended well"), "{}", stderr(&failed));
    assert_eq!(lines(&folder.path().join("q.jsonl")).len(), 400);
    let rows = lines(&folder.path().join("r.csv"));
    let columns: Vec<&str> = rows[0].split(',').collect();
    let cells: Vec<&str> = rows[1].split(',').collect();
    let cell = |name| cells[columns.iter().position(|c| *c == name).unwrap()];
    assert_eq!(cell("total_requests"), "400");
    assert!(cell("errors").parse::<u32>().unwrap() >= 385);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join(cell("manifest"))).unwrap()).unwrap();
    assert_eq!(manifest["complete"], false);
}

#[test]
fn time_outs_are_counted_and_a_run_without_successes_fails() {
    let (mock, folder) = (Mock::start(Behaviour { hangs: true, ..Behaviour::default() }), folder());
    let failed = measure(folder.path(), &mock.url(), &["-t", "0.2"]).code(1);
    assert!(stdout(&failed).contains("  Timeouts:   40"), "{}", stdout(&failed));
    assert!(stderr(&failed).contains("none of 40 requests ended well"), "{}", stderr(&failed));
}

#[test]
fn datasets_are_taken_cut_off_and_refused_malformed() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let record =
        |n: usize| format!(r#"{{"conversations":[{{"from":"human","value":"{}"}}]}}"#, "y".repeat(n));
    let whole = format!("[{},{},{}", record(300), record(10), record(500));
    std::fs::write(folder.path().join("cut.json"), &whole[..whole.len() - 7]).unwrap();
    std::fs::write(folder.path().join("bad.json"), whole.replacen("\"from\"", "from", 1)).unwrap();
    std::fs::write(folder.path().join("short.json"), format!("[{}]", record(10))).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "no JSON").unwrap();

    let done = measure(folder.path(), &mock.url(), &["--dataset", "cut.json"]).success();
    let said = stderr(&done);
    assert!(said.contains("cut off in record 3: kept 2 whole records"), "{said}");
    assert!(mock.requests().iter().all(|r| r["prompt"] == "y".repeat(300)));
    for (more, said) in [
        (vec!["--dataset", "bad.json"], "bad.json is malformed at byte 20 (record 1)"),
        (vec!["--dataset", "nowhere.json"], "nowhere.json"),
        (vec!["--dataset", "short.json"], "no prompt of short.json"),
        (vec!["--tokenizer", "tokenizer.json"], "tokenizer.json is not a tokenizer.json that can be used"),
        (vec!["--tokenizer", "hf-internal-testing/llama-tokenizer"], "run `lora-hbm fetch-data`"),
        (vec!["--tokenizer", "no/such"], "there is no tokenizer 'no/such'"),
        (vec!["--trace", "bad.json"], "none of the known trace formats"),
    ] {
        let failed = measure(folder.path(), &mock.url(), &more).code(1);
        assert!(stderr(&failed).contains(said), "{more:?}: {}", stderr(&failed));
    }
}

#[test]
fn settings_come_from_file_environment_and_flags_in_that_order() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let file = format!(
        "[measure]\nendpoint = \"{}\"\ntotal-loras = 128\ngpu_loras = 2\nnum-requests = 30\narrival-rate = 400\nmax-tokens = 2\n",
        mock.url()
    );
    std::fs::write(folder.path().join("s.toml"), file).unwrap();
    let args = ["--config", "s.toml", "measure", "--max-tokens", "1"];
    program(folder.path()).args(args).env("LORA_HBM_NUM_REQUESTS", "5").assert().success();
    let requests = mock.requests();
    assert_eq!(requests.len(), 5);
    assert!(requests.iter().all(|r| r["max_tokens"] == 1));
    std::fs::write(folder.path().join("s.toml"), "[measure]\nspeed = 3\n").unwrap();
    let failed = program(folder.path()).args(args).assert().code(2);
    assert!(stderr(&failed).contains("unknown key 'speed' in [measure]"), "{}", stderr(&failed));
}

#[test]
fn probe_compares_rates() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let run = |out: &str| {
        program(folder.path())
            .args([
                "probe",
                "-e",
                &mock.url(),
                "--arrival-rates",
                "40, 80",
                "-d",
                "0.4",
                "--pause-seconds",
                "0",
            ])
            .args(["--max-tokens", "2", "-o", out])
            .assert()
            .success()
    };
    let done = run("p.jsonl");
    let text = stdout(&done);
    assert!(text.contains("COMPARATIVE SUMMARY (short prompts)"), "{text}");
    assert!(
        text.contains(
            "    Rate | Success% |   Tokens |   TTFT Med |   TTFT P99 |    Lat Med |       Status\n"
        ),
        "{text}"
    );
    assert!(
        text.contains("    40.0 |   100.0% |")
            && text.contains("SUMMARY (arrival_rate=80 rps, regime=short)")
    );
    run("p.jsonl");
    let records: Vec<Value> = lines(&folder.path().join("p.jsonl"))
        .iter()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let types: Vec<&str> = records.iter().map(|r| r["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["metadata", "summary", "summary", "metadata", "summary", "summary"]);
    assert_eq!(records[0]["arrival_rates_tested"], serde_json::json!([40.0, 80.0]));
    assert_eq!((&records[1]["status"], &records[1]["ttft_p99"]), (&"OK".into(), &0.0125.into()));
    run("p.csv");
    run("p.csv");
    let rows = lines(&folder.path().join("p.csv"));
    assert_eq!(rows.len(), 6);
    assert!(
        rows[0].starts_with("run_timestamp,arrival_rate,prompt_regime,")
            && rows[3].starts_with("# --- New run: ")
    );
}

#[test]
fn the_smoke_test_passes_only_if_all_holds() {
    let folder = folder();
    let smoke = |mock: &Mock, total: &str, gpu: &str| {
        program(folder.path())
            .args([
                "smoke-test",
                "--port",
                &mock.port.to_string(),
                "--total-loras",
                total,
                "--gpu-loras",
                gpu,
            ])
            .args(["--wait-seconds", "0"])
            .assert()
    };
    for (total_loras, gpu_loras) in [(128, 2), (128, 128), (256, 2), (256, 256)] {
        let mock = Mock::start(Behaviour { total_loras, gpu_loras, ..Behaviour::default() });
        let (total, gpu) = (total_loras.to_string(), gpu_loras.to_string());
        let done = smoke(&mock, &total, &gpu).success();
        assert!(stdout(&done).contains("✓ All smoke tests PASSED"), "{}", stdout(&done));
        // Again, with other adapters resident by now.
        smoke(&mock, &total, &gpu).success();
    }
    let miscounting = Mock::start(Behaviour { miscounts: true, ..Behaviour::default() });
    let failed = smoke(&miscounting, "128", "2").code(1);
    assert!(stdout(&failed).contains("swap_count stayed at 0"), "{}", stdout(&failed));
    let other = Mock::start(Behaviour { total_loras: 64, ..Behaviour::default() });
    assert!(stdout(&smoke(&other, "128", "2").code(1)).contains("total_loras is 64 and should be 128"));
    let refuse = Some(axum::http::StatusCode::BAD_REQUEST);
    let refusing = Mock::start(Behaviour { refuse, ..Behaviour::default() });
    assert!(stdout(&smoke(&refusing, "128", "2").code(1)).contains("answered 400: not today"));
    let gone = {
        let mock = Mock::start(Behaviour::default());
        mock.port
    };
    let args = [
        "smoke-test",
        "--port",
        &gone.to_string(),
        "--total-loras",
        "4",
        "--gpu-loras",
        "2",
        "--wait-seconds",
        "0",
    ];
    let failed = program(folder.path()).args(args).assert().code(1);
    assert!(stdout(&failed).contains("no server answers"), "{}", stdout(&failed));
}

#[test]
fn a_key_in_the_settings_file_is_sent_and_not_written_down() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    let settings = folder.path().join("s.toml");
    std::fs::write(&settings, "[measure]\napi-key = \"from-file\"\napi = \"openai\"\n").unwrap();
    measure(folder.path(), &mock.url(), &["--config", "s.toml", "-o", "r.csv"]).success();
    let sent = mock.keys();
    assert!(sent.len() == 40 && sent.iter().all(|k| k.as_deref() == Some("Bearer from-file")), "{sent:?}");
    std::fs::remove_file(&settings).unwrap();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("from-file"), "{}", path.display());
    }
}

#[test]
fn one_rate_of_probe_may_come_from_the_environment() {
    let (mock, folder) = (Mock::start(Behaviour::default()), folder());
    program(folder.path())
        .args(["probe", "-e", &mock.url(), "-d", "0.2", "--max-tokens", "3"])
        .env("LORA_HBM_ARRIVAL_RATES", "50")
        .assert()
        .success();
}
