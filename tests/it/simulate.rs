//! `simulate`, and `sweep --mode simulated`: what they write, and what they refuse.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::profile::Profile;
use lora_hbm::report::results::{ResultRow, read_rows};
use predicates::prelude::PredicateBooleanExt as _;
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

/// The profile of [`profile`] where slots and KV cache share a memory that 16 slots and a request fit into, and not 17.
fn tight(folder: &Path) {
    let mut profile = Profile::load(&folder.join("profile.json")).unwrap();
    profile.engine.kv_memory_bytes = None;
    profile.engine.memory_bytes = Some((2 << 24) + 16 * 2_000_000 + 272 * 16384);
    std::fs::write(folder.join("tight.json"), serde_json::to_string(&profile.signed()).unwrap()).unwrap();
}

/// A trace of `n` requests at 4 a second with 5 output tokens, all for one adapter but every third.
fn trace(folder: &Path, n: usize) {
    let mut text = r#"{"schema":1,"source":"made up","seed":7,"popularity":"trace"}"#.to_owned();
    for id in 0..n {
        let (at, adapter) = (id as f64 / 4.0, if id % 3 == 0 { id % 8 } else { 1 });
        text += &format!(
            "\n{{\"id\":{id},\"arrival_s\":{at},\"prompt_tokens\":300,\"output_tokens\":5,\"adapter\":{adapter}}}"
        );
    }
    std::fs::write(folder.join("t.jsonl"), text + "\n").unwrap();
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
    let manifest = lora_hbm::report::manifest::Manifest::read(dir.path().join("r.manifest.json")).unwrap();
    let dataset = manifest.dataset.unwrap();
    assert!(dataset.name.starts_with("ShareGPT lengths") && dataset.sha256.len() == 64, "{dataset:?}");
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
    // Nothing is computed anywhere.
    for flag in ["--device", "--threads"] {
        for command in ["simulate", "plan"] {
            let unexpected = program(&[command, "--profile", "profile.json", flag, "1"]).assert();
            unexpected.code(2).stderr(contains(format!("unexpected argument '{flag}'")));
        }
    }
    program(&["simulate"]).assert().code(2).stderr(contains("calibrate"));
    let text = std::fs::read_to_string(dir.path().join("profile.json")).unwrap();
    std::fs::write(dir.path().join("edited.json"), text.replace("20000.0", "10000.0")).unwrap();
    std::fs::write(dir.path().join("cut.json"), &text[..text.len() / 2]).unwrap();
    for (name, says) in [("edited.json", "changed after"), ("cut.json", "cut.json"), ("no.json", "no.json")] {
        program(&["simulate", "--profile", name]).assert().code(1).stderr(contains(says));
    }
}

#[test]
fn what_looks_like_a_number_is_a_list_or_a_text_wherever_it_comes_from() {
    let (dir, program) = set_up();
    std::fs::write(dir.path().join("s.toml"), "[simulate]\ngpu-loras = [2, 8]\nkv-memory = 0.5\nranks = 8\n")
        .unwrap();
    let budgets = |command: &mut Command| {
        let output = command.assert().success().get_output().stdout.clone();
        let row = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        String::from_utf8(output).unwrap().lines().map(|l| row(l)["gpu_loras"].as_u64().unwrap()).collect()
    };
    let simulate = ["simulate", "--profile", "profile.json", "-n", "20"];
    let by_file = [&["--format", "json", "--config", "s.toml"][..], &simulate].concat();
    let of_file: Vec<u64> = budgets(&mut program(&by_file));
    assert_eq!(of_file, [2, 8]);
    let environment = [
        ("LORA_HBM_GPU_LORAS", "8"),
        ("LORA_HBM_RANKS", "8"),
        ("LORA_HBM_KV_MEMORY", "1"),
        ("LORA_HBM_FORMAT", "json"),
    ];
    let of_environment: Vec<u64> = budgets(program(&simulate).envs(environment));
    assert_eq!(of_environment, [8]);
    let mut plan = program(&["plan", "--profile", "profile.json", "--slo", "ttft_p99<9s", "-n", "20"]);
    plan.envs(environment).args(["--seeds", "2"]).assert().success().stdout(contains("\"gpu_loras\":8"));
    let mut trace = program(&["trace", "generate", "-n", "3", "-o", "t.jsonl"]);
    trace.env("LORA_HBM_RANKS", "8").assert().success();
    program(&simulate).env("LORA_HBM_FORMAT", "xml").assert().code(2).stderr(contains("table, json"));
}

