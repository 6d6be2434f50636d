//! `validate` on runs whose truth is known: what is "measured" was simulated with other costs.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::profile::{Profile, Scale};
use lora_hbm::report::results::{ResultRow, Source, append_rows, read_rows};
use predicates::str::contains;
use serde_json::Value;

use crate::oracles::machine;

const EXPERIMENT: &str = r#"
[engine]
model = "theory"
[workload]
arrival_rate = 42.0
num_requests = 300
[axes]
gpu_loras = [2, 8, 64]
[replicate]
seeds = [1, 2]
[output]
requests = "requests"
"#;

/// Costs of the machine that is measured: those of the profile, times `factor`.
fn scaled(factor: f64) -> Profile {
    let speed = 1.0 / factor;
    let profile = machine(&[("step", 1e6), ("tokens:0-", 2e4)], 4_000_000, 50_000);
    profile.scaled(Scale { compute: speed, bandwidth: speed, copy: speed, host: speed }).unwrap()
}

fn program(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("lora-hbm").unwrap();
    command.current_dir(dir).args(args);
    command
}

/// Simulates with `factor` and files the outcome as measured; then simulates with the profile.
fn set_up(factor: f64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("x.toml", EXPERIMENT);
    for (name, factor) in [("truth.json", factor), ("p.json", 1.0)] {
        write(name, &serde_json::to_string(&scaled(factor)).unwrap());
    }
    let sweep = |profile: &str, out: &str| {
        let args = ["sweep", "x.toml", "--mode", "simulated", "--profile", profile, "-o", out];
        program(dir.path(), &args).assert().success();
    };
    sweep("truth.json", "m.csv");
    let rows = std::fs::read_to_string(dir.path().join("m.csv")).unwrap();
    write("m.csv", &rows.replace(",simulated,", ",measured,"));
    for file in std::fs::read_dir(dir.path().join("requests")).unwrap() {
        let path = file.unwrap().path();
        std::fs::rename(&path, path.to_str().unwrap().replace("-simulated-", "-measured-")).unwrap();
    }
    sweep("p.json", "s.csv");
    dir
}

const VALIDATE: [&str; 11] = [
    "validate",
    "--measured",
    "m.csv",
    "--simulated",
    "s.csv",
    "--requests",
    "requests",
    "--experiment",
    "x.toml",
    "--profile",
    "p.json",
];

#[test]
fn a_simulation_of_the_same_machine_has_no_errors() {
    let dir = set_up(1.0);
    let args = [&VALIDATE[..], &["--strict", "--format", "json"]].concat();
    let assert = program(dir.path(), &args).assert().success();
    let found: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
    let budgets = found[0]["budgets"].as_array().unwrap();
    assert_eq!(budgets.len(), 3);
    for budget in budgets {
        assert_eq!(budget["requests"]["p90_percent"], 0.0, "{budget}");
        assert_eq!(budget["requests"]["ks"], 0.0, "{budget}");
        assert!((budget["cost_factor"].as_f64().unwrap() - 1.0).abs() < 1e-3, "{budget}");
    }
}

#[test]
fn costs_that_are_off_are_found_by_how_much() {
    let dir = set_up(1.06);
    let out = program(dir.path(), &[&VALIDATE[..], &["--format", "json"]].concat()).output().unwrap();
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    for budget in found[0]["budgets"].as_array().unwrap() {
        let factor = budget["cost_factor"].as_f64().unwrap();
        assert!((factor / 1.06 - 1.0).abs() < 2e-3, "{budget}");
        assert!(budget["requests"]["median_percent"].as_f64() > Some(3.0), "{budget}");
    }
    let strict = [&VALIDATE[..], &["--median", "90", "--p90", "90", "--skill", "0", "--strict"]].concat();
    program(dir.path(), &strict).assert().code(3).stderr(contains("bounds do not hold: mean, median"));
}

#[cfg(feature = "plot")]
#[test]
fn the_figure_is_drawn_beside_the_table() {
    let dir = set_up(1.02);
    let args = [&VALIDATE[..], &["--plot", "figure.svg"]].concat();
    program(dir.path(), &args).assert().stdout(contains("cost factor")).stdout(contains("no Kendall's tau"));
    let svg = std::fs::read_to_string(dir.path().join("figure.svg")).unwrap();
    assert!(svg.contains("1800 requests") || svg.contains("drawn"), "two seeds of 300 at three budgets");
    assert!(dir.path().join("figure.png").metadata().unwrap().len() > 10_000);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let dir = set_up(1.0);
    let half = ["validate", "--measured", "m.csv", "--simulated", "s.csv", "--experiment", "x.toml"];
    program(dir.path(), &half).assert().code(2).stderr(contains("--profile go together"));
    std::fs::write(dir.path().join("y.toml"), EXPERIMENT.replace("42.0", "41.0")).unwrap();
    let mut other = VALIDATE;
    other[8] = "y.toml";
    program(dir.path(), &other).assert().code(2).stderr(contains("name the experiment"));
    program(dir.path(), &["validate", "--measured", "m.csv"]).assert().code(1).stderr(contains("no budget"));
}

