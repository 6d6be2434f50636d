//! `bench`, on the CPU.

use assert_cmd::Command;
use serde_json::Value;

fn bench(dir: &tempfile::TempDir, args: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("lora-hbm").unwrap().current_dir(dir).arg("bench").args(args).assert()
}

fn json(dir: &tempfile::TempDir, name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.path().join(name)).unwrap()).unwrap()
}

const TINY: [&str; 8] = ["--model", "tiny", "--device", "cpu", "--max-r", "4", "--total-loras", "4"];

#[test]
fn engine_times_every_shape_that_fits_and_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let shape = ["--gpu-loras", "1,3", "--prompts", "16,32", "--batches", "1,2", "--contexts", "40"];
    let adapters = ["--adapters", "0,1,2", "--runs", "2", "--rest", "1", "--all-modes"];
    bench(&dir, &[&["engine"][..], &TINY, &shape, &adapters].concat()).success();
    let reports = &json(&dir, "bench.json")["engine"];
    let slots: Vec<_> = reports.as_array().unwrap().iter().map(|r| r["gpu_loras"].as_u64()).collect();
    assert_eq!(slots, [Some(1), Some(3)]);
    // With one slot there is no batch of two adapters, and none that a copy may go to beside a step.
    assert_eq!(reports[0]["decode"].as_array().unwrap().len(), 4);
    assert_eq!(reports[0]["swaps"].as_array().unwrap().len(), 0);
    let report = &reports[1];
    let of = |key: &str, part: &str| -> Vec<u64> {
        report[part].as_array().unwrap().iter().map(|r| r[key].as_u64().unwrap()).collect()
    };
    assert_eq!(of("tokens", "prefill"), [16, 16, 16, 16, 32, 32, 32, 32]);
    assert_eq!(of("prompts", "prefill"), [1, 1, 2, 2, 1, 1, 2, 2]);
    assert_eq!(of("adapters", "prefill"), [0, 1, 1, 2, 0, 1, 1, 2]);
    let rested: Vec<_> =
        report["prefill"].as_array().unwrap().iter().map(|r| r["rested"]["runs"].as_u64()).collect();
    let alone = [Some(2), Some(2), None, None];
    assert_eq!(rested, [alone, alone].concat(), "prompts that come alone");
    // One sequence has one adapter at most.
    assert_eq!(of("adapters", "decode"), [0, 1, 0, 1, 2]);
    let beside: Vec<_> = report["swaps"].as_array().unwrap().iter().map(|r| &r["beside"]).collect();
    let each =
        ["alone", "one, beside prefill", "all along a prefill", "one, beside decode", "all along a decode"];
    assert_eq!(beside, each.repeat(3), "three modes");
    assert!(report["swaps"][1]["step"][0]["median_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(json(&dir, "bench.manifest.json")["complete"], true);
}

#[test]
fn trace_runs_every_budget_and_counts_swaps() {
    let dir = tempfile::tempdir().unwrap();
    let mut trace = String::from(r#"{"schema":1,"source":"made up","seed":0,"popularity":"uniform"}"#);
    for id in 0..12 {
        trace += &format!(
            "\n{{\"id\":{id},\"arrival_s\":{},\"prompt_tokens\":20,\"output_tokens\":3,\"adapter\":{}}}",
            f64::from(id) * 0.002,
            id % 4
        );
    }
    std::fs::write(dir.path().join("made-up.jsonl"), trace + "\n").unwrap();
    bench(&dir, &[&["trace"][..], &TINY, &["--budgets", "2,4", "made-up.jsonl"]].concat()).success();
    let rows = json(&dir, "bench.json");
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!((row["trace"].as_str(), row["requests"].as_u64()), (Some("made-up"), Some(12)));
        assert!(row["ttft_p50_ms"].as_f64() > Some(0.0) && row["makespan_s"].as_f64() >= Some(0.022));
    }
    // Four adapters in two slots are swapped, in four they are there from the start.
    assert!(rows[0]["swaps"].as_u64() > Some(0));
    assert_eq!(rows[1]["swaps"].as_u64(), Some(0));
}

#[test]
fn impossible_benches_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    bench(&dir, &[&["engine"][..], &TINY, &["--gpu-loras", "9"]].concat()).code(2);
    bench(&dir, &["engine", "--model", "nonesuch"]).code(1);
    bench(&dir, &[&["engine"][..], &TINY, &["--rest=-1"]].concat()).code(2);
    bench(&dir, &[&["trace"][..], &TINY, &["absent.jsonl"]].concat()).failure();
    assert!(!dir.path().join("bench.json").exists());
}
