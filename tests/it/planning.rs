//! The commands that answer from a profile: `plan`, `compare`, `profile check` and `scale`, long runs.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::profile::{Kind, Profile};
use lora_hbm::report::results::read_rows;
use predicates::str::contains;
use serde_json::Value;

use crate::oracles::machine;

/// Steps of 1 ms and 20 µs a token, swaps of 2 ms.
fn set_up() -> (tempfile::TempDir, impl Fn(&[&str]) -> Command) {
    let dir = tempfile::tempdir().unwrap();
    let profile = machine(&[("step", 1e6), ("tokens:0-", 2e4)], 2_000_000, 0);
    write(&profile, &dir.path().join("p.json"));
    let folder = dir.path().to_owned();
    let program = move |args: &[&str]| {
        let mut command = Command::cargo_bin("lora-hbm").unwrap();
        command.current_dir(&folder).args(args);
        command
    };
    (dir, program)
}

fn write(profile: &Profile, path: &Path) {
    std::fs::write(path, serde_json::to_string_pretty(profile).unwrap()).unwrap();
}

fn json(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

const PLAN: [&str; 10] =
    ["plan", "--profile", "p.json", "--gpu-loras", "2,8,32", "-n", "300", "--seeds", "4", "--slo"];

#[test]
fn plan_names_the_smallest_budget_and_the_highest_rates() {
    let (_dir, program) = set_up();
    let args = [&PLAN[..], &["ttft_median<30ms", "--rate", "40", "--format", "json"]].concat();
    let plan = json(&mut program(&args));
    let holds = |b: &Value| b["verdict"] == "holds";
    let budgets = plan["budgets"].as_array().unwrap();
    assert_eq!(plan["smallest"], budgets.iter().find(|b| holds(b)).unwrap()["gpu_loras"], "{plan}");
    assert!(!holds(&budgets[0]) && budgets[0]["binds"] == "slot", "{plan}");
    let table = program(&args[..args.len() - 2]).assert().success();
    // Without contention the largest budgets are as good as one another, and none is called the best alone.
    table.stdout(contains("smallest budget that holds")).stdout(contains("; within its interval: "));
}

#[test]
fn a_plan_that_no_budget_meets_ends_with_status_three() {
    let (_dir, program) = set_up();
    let args = [&PLAN[..], &["ttft_p99<1ms", "--rate", "20"]].concat();
    program(&args).assert().code(3).stderr(contains("no budget meets ttft_p99<1ms at 20"));
    program(&[&PLAN[..], &["ttft_p99<1ms"]].concat()).assert().code(3).stderr(contains("at any rate"));
}

#[test]
fn impossible_plans_are_usage_errors() {
    let (_dir, program) = set_up();
    for (more, says) in [
        (&["ttft_p98<1s"][..], "'ttft_p98' is none of"),
        (&["ttft_p99<1s", "--rate", "0"], "arrival rate is 0"),
        (&["ttft_p99<1s", "-r", "3"], "--rate"),
        (&["ttft_p99<1s", "--seeds", "1"], "at least 2 traces"),
        (&["ttft_p99<1s", "--gpu-loras", "200"], "outside of 1 to 128"),
    ] {
        // A later flag of the same name would be refused as given twice.
        let base = if more.contains(&"--seeds") || more.contains(&"--gpu-loras") {
            &["plan", "--profile", "p.json", "--slo"][..]
        } else {
            &PLAN[..]
        };
        program(&[base, more].concat()).assert().code(2).stderr(contains(says));
    }
    program(&["plan", "--profile", "p.json"]).assert().code(2).stderr(contains("--slo"));
    program(&["plan", "--slo", "ttft_p99<1s"]).assert().code(2).stderr(contains("calibrate"));
}

#[test]
fn compare_pairs_runs_on_the_same_traces() {
    let (_dir, program) = set_up();
    let simulate = |out: &str, more: &[&str]| {
        let base = ["simulate", "--profile", "p.json", "-r", "40", "-n", "200", "--seeds", "6", "-o", out];
        program(&[&base[..], more].concat()).assert().success();
    };
    simulate("layered.csv", &["--gpu-loras", "2,32"]);
    simulate("blocking.csv", &["--gpu-loras", "2,32", "--swap-mode", "blocking"]);
    simulate("one.csv", &["--gpu-loras", "64"]);
    let found = json(&mut program(&["compare", "layered.csv", "blocking.csv", "--format", "json"]));
    let found = found.as_array().unwrap();
    assert_eq!((found.len(), found[0]["pairs"].as_u64()), (2, Some(6)), "{found:?}");
    let mean = &found[0]["differences"][1];
    assert_eq!(mean["statistic"], "ttft_mean");
    assert!(mean["difference_s"]["low"].as_f64() > Some(0.0), "steps wait for swaps: {mean}");
    program(&["compare", "layered.csv", "blocking.csv"]).assert().success().stdout(contains("A is lower"));
    program(&["compare", "layered.csv", "one.csv"]).assert().code(2).stderr(contains("one at a time"));
}

#[test]
fn a_scaled_profile_is_marked_and_a_bad_one_refused_with_the_reason() {
    let (dir, program) = set_up();
    program(&["profile", "scale", "p.json", "--bandwidth", "2", "--compute", "0.5", "-o", "q.json"])
        .assert()
        .success()
        .stdout(contains("what-if copy"));
    let scaled = Profile::load(&dir.path().join("q.json")).unwrap();
    assert_eq!((scaled.kind, scaled.step.coef_ns), (Kind::Scaled, vec![5e5, 4e4]));
    program(&["simulate", "--profile", "q.json", "--gpu-loras", "2"])
        .assert()
        .success()
        .stderr(contains("nothing of it was measured"));
    program(&["profile", "check", "p.json"]).assert().success().stdout(contains("prefill of 512"));
    // A copy's own costs were held against nothing: what the original's were is not its own.
    for (name, held_out, is_null) in
        [("h100-llama2-7b", "1162 steps held out", false), ("s.json", "no sample", true)]
    {
        if is_null {
            let scale = ["profile", "scale", "h100-llama2-7b", "--copy", "2", "-o", name];
            program(&scale).assert().success();
        }
        program(&["profile", "check", name]).assert().success().stdout(contains(held_out));
        let checked = json(&mut program(&["--format", "json", "profile", "check", name]));
        assert_eq!((checked["holdout"].is_null(), checked["residuals"].is_null()), (is_null, is_null));
    }

    let refuse = |name: &str, change: fn(&mut Profile), says: &str| {
        let mut profile = machine(&[("step", 1e6), ("tokens:0-", 2e4)], 2_000_000, 0);
        change(&mut profile);
        write(&profile.signed(), &dir.path().join(name));
        program(&["profile", "check", name]).assert().code(1).stderr(contains(says));
    };
    refuse("a.json", |p| p.step.coef_ns[0] = -1.0, "step cost of 'step' is -1");
    refuse("b.json", |p| p.schema_version = 99, "schema version 99");
    refuse("c.json", |p| p.step.features.clear(), "number of step features");
    refuse("d.json", |p| p.swap.step_slowdown = -0.1, "swap.step_slowdown is -0.1");
    refuse("e.json", |p| p.adapter.ranks.reverse(), "ranks");
    refuse("f.json", |p| p.swap.reading_s = -1e-4, "swap.reading_s is -0.0001");
    program(&["profile", "check", "h9000"]).assert().code(1).stderr(contains("'h9000'"));
    for flag in ["--compute", "--copy"] {
        program(&["profile", "scale", "p.json", flag, "0", "-o", "z.json"])
            .assert()
            .code(2)
            .stderr(contains(&flag[2..]));
    }
    program(&["profile", "scale", "p.json"]).assert().code(2).stderr(contains("--out"));
}

#[test]
fn a_calibration_s_samples_are_fitted_anew() {
    let (dir, program) = set_up();
    for ending in ["json", "samples.jsonl"] {
        let name = format!("h100-llama2-7b.{ending}");
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/calibration").join(&name);
        std::fs::copy(from, dir.path().join(name)).unwrap();
    }
    program(&["profile", "refit", "h100-llama2-7b.json", "-o", "fitted.json"])
        .assert()
        .success()
        .stdout(contains("114 steps held out"));
    let load = |name: &str| Profile::load(&dir.path().join(name)).unwrap();
    let (old, new) = (load("h100-llama2-7b.json"), load("fitted.json"));
    assert!(new.holdout.mean_abs_error < 0.7 * old.holdout.mean_abs_error, "{:?}", new.holdout);
    assert_eq!((&new.swap, &new.samples_file), (&old.swap, &old.samples_file));

    // Twice the same samples are twice as many, and the same costs.
    let twice = ["profile", "refit", "h100-llama2-7b.json", "h100-llama2-7b.json", "-o", "twice.json"];
    program(&twice).assert().success().stdout(contains("228 steps held out"));
    let twice = load("twice.json");
    assert_eq!(twice.samples_file.as_deref(), Some("twice.samples.jsonl"));
    for (once, twice) in new.step.coef_ns.iter().zip(&twice.step.coef_ns) {
        assert!((once - twice).abs() <= 1e-6 * once.max(1.0), "{once} {twice}");
    }
    write(&Profile { model: "tiny".to_owned(), ..old.clone() }.signed(), &dir.path().join("tiny.json"));
    program(&["profile", "refit", "h100-llama2-7b.json", "tiny.json", "-o", "q.json"])
        .assert()
        .code(2)
        .stderr(contains("tiny.json is of another model"));

    program(&["profile", "refit", "p.json", "-o", "q.json"])
        .assert()
        .code(2)
        .stderr(contains("names no samples"));
    std::fs::write(dir.path().join("h100-llama2-7b.samples.jsonl"), "{}\n").unwrap();
    program(&["profile", "refit", "h100-llama2-7b.json", "-o", "q.json"])
        .assert()
        .code(1)
        .stderr(contains("line 1 is no sample"));
}

#[test]
fn a_warm_up_is_left_out_of_the_results() {
    let (dir, program) = set_up();
    let base = ["simulate", "--profile", "p.json", "-r", "60", "-n", "400", "--gpu-loras", "8", "-o"];
    program(&[&base[..], &["all.csv"]].concat()).assert().success().stdout(contains("requests in"));
    program(&[&base[..], &["warm.csv", "--warm-up", "100"]].concat()).assert().success();
    let row = |name: &str| read_rows(dir.path().join(name)).unwrap().remove(0);
    let (all, warm) = (row("all.csv"), row("warm.csv"));
    assert_eq!((all.total_requests, warm.total_requests), (400, 300));
    assert_eq!(all.swap_count, warm.swap_count);
    assert!(all.ttft_median < warm.ttft_median, "the first requests find the engine empty");
    program(&[&base[..], &["x.csv", "--warm-up", "400"]].concat()).assert().code(2);
}
