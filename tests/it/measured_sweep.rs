//! `sweep --mode measured` on the `tiny` model: parts, and going on.

use std::path::Path;

use lora_hbm::experiment::Experiment;
use lora_hbm::report::decision_log::{self, LogLine};
use lora_hbm::report::manifest::Manifest;
use lora_hbm::report::results::{ResultRow, Source, read_rows};

use crate::load_support::{program, stderr, stdout};
use crate::oracles::machine;

const EXPERIMENT: &str = r#"
[engine]
model = "tiny"
device = "cpu"
total_loras = 4
max_r = 4
kv_memory = "256MiB"
[workload]
arrival_rate = 50
num_requests = 3
max_tokens = 2
[axes]
gpu_loras = [1, 2, 3, 4]
"#;

fn sweep(folder: &Path, more: &[&str]) -> assert_cmd::assert::Assert {
    program(folder).args(["sweep", "e.toml", "--mode", "measured"]).args(more).assert()
}

fn rows(folder: &Path) -> Vec<ResultRow> {
    read_rows(folder.join("e.csv")).unwrap()
}

fn manifests(folder: &Path, names: &[&str]) -> Vec<Manifest> {
    names.iter().map(|name| Manifest::read(folder.join(name)).unwrap()).collect()
}

#[test]
fn parts_and_the_rest_make_the_whole_and_each_run_keeps_its_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    std::fs::write(folder.join("e.toml"), EXPERIMENT).unwrap();
    sweep(folder, &["--shard", "1/2"]).success();
    let part = rows(folder);
    assert!(!part.is_empty() && part.len() < 4, "{}", part.len());
    assert!(part.iter().all(|r| r.source == Source::Measured && r.successful == 3));

    let refused = sweep(folder, &[]).code(2);
    let said = format!("e.csv has {} measured rows already: go on with --resume", part.len());
    assert!(stderr(&refused).contains(&said), "{}", stderr(&refused));

    sweep(folder, &["--resume"]).success();
    let all = rows(folder);
    let mut budgets: Vec<u32> = all.iter().map(|r| r.gpu_loras).collect();
    budgets.sort_unstable();
    assert_eq!(budgets, [1, 2, 3, 4]);
    let names: Vec<&str> = all.iter().filter_map(|r| r.manifest.as_deref()).collect();
    assert_eq!(names[0], "e.measured.1of2.manifest.json");
    assert_eq!(names[3], "e.measured.manifest.json");
    let kept = manifests(folder, &names);
    assert!(kept.iter().all(|m| m.complete));

    let again = sweep(folder, &["--resume"]).success();
    assert!(stdout(&again).contains("nothing is left to do: 4 measured rows"), "{}", stdout(&again));
    assert_eq!(manifests(folder, &names), kept);
    assert_eq!(rows(folder).len(), 4);
}

#[test]
fn each_run_leaves_its_decisions_and_none_of_an_ended_run_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let text = EXPERIMENT.replace("[1, 2, 3, 4]", "[1, 4]") + "[output]\ndecisions = \"logs\"\n";
    std::fs::write(folder.join("e.toml"), text).unwrap();
    let experiment = Experiment::load(folder.join("e.toml")).unwrap();
    let runs = experiment.runs(None);
    let logs: Vec<_> =
        runs.iter().map(|run| folder.join("logs").join(run.key(Source::Measured).file_name())).collect();
    let part = logs[0].with_extension("jsonl.part");
    std::fs::create_dir(folder.join("logs")).unwrap();
    std::fs::write(&part, "what a run wrote that was interrupted").unwrap();

    sweep(folder, &[]).success();
    assert_eq!(std::fs::read_dir(folder.join("logs")).unwrap().count(), 2, "parts are left");
    for (log, run) in logs.iter().zip(&runs) {
        let (header, lines) = decision_log::read(log).unwrap();
        assert_eq!(
            (header.model.as_str(), header.config.gpu_loras),
            ("tiny", run.cell.engine.gpu_loras as usize)
        );
        let arrivals = lines.iter().filter(|line| matches!(line, LogLine::Arrive { .. })).count();
        assert_eq!(arrivals, 3);
    }
    let profile = serde_json::to_string(&machine(&[("step", 1e6)], 1_000, 0)).unwrap();
    std::fs::write(folder.join("p.json"), profile).unwrap();
    let held = program(folder).args(["profile", "residuals", "p.json"]).args(&logs).assert().success();
    assert!(stdout(&held).contains("a log is of tiny, the profile of theory"), "{}", stdout(&held));

    let kept = || logs.iter().map(|log| std::fs::read(log).unwrap()).collect::<Vec<_>>();
    let before = kept();
    sweep(folder, &["--resume"]).success();
    let refused = sweep(folder, &["--out", "other.csv"]).code(2);
    assert!(stderr(&refused).contains("is the decision log of a run that has ended"), "{}", stderr(&refused));
    assert_eq!(kept(), before);

    // A run that was interrupted: no row, and its log is still a part.
    let csv = std::fs::read_to_string(folder.join("e.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    std::fs::write(folder.join("e.csv"), lines[..lines.len() - 1].join("\n") + "\n").unwrap();
    std::fs::rename(&logs[1], logs[1].with_extension("jsonl.part")).unwrap();
    sweep(folder, &["--resume"]).success();
    assert_eq!(std::fs::read_dir(folder.join("logs")).unwrap().count(), 2);
    assert!(kept()[0] == before[0] && kept()[1] != before[1]);
}