#[test]
fn a_setting_that_cannot_be_is_named_as_it_was_given() {
    let (dir, program) = set_up();
    std::fs::write(dir.path().join("good.toml"), "[simulate]\nwarm-up = 0\n").unwrap();
    std::fs::write(dir.path().join("bad.toml"), "[simulate]\nwarm-up = \"many\"\n").unwrap();
    let simulate = ["simulate", "--profile", "profile.json", "--config", "good.toml"];
    let of_environment = program(&simulate).env("LORA_HBM_SEEDS", "abc").assert().code(2);
    let said = String::from_utf8(of_environment.get_output().stderr.clone()).unwrap();
    assert!(said.contains("LORA_HBM_SEEDS: invalid type: found string \"abc\", expected u64"), "{said}");
    assert!(!said.contains("figment") && !said.contains(".rs") && !said.contains(".toml"), "{said}");
    // A value that its own type refuses.
    let mut never = program(&simulate);
    never.env("LORA_HBM_ARRIVALS", "never").assert().code(2).stderr(contains("LORA_HBM_ARRIVALS: "));
    program(&[&simulate[..4], &["bad.toml"]].concat())
        .assert()
        .code(2)
        .stderr(contains("\"many\"").and(contains("warm_up")).and(contains("bad.toml")));
    program(&[&simulate[..], &["--seeds", "abc"]].concat())
        .assert()
        .code(2)
        .stderr(contains("'--seeds <N>'"));
}

#[test]
fn a_size_without_a_unit_is_in_gib_in_every_command() {
    let (dir, program) = set_up();
    let simulate = ["simulate", "--profile", "profile.json", "-n", "20", "--gpu-loras", "2", "--kv-memory"];
    program(&[&simulate[..], &["1"]].concat()).assert().success();
    program(&[&simulate[..], &["1GB"]].concat()).assert().success();
    // One byte holds no sequence.
    program(&[&simulate[..], &["1B"]].concat()).assert().code(1);
    program(&[&simulate[..], &["lots"]].concat()).assert().code(2).stderr(contains("'lots' is no amount"));
    std::fs::write(
        dir.path().join("e.toml"),
        "[engine]\nmodel = \"tiny\"\ngpu_loras = 2\nkv_memory = 1\n[workload]\nnum_requests = 20\n",
    )
    .unwrap();
    program(&["sweep", "e.toml", "--mode", "simulated", "--profile", "profile.json"]).assert().success();
}

#[test]
fn the_references_policy_is_an_alias_in_every_command() {
    let (dir, program) = set_up();
    let args = ["simulate", "--profile", "profile.json", "-n", "20", "--gpu-loras", "2", "-o", "r.csv"];
    program(&[&args[..], &["--policy", "credit"]].concat())
        .assert()
        .success()
        .stderr(contains("'credit' is the reference's: taken as 'skip'"));
    let rows = read_rows(dir.path().join("r.csv")).unwrap();
    assert_eq!(rows[0].policy.as_deref(), Some("skip"));
}

#[test]
fn rows_that_are_there_keep_the_manifest_that_they_name() {
    let (dir, program) = set_up();
    let args = ["simulate", "--profile", "profile.json", "-n", "20", "-o", "r.csv", "--gpu-loras"];
    for budget in ["2", "4", "8"] {
        program(&[&args[..], &[budget]].concat()).assert().success();
    }
    let mut names = Vec::new();
    for row in read_rows(dir.path().join("r.csv")).unwrap() {
        let name = row.manifest.unwrap();
        let manifest = lora_hbm::report::manifest::Manifest::read(dir.path().join(&name)).unwrap();
        assert_eq!(manifest.config[0]["gpu_loras"], row.gpu_loras.to_string(), "{name}");
        names.push(name);
    }
    assert_eq!(names[0], "r.manifest.json");
    assert!(names[1] != names[0] && names[2] != names[1], "{names:?}");
}