/// A folder with an experiment, and profiles of the machine and of a slower one.
fn folder(experiment: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("x.toml"), experiment).unwrap();
    for (name, factor) in [("p.json", 1.0), ("slow.json", 1.07)] {
        std::fs::write(dir.path().join(name), serde_json::to_string(&scaled(factor)).unwrap()).unwrap();
    }
    dir
}

fn sweep(dir: &Path, profile: &str, out: &str, more: &[&str]) -> assert_cmd::assert::Assert {
    let args = ["sweep", "x.toml", "--mode", "simulated", "--profile", profile, "-o", out];
    program(dir, &[&args[..], more].concat()).assert()
}

/// Files rows of one file in another as measured.
fn file_as_measured(dir: &Path, from: &str, to: &str, keep: impl Fn(&ResultRow) -> bool) {
    let mut rows = read_rows(dir.join(from)).unwrap();
    rows.retain(keep);
    rows.iter_mut().for_each(|r| r.source = Source::Measured);
    append_rows(dir.join(to), &rows).unwrap();
}

const BOTH: [&str; 5] = ["validate", "--measured", "m.csv", "--simulated", "s.csv"];

#[test]
fn a_trace_is_compared_with_itself_alone() {
    let dir = folder(&EXPERIMENT.replace("[1, 2]", "[1, 2, 3, 4, 5]"));
    sweep(dir.path(), "p.json", "s.csv", &[]).success();
    file_as_measured(dir.path(), "s.csv", "m.csv", |r| r.seed == Some(3));
    let said = program(dir.path(), &[&BOTH[..], &["--strict"]].concat()).assert().success();
    let said = said.stdout(contains("left out: 4 seeds with simulated rows alone"));
    said.stdout(contains("the median's error is typically 0.0 %, at worst +0.0 %"));
}

#[test]
fn a_slower_machine_is_not_excused_by_the_traces_being_different() {
    let dir = folder(&EXPERIMENT.replace("[1, 2]", "[1, 2, 3, 4, 5]"));
    sweep(dir.path(), "p.json", "s.csv", &[]).success();
    sweep(dir.path(), "slow.json", "slow.csv", &[]).success();
    file_as_measured(dir.path(), "slow.csv", "m.csv", |_| true);
    let wide = ["--median", "90", "--p90", "90", "--skill", "0", "--strict"];
    let strict = program(dir.path(), &[&BOTH[..], &wide].concat()).assert().code(3);
    strict.stderr(contains("bounds do not hold: mean, median"));
    let json = program(dir.path(), &[&BOTH[..], &["--format", "json"]].concat()).output().unwrap();
    let found: Value = serde_json::from_slice(&json.stdout).unwrap();
    for budget in found[0]["budgets"].as_array().unwrap() {
        assert_eq!((&budget["traces"], &budget["median"]["spread_percent"]), (&5.into(), &Value::Null));
        assert!(budget["median"]["error_percent"].as_f64() < Some(-3.0), "{budget}");
    }
}

#[test]
fn one_file_of_both_is_asked_for_one_kind_where_another_has_the_other() {
    let dir = folder(EXPERIMENT);
    sweep(dir.path(), "p.json", "s.csv", &[]).success();
    file_as_measured(dir.path(), "s.csv", "m.csv", |_| true);
    // A prediction that lies beside the measured rows and is not asked for.
    sweep(dir.path(), "slow.json", "m.csv", &[]).success();
    program(dir.path(), &[&BOTH[..], &["--strict"]].concat()).assert().success();
}

#[test]
fn rows_of_another_profile_are_not_gone_on_from() {
    let dir = folder(EXPERIMENT);
    sweep(dir.path(), "slow.json", "s.csv", &["--shard", "1/2"]).success();
    let before = std::fs::read(dir.path().join("s.csv")).unwrap();
    let refused = sweep(dir.path(), "p.json", "s.csv", &["--resume"]).code(2);
    refused.stderr(contains("made with another profile")).stderr(contains("--out, or remove those rows"));
    assert_eq!(std::fs::read(dir.path().join("s.csv")).unwrap(), before);
    sweep(dir.path(), "slow.json", "s.csv", &["--resume"]).success();
    // Nothing is left, and yet it is not what was asked for.
    sweep(dir.path(), "p.json", "s.csv", &["--resume"]).code(2).stderr(contains("another profile"));
    sweep(dir.path(), "slow.json", "s.csv", &["--resume"]).success().stdout(contains("nothing is left"));
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let path = file.unwrap().path();
        if path.to_str().unwrap().ends_with(".manifest.json") {
            std::fs::remove_file(path).unwrap();
        }
    }
    sweep(dir.path(), "p.json", "s.csv", &["--resume"]).success().stderr(contains("no manifest beside it"));
}

