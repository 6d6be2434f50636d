//! `validate` on runs whose truth is known: what is "measured" was simulated with other costs.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::profile::{Profile, Scale};
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
    program(dir.path(), &args).assert().stdout(contains("cost factor")).stdout(contains("Kendall"));
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