#[test]
fn a_sweep_with_nothing_left_writes_no_manifest_and_one_that_goes_on_its_own() {
    let (dir, program) = set_up();
    let experiment = |seeds: &str| {
        let text = format!(
            "[engine]\nmodel = \"tiny\"\n[workload]\nnum_requests = 20\n[axes]\ngpu_loras = [2, 4, 8, 16]\n[replicate]\n\
             seeds = {seeds}\nrepeats = 2\n"
        );
        std::fs::write(dir.path().join("e.toml"), text).unwrap();
    };
    let sweep = ["sweep", "e.toml", "--mode", "simulated", "--profile", "profile.json", "--resume"];
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    experiment("[1]");
    program(&sweep).assert().success();
    let first = read("e.simulated.manifest.json");
    assert!(first.contains("ShareGPT lengths"), "{first}");
    program(&sweep).assert().success().stdout(contains("nothing is left to do: 4 simulated rows"));
    experiment("[1, 2]");
    program(&sweep).assert().success();
    assert_eq!(read("e.simulated.manifest.json"), first);
    for part in ["1/2", "2/2"] {
        program(&[&sweep[..], &["--shard", part, "-o", "s.csv"]].concat()).assert().success();
    }
    let names = |csv: &str| {
        let rows = read_rows(dir.path().join(csv)).unwrap();
        rows.into_iter().map(|r| r.manifest.unwrap()).collect::<std::collections::BTreeSet<_>>()
    };
    let (resumed, shards) = (names("e.csv"), names("s.csv"));
    assert_eq!(resumed.len(), 2, "{resumed:?}");
    assert!(
        shards.iter().eq(["s.simulated.1of2.manifest.json", "s.simulated.2of2.manifest.json"]),
        "{shards:?}"
    );
    assert!(resumed.iter().chain(&shards).all(|name| dir.path().join(name).exists()));
}

#[test]
fn a_budget_that_does_not_fit_is_an_answer_beside_those_that_do() {
    let (dir, program) = set_up();
    tight(dir.path());
    let simulate = ["simulate", "--profile", "tight.json", "-n", "40", "--gpu-loras"];
    let mixed = [&simulate[..], &["2,17,16", "-o", "r.csv"]].concat();
    program(&mixed)
        .assert()
        .success()
        .stdout(contains("does not fit").count(1))
        .stderr(contains("17 slots leave no room for one request"));
    let budgets = |csv: &str| {
        let rows = read_rows(dir.path().join(csv)).unwrap();
        rows.iter().map(|r| r.gpu_loras).collect::<Vec<_>>()
    };
    assert_eq!(budgets("r.csv"), [2, 16]);
    let output = program(&[&simulate[..], &["17,2", "--format", "json"]].concat()).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((&lines[0]["gpu_loras"], &lines[1]["gpu_loras"]), (&json!(2), &json!(17)));
    assert!(lines[1]["does_not_fit"].as_str().unwrap().contains("lower --gpu-loras"), "{lines:?}");
    // Nothing else was asked for, or nothing else fits either. The file is not even begun.
    for budgets in ["17", "64,17"] {
        program(&[&simulate[..], &[budgets, "-o", "none.csv"]].concat())
            .assert()
            .code(1)
            .stderr(contains("17 slots leave no room for one request"));
    }
    assert!(!dir.path().join("none.csv").exists());
    // Not the slots' fault: no budget would fit.
    for (flag, value, says) in [
        ("--kv-memory", "1KiB", "raise --kv-memory"),
        ("--kv-memory", "900GiB", "lower --kv-memory"),
        ("--max-model-len", "1000000", "lower --max-model-len"),
    ] {
        program(&[&simulate[..], &["2,4", flag, value]].concat()).assert().code(1).stderr(contains(says));
    }

    let plan = ["plan", "--profile", "tight.json", "--slo", "ttft_p99<9s", "-n", "40", "--seeds", "2"];
    let asked = |budgets: &'static str| [&plan[..], &["--rate", "3", "--gpu-loras", budgets]].concat();
    program(&asked("2,17")).assert().success().stdout(contains("does not fit")).stderr(contains("17 slots"));
    program(&[&asked("2,17")[..], &["--format", "json"]].concat()).assert().success().stdout(contains(
        r#"{"gpu_loras":17,"saturation_rate":null,"highest_rate":null,"verdict":"does not fit""#,
    ));
    program(&asked("17")).assert().code(1).stderr(contains("17 slots leave no room"));
}

