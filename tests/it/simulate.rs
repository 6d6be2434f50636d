//! `simulate`, and `sweep --mode simulated`: what they write, and what they refuse.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::profile::Profile;
use lora_hbm::report::results::read_rows;
use predicates::str::contains;
use serde_json::json;

/// A profile of `tiny` in `folder`: a step is 1 ms and 20 µs a token, a swap 2 ms.
fn profile(folder: &Path) {
    let profile = json!({
        "schema_version": lora_hbm::profile::SCHEMA_VERSION,
        "kind": "engine",
        "created": "2026-01-01T00:00:00Z",
        "tool": "test",
        "machine": null,
        "model": "tiny",
        "adapter": {"ranks": [8], "bytes": [2_000_000]},
        "engine": {
            "device": "cpu", "dtype": "f32", "threads": 1, "layers": 4, "block_size": 16,
            "kv_block_bytes": 16384, "weights_bytes": 1 << 24, "workspace_bytes": 1 << 24,
            "memory_bytes": null, "kv_memory_bytes": 1 << 30, "max_model_len": 4352,
            "max_num_batched_tokens": 4096, "max_num_seqs": 16,
        },
        "step": {"features": ["step", "tokens:0-"], "coef_ns": [1e6, 2e4]},
        "swap": {"fixed_s": 0.0, "bytes_per_s": 1e9, "busy_bytes_per_s": 1e9, "step_slowdown": 0.0},
        "host": {
            "loop_s": 0.0, "front_s": 0.0, "tokenize_s_per_byte": 0.0, "deliver_s": 0.0,
            "bytes_per_token": 4.0,
        },
        "residuals": {"p05": 0.0, "p25": 0.0, "p50": 0.0, "p75": 0.0, "p95": 0.0},
        "holdout": {"samples": 0, "mean_abs_error": 0.0, "max_abs_error": 0.0, "bias": 0.0},
        "samples_file": null,
        "sha256": "",
    });
    let profile: Profile = serde_json::from_value(profile).unwrap();
    let text = serde_json::to_string_pretty(&profile.signed()).unwrap();
    std::fs::write(folder.join("profile.json"), text).unwrap();
}

/// A folder with a profile, and the program in it.
fn set_up() -> (tempfile::TempDir, impl Fn(&[&str]) -> Command) {
    let dir = tempfile::tempdir().unwrap();
    profile(dir.path());
    let folder = dir.path().to_owned();
    let program = move |args: &[&str]| {
        let mut command = Command::cargo_bin("lora-hbm").unwrap();
        command.current_dir(&folder).args(args);
        command
    };
    (dir, program)
}

#[test]
fn a_row_a_budget_is_written_and_small_budgets_are_slower() {
    let (dir, program) = set_up();
    let args =
        ["simulate", "--profile", "profile.json", "--gpu-loras", "2,16,128", "-r", "20", "-o", "r.csv"];
    program(&args).assert().success();
    let rows = read_rows(dir.path().join("r.csv")).unwrap();
    assert_eq!(rows.iter().map(|r| r.gpu_loras).collect::<Vec<_>>(), [2, 16, 128]);
    assert!(rows[0].ttft_median > rows[2].ttft_median && rows[2].swap_count == Some(0));
    assert_eq!(rows[0].manifest.as_deref(), Some("r.manifest.json"));
    assert!(dir.path().join("r.manifest.json").exists());
}

#[test]
fn a_profile_of_another_model_is_refused_and_nothing_is_written() {
    let (dir, program) = set_up();
    let kept = "a,b\n1,2\n";
    std::fs::write(dir.path().join("other.csv"), kept).unwrap();
    std::fs::write(dir.path().join("opt.toml"), "[engine]\nmodel = \"facebook/opt-125m\"\ngpu_loras = 2\n")
        .unwrap();
    let simulate = ["simulate", "--profile", "profile.json", "--model", "facebook/opt-125m", "-o", "r.csv"];
    let sweep = ["sweep", "opt.toml", "--mode", "simulated", "--profile", "profile.json", "-o", "r.csv"];
    for args in [&simulate[..], &sweep] {
        program(args)
            .assert()
            .code(1)
            .stderr(contains("tiny"))
            .stderr(contains("facebook/opt-125m"))
            .stderr(contains("calibrate"));
        assert!(!dir.path().join("r.csv").exists(), "{args:?}");
    }
    program(&["simulate", "--profile", "profile.json", "-o", "other.csv"])
        .assert()
        .code(1)
        .stderr(contains("other.csv has another header"));
    assert_eq!(std::fs::read_to_string(dir.path().join("other.csv")).unwrap(), kept);
}

#[test]
fn impossible_wishes_are_usage_errors_and_bad_profiles_failures() {
    let (dir, program) = set_up();
    for (more, says) in [
        (["-r", "0"], "arrival rate is 0"),
        (["-r", "-2"], "arrival rate is -2"),
        (["--gpu-loras", "0"], "a budget of 0 lies outside of 1 to 128"),
        (["--gpu-loras", "2,129"], "a budget of 129 lies outside of 1 to 128"),
        (["--total-loras", "0"], "--total-loras is 0"),
        (["--max-r", "64"], "rank"),
    ] {
        let status = if more[0] == "--max-r" { 1 } else { 2 };
        let args = [&["simulate", "--profile", "profile.json"][..], &more].concat();
        program(&args).assert().code(status).stderr(contains(says));
    }
    program(&["simulate"]).assert().code(2).stderr(contains("calibrate"));
    let text = std::fs::read_to_string(dir.path().join("profile.json")).unwrap();
    std::fs::write(dir.path().join("edited.json"), text.replace("20000.0", "10000.0")).unwrap();
    std::fs::write(dir.path().join("cut.json"), &text[..text.len() / 2]).unwrap();
    for (name, says) in [("edited.json", "changed after"), ("cut.json", "cut.json"), ("no.json", "no.json")] {
        program(&["simulate", "--profile", name]).assert().code(1).stderr(contains(says));
    }
}
