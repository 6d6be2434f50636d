//! `calibrate --endpoint`: a server seen from outside, simulated, and labelled as such everywhere.

use std::path::Path;

use lora_hbm::profile::{Kind, Profile};
use lora_hbm::report::manifest::Manifest;
use lora_hbm::report::results::read_rows;
use serde_json::Value;

use crate::load_support::mock::{Behaviour, Mock};
use crate::load_support::{program, stderr, stdout};
use crate::serve_command::{self, Serve, get, start};

/// An emulated server whose steps take at least 3 ms, so that sequences of a batch meet, and whose swaps take 200: more
/// than the client's own delays.
fn emulated(folder: &Path) -> Serve {
    let costs = [("step", 3e6), ("tokens:0-", 1e4), ("decodes", 1e5)];
    let truth = serve_command::emulated(folder, &costs, 200_000_000);
    let emulate =
        ["--total-loras", "6", "--gpu-loras", "2", "--max-num-seqs", "4", "--swap-mode", "blocking"];
    start(&[&emulate[..], &["--emulate", truth.to_str().unwrap()]].concat()).0
}

/// Over nothing but what any OpenAI-compatible server has.
#[test]
fn a_server_is_calibrated_over_openais_interface() {
    let folder = tempfile::tempdir().unwrap();
    let serve = emulated(folder.path());
    let args = ["calibrate", "--endpoint", &serve.url, "--api", "openai", "--total-loras", "6"];
    let more = ["--gpu-loras", "2", "--longest", "200", "--repeats", "2", "--max-model-len", "2048"];
    program(folder.path()).args(args).args(more).args(["-o", "bb.json"]).assert().success();
    let metrics = get(&format!("{}/metrics", serve.url));
    let path = |path: &str| format!("lora_hbm:http_responses_total{{model_name=\"tiny\",path=\"{path}\"");
    assert!(metrics.contains(&path("/v1/completions")) && !metrics.contains(&path("/generate")), "{metrics}");

    let profile = Profile::load(&folder.path().join("bb.json")).unwrap();
    assert_eq!((profile.kind, profile.engine.max_model_len), (Kind::BlackBox, 2048));
    assert!(profile.swap.fixed_s > 0.0 && profile.holdout.samples >= 3, "{profile:?}");
    let samples = std::fs::read_to_string(folder.path().join("bb.samples.jsonl")).unwrap();
    for kind in ["round_trip", "resident", "not_resident", "decode"] {
        assert!(samples.contains(&format!("\"kind\":\"{kind}\"")), "{kind}");
    }
}