#[test]
fn a_sweep_keeps_what_it_has_finished_when_a_cell_does_not_fit() {
    let (dir, program) = set_up();
    tight(dir.path());
    let text = "[engine]\nmodel = \"tiny\"\n[workload]\nnum_requests = 20\n[axes]\ngpu_loras = [2, 17, 16]\n";
    std::fs::write(dir.path().join("e.toml"), text).unwrap();
    let sweep = ["sweep", "e.toml", "--mode", "simulated", "--profile", "tight.json", "--resume"];
    for _ in 0..2 {
        program(&sweep)
            .assert()
            .code(1)
            .stderr(contains("(gpu_loras 17 of 128, rank 8), seed 42: 17 slots leave no room"));
        let rows = read_rows(dir.path().join("e.csv")).unwrap();
        assert_eq!(rows.iter().map(|r| r.gpu_loras).collect::<Vec<_>>(), [2, 16]);
    }
    let text = "[engine]\nmodel = \"tiny\"\ngpu_loras = 2\n[workload]\nrho = 0.5\n";
    std::fs::write(dir.path().join("rho.toml"), text).unwrap();
    program(&["sweep", "rho.toml", "--mode", "simulated", "--profile", "tight.json"])
        .assert()
        .code(1)
        .stderr(contains("a share of what total_loras slots sustain, and 128 slots leave no room"));
    assert!(!dir.path().join("rho.csv").exists());
}

#[test]
fn the_same_share_of_what_is_sustained_is_the_same_rate_for_any_number_of_requests() {
    let (dir, program) = set_up();
    trace(dir.path(), 50);
    for (name, source) in [("pool", ""), ("trace", "trace = \"t.jsonl\"\n")] {
        let rate = |n: u64| {
            let text = format!(
                "[engine]\nmodel = \"tiny\"\ngpu_loras = 16\n[workload]\nrho = 0.8\nnum_requests = {n}\nmax_tokens = 64\n{source}"
            );
            std::fs::write(dir.path().join("e.toml"), text).unwrap();
            let csv = format!("{name}{n}.csv");
            let sweep = ["sweep", "e.toml", "--mode", "simulated", "--profile", "profile.json", "-o", &csv];
            program(&sweep).assert().success();
            read_rows(dir.path().join(csv)).unwrap()[0].arrival_rate.unwrap()
        };
        let rates = [10, 20, 50, 200, 1000].map(rate);
        assert_eq!(rates, [rates[0]; 5], "{name}");
    }
    // Nor is a run saturated for being short.
    let saturated = |more: &[&str]| {
        let args = [&["simulate", "--profile", "profile.json", "--gpu-loras", "8", "--format", "json"], more];
        let output = program(&args.concat()).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["saturated"].clone()
    };
    let flips = |more: &[&str]| {
        let at = |rate: u32, n: &str| saturated(&[more, &["-r", &rate.to_string(), "-n", n]].concat());
        (10..90).step_by(5).filter(|&rate| at(rate, "10") != at(rate, "50")).collect::<Vec<u32>>()
    };
    assert!(flips(&[]).is_empty() && flips(&["--trace", "t.jsonl"]).is_empty());
}

#[test]
fn an_experiment_with_a_trace_replays_it() {
    let (dir, program) = set_up();
    trace(dir.path(), 50);
    let sweep = |more: &str, out: &str| {
        let text = format!(
            "[engine]\nmodel = \"tiny\"\ngpu_loras = 2\n[workload]\ntrace = \"t.jsonl\"\narrivals = \"trace\"\n{more}\n"
        );
        std::fs::write(dir.path().join("e.toml"), text).unwrap();
        program(&["sweep", "e.toml", "--mode", "simulated", "--profile", "profile.json", "-o", out])
    };
    let row = |csv: &str| read_rows(dir.path().join(csv)).unwrap().remove(0);
    sweep("", "kept.csv").assert().success();
    let simulate = ["simulate", "--profile", "profile.json", "--gpu-loras", "2", "--trace", "t.jsonl"];
    program(&[&simulate[..], &["-o", "simulate.csv"]].concat()).assert().success();
    let (kept, simulated) = (row("kept.csv"), row("simulate.csv"));
    assert!((kept.ttft_mean.unwrap() - simulated.ttft_mean.unwrap()).abs() < 1e-9);
    assert_eq!((kept.swap_count, kept.total_requests), (simulated.swap_count, 50));
    let columns = |r: &ResultRow| {
        (r.prompt_regime.clone(), r.popularity.clone(), r.max_tokens, r.num_requests, r.arrival_rate)
    };
    assert_eq!(columns(&kept), ("t".to_owned(), Some("trace".to_owned()), Some(5), Some(50), None));
    assert_eq!(columns(&kept), columns(&simulated));

    sweep("num_requests = 20\nmax_tokens = 9\npopularity = \"zipf:1\"", "set.csv").assert().success();
    let set = row("set.csv");
    assert_eq!(columns(&set), ("t".to_owned(), Some("zipf:1".to_owned()), Some(9), Some(20), None));

    sweep("num_requests = 200", "x.csv")
        .assert()
        .code(1)
        .stderr(contains("num_requests is 200 and the trace t.jsonl has 50 requests"));
    sweep("warm_up = 50", "x.csv")
        .assert()
        .code(1)
        .stderr(contains("none of the 50 requests of the trace t.jsonl"));
    sweep("[replicate]\nseeds = [1, 2]", "x.csv")
        .assert()
        .code(1)
        .stderr(contains("every seed would be the same run"));
    sweep("popularity = \"uniform\"\n[replicate]\nseeds = [1, 2]", "two.csv").assert().success();
}

