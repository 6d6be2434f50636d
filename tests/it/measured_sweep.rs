//! `sweep --mode measured` on the `tiny` model: parts, and going on.

use std::path::Path;

use lora_hbm::report::manifest::Manifest;
use lora_hbm::report::results::{ResultRow, Source, read_rows};

use crate::load_support::{program, stderr, stdout};

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