#[test]
fn a_server_seen_from_outside_can_be_simulated() {
    let folder = tempfile::tempdir().unwrap();
    let serve = emulated(folder.path());
    let calibrate = ["calibrate", "--endpoint", &serve.url, "--total-loras", "6", "--gpu-loras", "2"];
    let more = ["--longest", "200", "--repeats", "2", "--max-model-len", "2048", "-o", "bb.json"];
    let done = program(folder.path()).args(calibrate).args(more).assert().success();
    assert!(stdout(&done).contains("nothing but response times was seen"), "{}", stdout(&done));

    // One trace measured and simulated is one workload for `validate`.
    let trace = ["trace", "generate", "--total-loras", "6", "-r", "20", "-n", "20", "-o", "t.jsonl"];
    program(folder.path()).args(trace).assert().success();
    let of_trace = ["--total-loras", "6", "--gpu-loras", "2", "--trace", "t.jsonl", "-o"];
    let measure = ["measure", "--endpoint", &serve.url, "--api", "openai"];
    program(folder.path()).args(measure).args(of_trace).arg("tm.csv").assert().success();
    let simulate = ["simulate", "--profile", "bb.json"];
    program(folder.path()).args(simulate).args(of_trace).arg("ts.csv").assert().success();
    let validate = ["validate", "--measured", "tm.csv", "--simulated", "ts.csv"];
    let done = program(folder.path()).args(validate).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        said.contains("Simulated with a black-box profile"),
        "{said}{}",
        String::from_utf8_lossy(&done.stderr)
    );
    drop(serve);

    let profile = Profile::load(&folder.path().join("bb.json")).unwrap();
    assert_eq!((profile.kind, profile.model.as_str()), (Kind::BlackBox, "tiny"));
    // What the server says of itself goes before `serve`'s defaults.
    assert_eq!((profile.engine.max_num_seqs, profile.engine.max_model_len), (4, 2048));
    assert_eq!(profile.adapter.ranks, [8]);
    assert!(profile.holdout.samples >= 3, "{:?}", profile.holdout);
    assert!(profile.swap.fixed_s > 0.0, "{:?}", profile.swap);
    let samples = std::fs::read_to_string(folder.path().join("bb.samples.jsonl")).unwrap();
    for kind in ["round_trip", "resident", "not_resident", "decode"] {
        let of_kind = |line: &&str| serde_json::from_str::<Value>(line).unwrap()["kind"] == kind;
        assert!(samples.lines().filter(of_kind).count() >= 4, "{kind}");
    }

    let simulate =
        ["simulate", "--profile", "bb.json", "--total-loras", "6", "--gpu-loras", "2,6", "-n", "60"];
    let done = program(folder.path()).args(simulate).args(["-o", "r.csv"]).assert().success();
    assert!(stderr(&done).contains("bb.json is a black box"), "{}", stderr(&done));
    let rows = read_rows(folder.path().join("r.csv")).unwrap();
    assert!(rows.iter().all(|r| r.swap_mode.as_deref() == Some("blocking") && r.max_num_seqs == Some(4)));
    assert!(rows[0].ttft_swap_mean > rows[1].ttft_swap_mean, "{rows:?}");
    let manifest = Manifest::read(folder.path().join(rows[0].manifest.as_deref().unwrap())).unwrap();
    assert_eq!(manifest.profile_kind, Some(Kind::BlackBox));

    // The same rows as if measured: what validate and the figure say of the simulated ones.
    let csv = std::fs::read_to_string(folder.path().join("r.csv")).unwrap();
    std::fs::write(folder.path().join("m.csv"), csv.replace(",simulated,", ",measured,")).unwrap();
    let validate = ["validate", "--measured", "m.csv", "--simulated", "r.csv"];
    let done = program(folder.path()).args(validate).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.contains("Simulated with a black-box profile"), "{said}");
    program(folder.path()).args(["plot", "r.csv", "-o", "f"]).assert().success();
    let figure = std::fs::read_to_string(folder.path().join("f.svg")).unwrap();
    assert!(figure.contains("black-box profile"), "no label in the figure");
}

#[test]
fn what_cannot_be_seen_is_refused() {
    let (mock, folder) = (Mock::start(Behaviour::default()), tempfile::tempdir().unwrap());
    let run = |more: &[&str]| {
        let args = ["calibrate", "--endpoint", &mock.url(), "-o", "bb.json", "--max-model-len", "512"];
        program(folder.path()).args(args).args(more).assert()
    };
    let failed = run(&["--total-loras", "128"]).code(2);
    assert!(stderr(&failed).contains("--gpu-loras is required"), "{}", stderr(&failed));
    let all = ["--total-loras", "2", "--gpu-loras", "2", "--skip-health-check", "--model", "m"];
    let failed = run(&all).code(1);
    assert!(stderr(&failed).contains("what a swap costs cannot be seen"), "{}", stderr(&failed));
    let failed = run(&["--total-loras", "3", "--gpu-loras", "2", "--skip-health-check"]).code(2);
    assert!(stderr(&failed).contains("give --model"), "{}", stderr(&failed));
    let failed = run(&["--total-loras", "128", "--gpu-loras", "2", "--repeats", "0"]).code(2);
    assert!(stderr(&failed).contains("--repeats is 0"), "{}", stderr(&failed));
    assert!(!folder.path().join("bb.json").exists());
    let failing = Mock::start(Behaviour { cuts: true, ..Behaviour::default() });
    let args = ["calibrate", "--endpoint", &failing.url(), "--total-loras", "128", "--gpu-loras", "2"];
    let failed = program(folder.path()).args(args).assert().code(1);
    assert!(stderr(&failed).contains("(the warm-up) failed: the stream ended"), "{}", stderr(&failed));
}