#[test]
fn several_seeds_need_something_that_is_drawn() {
    let (dir, program) = set_up();
    trace(dir.path(), 20);
    let simulate =
        ["simulate", "--profile", "profile.json", "--gpu-loras", "2", "--trace", "t.jsonl", "--seeds"];
    for same in [&["2"][..], &["2", "-r", "9"], &["2", "--arrivals", "trace"]] {
        program(&[&simulate[..], same].concat())
            .assert()
            .code(2)
            .stderr(contains("--seeds is 2").and(contains("--arrivals or --popularity")));
    }
    for drawn in [&["2", "--arrivals", "poisson"][..], &["2", "--popularity", "uniform"], &["1"]] {
        program(&[&simulate[..], drawn].concat()).assert().success();
    }
    // Adapters are drawn for a trace that has none.
    let text = std::fs::read_to_string(dir.path().join("t.jsonl")).unwrap();
    let none = text.replace("\"popularity\":\"trace\"", "\"popularity\":\"none\"");
    std::fs::write(dir.path().join("t.jsonl"), none).unwrap();
    program(&[&simulate[..], &["2"]].concat()).assert().success();
}

#[test]
fn a_rate_is_written_wherever_arrivals_are_not_the_trace_s() {
    let (dir, program) = set_up();
    trace(dir.path(), 20);
    for (more, rate) in [
        (&["--arrivals", "poisson"][..], Some(2.0)),
        (&["--arrivals", "poisson", "-r", "3"], Some(3.0)),
        (&["-r", "3"], Some(3.0)),
        (&[], None),
    ] {
        let args = ["simulate", "--profile", "profile.json", "--gpu-loras", "2", "--trace", "t.jsonl"];
        let output = program(&[&args[..], &["--format", "json"], more].concat()).output().unwrap();
        let row: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(row["arrival_rate"].as_f64(), rate, "{more:?}");
        // As `measure` writes them: the trace's seed where nothing is drawn.
        assert_eq!(row["seed"], if more.contains(&"poisson") { 42 } else { 7 });
    }
}

#[test]
fn a_failed_simulation_leaves_no_results_file() {
    let (dir, program) = set_up();
    let simulate = ["simulate", "--profile", "profile.json", "-o", "r.csv"];
    for more in [&["--trace", "no.jsonl"][..], &["--dataset", "no.json"], &["--kv-memory", "1KiB"]] {
        let failed = program(&[&simulate[..], more].concat()).output().unwrap();
        assert!(!failed.status.success() && !dir.path().join("r.csv").exists(), "{more:?}");
    }
    // An empty file is begun like a missing one.
    std::fs::write(dir.path().join("r.csv"), "").unwrap();
    program(&[&simulate[..], &["--gpu-loras", "2", "-n", "20"]].concat()).assert().success();
    assert_eq!(read_rows(dir.path().join("r.csv")).unwrap().len(), 1);
}

#[test]
fn what_no_engine_can_have_is_refused_in_every_command() {
    let (_dir, program) = set_up();
    let simulate = ["simulate", "--profile", "profile.json", "-n", "20"];
    let plan = ["plan", "--profile", "profile.json", "--slo", "ttft_p99<9s", "-n", "20", "--seeds", "2"];
    for (flag, says) in [
        ("--block-size=0", "--block-size must be at least 1"),
        ("--max-num-seqs=0", "--max-num-seqs must be at least 1"),
        ("--max-num-batched-tokens=0", "--max-num-batched-tokens must be at least 1"),
        ("--max-model-len=0", "--max-model-len must be at least 1"),
        ("--max-r=0", "--max-r must be at least 1"),
        ("--ranks=8,0", "--ranks must be at least 1"),
        ("--max-skip-age=-1", "--max-skip-age must be zero or more seconds, not -1"),
        ("--max-skip-age=nan", "--max-skip-age must be zero or more seconds, not NaN"),
        ("--total-loras=3000000000", "--total-loras is 3000000000: more than 1000000 adapters"),
    ] {
        for command in [&simulate[..], &plan] {
            program(&[command, &[flag]].concat()).assert().code(2).stderr(contains(says));
        }
    }
}