#[test]
fn a_load_that_two_profiles_reckoned_is_not_one_load() {
    let dir = folder(&EXPERIMENT.replace("arrival_rate = 42.0", "rho = 0.7"));
    sweep(dir.path(), "p.json", "s.csv", &[]).success();
    sweep(dir.path(), "slow.json", "slow.csv", &[]).success();
    file_as_measured(dir.path(), "slow.csv", "m.csv", |_| true);
    program(dir.path(), &BOTH).assert().code(2).stderr(contains("reckoned from two profiles"));
    // Nor are its runs gone on with: the rest would come at other rates.
    let args = ["sweep", "x.toml", "--mode", "measured", "--profile", "p.json", "-o", "slow.csv", "--resume"];
    program(dir.path(), &args).assert().code(2).stderr(contains("another profile"));
}

const PREFETCH: &str = r#"
[engine]
model = "theory"
block_size = 32
[workload]
arrival_rate = 42.0
num_requests = 300
[axes]
gpu_loras = [2, 8]
prefetch = [0, 2]
max_num_batched_tokens = [4096, 512]
"#;

#[test]
fn settings_without_a_column_of_their_own_are_told_apart_everywhere() {
    let dir = folder(PREFETCH);
    let table = sweep(dir.path(), "p.json", "s.csv", &[]).success();
    table.stdout(contains("max_num_batched_tokens")).stdout(contains("prefetch"));
    let rows = read_rows(dir.path().join("s.csv")).unwrap();
    let mut settings: Vec<&str> = rows.iter().filter_map(|r| r.settings.as_deref()).collect();
    settings.sort_unstable();
    settings.dedup();
    let all = [
        "block_size=32",
        "block_size=32;max_num_batched_tokens=512",
        "block_size=32;max_num_batched_tokens=512;prefetch=2",
        "block_size=32;prefetch=2",
    ];
    assert_eq!(settings, all);
    file_as_measured(dir.path(), "s.csv", "m.csv", |_| true);
    let said = program(dir.path(), &[&BOTH[..], &["--strict"]].concat()).assert().success();
    let said = String::from_utf8_lossy(&said.get_output().stdout).into_owned();
    assert_eq!(said.matches(", block_size 32").count(), 4, "{said}");
}

#[cfg(feature = "plot")]
#[test]
fn what_a_file_does_not_tell_apart_is_not_averaged() {
    let dir = folder(PREFETCH);
    sweep(dir.path(), "p.json", "s.csv", &[]).success();
    program(dir.path(), &["plot", "s.csv"]).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("s.svg")).unwrap();
    for text in ["max_num_batched_tokens 512, prefetch 2", "block_size 32"] {
        assert!(svg.contains(text), "no {text:?} in {svg}");
    }
    let lines = ["plot", "s.csv", "--lines", "prefetch", "--by", "max_num_batched_tokens"];
    program(dir.path(), &lines).assert().success();
    // As a version before the column would have written it.
    let mut rows = read_rows(dir.path().join("s.csv")).unwrap();
    rows.iter_mut().for_each(|r| r.settings = None);
    append_rows(dir.path().join("old.csv"), &rows).unwrap();
    program(dir.path(), &["plot", "old.csv"]).assert().code(2).stderr(contains("that no column tells"));
    file_as_measured(dir.path(), "old.csv", "old.csv", |_| true);
    program(dir.path(), &["validate", "--measured", "old.csv"]).assert().code(2).stderr(contains("cells"));
    program(dir.path(), &["report", "old.csv"]).assert().success();
    let page = std::fs::read_to_string(dir.path().join("old.html")).unwrap();
    assert!(
        page.contains("that no column tells") && !page.contains("the median TTFT is within 10 %"),
        "{page}"
    );
}

#[cfg(feature = "plot")]
#[test]
fn errors_are_drawn_over_their_own_load_without_cells_too() {
    let dir = folder(
        &EXPERIMENT
            .replace("arrival_rate = 42.0", "")
            .replace("[axes]", "[axes]\narrival_rate = [20.0, 42.0]"),
    );
    sweep(dir.path(), "p.json", "a.csv", &[]).success();
    let mut rows = read_rows(dir.path().join("a.csv")).unwrap();
    rows.iter_mut().for_each(|r| r.cell = None);
    append_rows(dir.path().join("s.csv"), &rows).unwrap();
    file_as_measured(dir.path(), "s.csv", "m.csv", |_| true);
    program(dir.path(), &[&BOTH[..], &["--plot", "f"]].concat()).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("f.svg")).unwrap();
    let places: std::collections::BTreeSet<&str> =
        svg.split("<circle ").skip(1).filter_map(|c| c.split("cx=\"").nth(1)?.split('"').next()).collect();
    assert_eq!(places.len(), 2, "{places:?}");
}

#[test]
fn a_simulated_trace_keeps_its_seed() {
    let dir = folder(EXPERIMENT);
    let trace =
        ["trace", "generate", "--total-loras", "64", "-r", "2", "-n", "20", "--seed", "7", "-o", "t.jsonl"];
    program(dir.path(), &trace).assert().success();
    let simulate = ["simulate", "--profile", "p.json", "--total-loras", "64", "--gpu-loras", "2"];
    let of_trace = ["--trace", "t.jsonl", "-o", "s.csv"];
    program(dir.path(), &[&simulate[..], &of_trace].concat()).assert().success();
    assert_eq!(read_rows(dir.path().join("s.csv")).unwrap()[0].seed, Some(7));
}