#[test]
fn arrivals_beyond_any_clock_are_refused_by_their_rate() {
    let (_dir, program) = set_up();
    for rate in ["1e-9", "1e-300"] {
        program(&["simulate", "--profile", "profile.json", "--gpu-loras", "2", "-n", "100", "-r", rate])
            .assert()
            .code(2)
            .stderr(contains(format!("at {rate} requests a second")));
    }
}

#[test]
fn more_sequences_than_were_calibrated_are_told_of() {
    let (_dir, program) = set_up();
    let simulate =
        ["simulate", "--profile", "profile.json", "--gpu-loras", "8", "-n", "20", "--max-num-seqs"];
    let plan = [
        "plan",
        "--profile",
        "profile.json",
        "--gpu-loras",
        "8",
        "--slo",
        "ttft_p99<9s",
        "-n",
        "20",
        "--seeds",
    ];
    for command in [&simulate[..], &[&plan[..], &["2", "--max-num-seqs"]].concat()] {
        program(&[command, &["512"]].concat())
            .assert()
            .stderr(contains("max_num_seqs is 512 and the profile was calibrated with up to 16 sequences"));
        program(&[command, &["16"]].concat()).assert().stderr(contains("calibrated with").not());
    }
}

#[cfg(feature = "plot")]
#[test]
fn a_sweep_draws_the_figure_that_its_file_names() {
    let (dir, program) = set_up();
    let text = "[engine]\nmodel = \"tiny\"\n[workload]\nnum_requests = 20\n[axes]\ngpu_loras = [2, 4]\n[output]\nplot = \"f/x\"\n";
    std::fs::write(dir.path().join("e.toml"), text).unwrap();
    let sweep = ["sweep", "e.toml", "--mode", "simulated", "--profile", "profile.json"];
    program(&sweep).assert().success().stdout(contains("x.svg"));
    assert!(dir.path().join("f/x.svg").exists() && dir.path().join("f/x.png").exists());
}

#[test]
fn an_engine_without_chunks_needs_room_for_the_longest_prompt_in_a_step() {
    let (dir, program) = set_up();
    let args =
        ["simulate", "--profile", "profile.json", "-n", "40", "--gpu-loras", "8", "--prompt-regime", "long"];
    let unchunked = [&args[..], &["--no-enable-chunked-prefill"]].concat();
    program(&unchunked).assert().code(1).stderr(contains("max_num_batched_tokens"));
    for (more, out) in [(&args[..], "chunked.csv"), (&unchunked, "unchunked.csv")] {
        let tokens = ["-r", "20", "--max-num-batched-tokens", "4352", "-o", out];
        program(&[more, &tokens].concat()).assert().success();
    }
    let median = |name: &str| read_rows(dir.path().join(name)).unwrap()[0].ttft_median.unwrap();
    assert_ne!(median("chunked.csv"), median("unchunked.csv"));
}

#[test]
fn bench_sim_times_three_loads() {
    let (_dir, program) = set_up();
    let args = ["bench", "sim", "--profile", "profile.json", "--requests", "300"];
    program(&args).assert().success().stdout(contains("requests a second"));
    let output = program(&[&args[..], &["--format", "json"]].concat()).output().unwrap();
    let speeds: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let loads: Vec<f64> = speeds.iter().map(|s| s["rho"].as_f64().unwrap()).collect();
    assert_eq!(loads, [0.2, 0.8, 1.1]);
    assert!(speeds.iter().all(|s| s["requests"] == 300 && s["requests_per_second"].as_f64() > Some(0.0)));
    program(&["bench", "sim"]).assert().code(2).stderr(contains("bench sim needs --profile"));
}

#[test]
fn completions_name_the_subcommands() {
    let (_dir, program) = set_up();
    let printed = program(&["completions", "bash"]).assert().success();
    printed.stdout(contains("simulate")).stdout(contains("sweep")).stdout(contains("completions"));
}
