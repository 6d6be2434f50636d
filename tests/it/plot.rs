//! `plot` and `merge`, driven as users drive them.

use std::path::Path;

use assert_cmd::Command;
use lora_hbm::report::manifest::Manifest;
use lora_hbm::report::results::{ResultRow, RunContext, Source, append_rows, read_rows};
use predicates::prelude::PredicateBooleanExt as _;
use predicates::str::contains;

const BUDGETS: [u32; 7] = [2, 4, 8, 16, 32, 64, 128];

fn row(source: Source, gpu_loras: u32, policy: &str, repeat: u32, ttft: f64) -> ResultRow {
    let context = RunContext {
        run_timestamp: Some("2026-01-15 10:30:00".to_owned()),
        model: Some("tiny".to_owned()),
        policy: Some(policy.to_owned()),
        seed: Some(42),
        repeat: Some(repeat),
        swap_count: Some(u64::from(128 - gpu_loras)),
        cell: Some(format!("{gpu_loras:015x}{}", policy.len())),
        ..RunContext::new(source, 128, gpu_loras, "short")
    };
    let mut row = ResultRow::from_records(&[], &context);
    (row.ttft_median, row.ttft_p99) = (Some(ttft), Some(5.0 * ttft));
    row
}

/// Three measured repeats and a simulated run of each budget.
fn curve(policy: &str) -> Vec<ResultRow> {
    let mut rows = Vec::new();
    for budget in BUDGETS {
        let ttft = 0.02 + 1.0 / f64::from(budget);
        rows.extend(
            (0..3).map(|i| row(Source::Measured, budget, policy, i, ttft * (1.0 + 0.1 * f64::from(i)))),
        );
        rows.push(row(Source::Simulated, budget, policy, 0, ttft));
    }
    rows
}

fn lora_hbm(folder: &Path) -> Command {
    let mut command = Command::cargo_bin("lora-hbm").unwrap();
    command.current_dir(folder);
    command
}

/// Width and height in a PNG's header.
fn png_size(bytes: &[u8]) -> (u32, u32) {
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    (word(16), word(20))
}

fn attribute(svg: &str, name: &str) -> u32 {
    let start = svg.find(&format!(" {name}=\"")).unwrap() + name.len() + 3;
    svg[start..].split('"').next().unwrap().parse().unwrap()
}

#[test]
fn draws_every_budget_and_series_into_both_files() {
    let dir = tempfile::tempdir().unwrap();
    append_rows(dir.path().join("results.csv"), &curve("skip")).unwrap();
    lora_hbm(dir.path()).args(["plot", "results.csv", "--title", "A & B"]).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("results.svg")).unwrap();
    let texts: Vec<&str> = svg.lines().map(str::trim).filter(|l| !l.starts_with('<')).collect();
    for budget in BUDGETS {
        assert!(texts.contains(&budget.to_string().as_str()), "no tick {budget}");
    }
    for text in [
        "median, measured",
        "median, simulated",
        "p99, measured",
        "p99, simulated",
        "bars: 95 % interval of the mean of 3 runs",
        "swaps in a run",
        "tiny · 128 adapters · short prompts · policy skip",
        "results.csv · 2026-01-15",
    ] {
        assert!(texts.contains(&text), "no {text:?} in {texts:?}");
    }
    assert!(svg.contains("<title>A &amp; B</title>") && svg.contains("Inter, Helvetica"));
    let png = std::fs::read(dir.path().join("results.png")).unwrap();
    assert_eq!(png_size(&png), (2 * attribute(&svg, "width"), 2 * attribute(&svg, "height")));
}

#[test]
fn the_same_rows_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    append_rows(dir.path().join("results.csv"), &curve("skip")).unwrap();
    let draw = |out: &str| {
        lora_hbm(dir.path()).args(["plot", "results.csv", "-o", out]).assert().success();
        ["svg", "png"].map(|e| std::fs::read(dir.path().join(out).with_extension(e)).unwrap())
    };
    assert_eq!(draw("a.svg"), draw("b.png"));
}

#[test]
fn the_foot_names_machine_and_program_of_the_manifests_that_rows_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = curve("skip");
    rows.iter_mut().for_each(|r| r.manifest = Some("results.measured.manifest.json".to_owned()));
    append_rows(dir.path().join("results.csv"), &rows).unwrap();
    let draw = || {
        lora_hbm(dir.path()).args(["plot", "results.csv"]).assert().success();
        std::fs::read_to_string(dir.path().join("results.svg")).unwrap()
    };
    assert!(!draw().contains("lora-hbm 0."), "there is no manifest yet");
    let manifest = Manifest::begin("sweep", &serde_json::json!({}), &[]).unwrap();
    manifest.write(dir.path().join("results.measured.manifest.json")).unwrap();
    let svg = draw();
    assert!(svg.contains(&manifest.tool.describe()) && svg.contains("incomplete run"), "{svg}");

    // Stopped, and resumed to its end: the last rows name the run that ended.
    let mut resumed = Manifest::begin("sweep", &serde_json::json!({}), &[]).unwrap();
    resumed.end(true);
    resumed.write(dir.path().join("resumed.manifest.json")).unwrap();
    rows.iter_mut()
        .for_each(|r| (r.manifest, r.repeat) = (Some("resumed.manifest.json".to_owned()), Some(1)));
    append_rows(dir.path().join("results.csv"), &rows).unwrap();
    assert!(!draw().contains("incomplete run"));
}

#[test]
fn settings_that_vary_make_panels_and_too_many_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.csv");
    append_rows(&path, &[curve("skip"), curve("fcfs")].concat()).unwrap();
    lora_hbm(dir.path()).args(["plot", "results.csv"]).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("results.svg")).unwrap();
    assert!(svg.contains("\npolicy skip\n") && svg.contains("\npolicy fcfs\n"), "{svg}");

    lora_hbm(dir.path())
        .args(["plot", "results.csv", "--by", "model"])
        .assert()
        .code(2)
        .stderr(contains("differ in policy (fcfs, skip)"));
    lora_hbm(dir.path())
        .args(["plot", "results.csv", "--by", "mood"])
        .assert()
        .code(2)
        .stderr(contains("'mood'"));

    let mut many = curve("skip");
    (0..7).for_each(|i| many.push(row(Source::Measured, 2, &format!("p{i}"), 0, 1.0)));
    append_rows(&path, &many).unwrap();
    lora_hbm(dir.path())
        .args(["plot", "results.csv"])
        .assert()
        .code(2)
        .stderr(contains("9 panels by policy"));
}

#[test]
fn lines_of_loads_say_what_binds_in_a_grid_of_panels() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = Vec::new();
    for (rank, seqs) in [("8", 16), ("8", 64), ("64", 16), ("64", 64)] {
        for rho in [0.5, 1.1] {
            for budget in BUDGETS {
                let mut row = row(Source::Simulated, budget, "skip", 0, rho / f64::from(budget));
                (row.rank, row.max_num_seqs) = (Some(rank.to_owned()), Some(seqs));
                (row.rho, row.arrival_rate) = (Some(rho), Some(rho * 20.0));
                (row.ttft_slot_mean, row.ttft_prefill_mean) = (Some(1.0 / f64::from(budget)), Some(0.1));
                row.saturated = Some(budget == 2 && rho > 1.0);
                rows.push(row);
            }
        }
    }
    append_rows(dir.path().join("results.csv"), &rows).unwrap();
    lora_hbm(dir.path()).args(["plot", "results.csv", "--lines", "rho"]).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("results.svg")).unwrap();
    let texts: Vec<&str> = svg.lines().map(str::trim).filter(|l| !l.starts_with('<')).collect();
    for text in ["load ρ 0.5", "load ρ 1.1", "slot", "prefill", "ρ 1 is 20/s", "rank 64, up to 16 sequences"]
    {
        assert!(texts.contains(&text), "no {text:?} in {texts:?}");
    }
    assert!(!texts.contains(&"KV blocks"), "nothing waits for them");
    assert!(texts.iter().any(|t| t.starts_with("hollow")));
    lora_hbm(dir.path())
        .args(["plot", "results.csv", "--lines", "rho", "--by", "rank"])
        .assert()
        .code(2)
        .stderr(contains("differ in max_num_seqs (16, 64)"));
}

#[test]
fn a_missing_foreign_or_unwritable_file_fails_by_name() {
    let dir = tempfile::tempdir().unwrap();
    lora_hbm(dir.path()).args(["plot", "no.csv"]).assert().code(1).stderr(contains("cannot read no.csv"));
    std::fs::write(dir.path().join("other.csv"), "a,b\n1,2\n").unwrap();
    lora_hbm(dir.path())
        .args(["plot", "other.csv"])
        .assert()
        .code(1)
        .stderr(contains("column 1 is 'a', expected 'run_timestamp'"));
    append_rows(dir.path().join("results.csv"), &curve("skip")).unwrap();
    lora_hbm(dir.path())
        .args(["plot", "results.csv", "-o", "other.csv/figure"])
        .assert()
        .code(1)
        .stderr(contains("cannot write other.csv/figure.svg"));
}

#[test]
fn merging_keeps_each_run_once() {
    let dir = tempfile::tempdir().unwrap();
    let rows = curve("skip");
    append_rows(dir.path().join("a.csv"), &rows[..20]).unwrap();
    append_rows(dir.path().join("b.csv"), &rows[15..]).unwrap();
    lora_hbm(dir.path())
        .args(["merge", "a.csv", "b.csv", "-o", "all.csv"])
        .assert()
        .success()
        .stdout(contains("28 rows of 2 files in all.csv; 5 duplicates dropped"));
    assert_eq!(read_rows(dir.path().join("all.csv")).unwrap(), rows);
    // A file that is not among the inputs is not overwritten.
    lora_hbm(dir.path()).args(["merge", "a.csv", "-o", "b.csv"]).assert().code(2).stderr(contains("exists"));
    assert_eq!(read_rows(dir.path().join("b.csv")).unwrap().len(), 13);
}

#[test]
fn a_run_measured_twice_with_other_numbers_keeps_the_first() {
    let dir = tempfile::tempdir().unwrap();
    append_rows(dir.path().join("a.csv"), &[row(Source::Measured, 2, "skip", 0, 1.0)]).unwrap();
    append_rows(dir.path().join("b.csv"), &[row(Source::Measured, 2, "skip", 0, 2.0)]).unwrap();
    lora_hbm(dir.path())
        .args(["merge", "a.csv", "b.csv", "-o", "all.csv"])
        .assert()
        .success()
        .stderr(contains("1 of the dropped rows had other numbers"));
    assert_eq!(read_rows(dir.path().join("all.csv")).unwrap()[0].ttft_median, Some(1.0));
}

/// A folder with results of one budget and the manifest that their rows name.
fn results_with_manifest(folder: &Path, command: &str, gpu_loras: u32) {
    let mut manifest = Manifest::begin(command, &serde_json::json!({}), &[42]).unwrap();
    manifest.end(true);
    manifest.write(folder.join("s.manifest.json")).unwrap();
    let row = ResultRow {
        manifest: Some("s.manifest.json".to_owned()),
        // As of `measure` or `simulate`, whose runs have no cell.
        cell: None,
        ..row(Source::Measured, gpu_loras, "skip", 0, 1.0)
    };
    append_rows(folder.join("s.csv"), &[row]).unwrap();
}

#[test]
fn merged_rows_keep_the_manifests_that_they_were_made_with() {
    let dir = tempfile::tempdir().unwrap();
    results_with_manifest(&dir.path().join("m1"), "sweep one", 2);
    results_with_manifest(&dir.path().join("m2"), "sweep two", 4);
    // Of a file whose rows name none, it is the one beside it.
    append_rows(dir.path().join("m3/a.csv"), &[row(Source::Measured, 8, "skip", 0, 1.0)]).unwrap();
    std::fs::copy(dir.path().join("m1/s.manifest.json"), dir.path().join("m3/a.manifest.json")).unwrap();
    let merge = |from: &[&str], out: &str| {
        lora_hbm(dir.path()).arg("merge").args(from).args(["-o", out]).assert().success();
        let rows = read_rows(dir.path().join(out)).unwrap();
        rows.into_iter().map(|row| row.manifest.unwrap()).collect::<Vec<_>>()
    };
    let there = ["../m1/s.manifest.json", "../m2/s.manifest.json", "../m3/a.manifest.json"];
    assert_eq!(merge(&["m1/s.csv", "m2/s.csv", "m3/a.csv"], "all/all.csv"), there);
    // Once more, from there to elsewhere: still the same files.
    let here = there.map(|name| name.trim_start_matches("../").to_owned());
    assert_eq!(merge(&["all/all.csv"], "again.csv"), here);
    for csv in ["all/all.csv", "again.csv"] {
        lora_hbm(dir.path()).args(["report", csv, "-o", "page.html"]).assert().success();
        let page = std::fs::read_to_string(dir.path().join("page.html")).unwrap();
        assert!(page.contains("<code>sweep one</code>") && page.contains("<code>sweep two</code>"), "{csv}");
    }
    // However the file is written: it is one of those to merge.
    assert_eq!(merge(&["./m1/s.csv", "m2/s.csv"], "m1/s.csv"), ["s.manifest.json", there[1]]);
    // The same numbers by another run are another run; a copy of a folder has the same runs.
    results_with_manifest(&dir.path().join("m4"), "sweep four", 4);
    assert_eq!(merge(&["m2/s.csv", "m4/s.csv"], "two.csv"), ["m2/s.manifest.json", "m4/s.manifest.json"]);
    std::fs::create_dir(dir.path().join("copy")).unwrap();
    for name in ["s.csv", "s.manifest.json"] {
        std::fs::copy(dir.path().join("m2").join(name), dir.path().join("copy").join(name)).unwrap();
    }
    lora_hbm(dir.path())
        .args(["merge", "m2/s.csv", "copy/s.csv", "-o", "both.csv"])
        .assert()
        .success()
        .stdout(contains("1 rows of 2 files in both.csv; 1 duplicates dropped"))
        .stderr(contains("other numbers").not());
}

#[test]
fn report_is_one_page_with_figure_tables_and_manifests() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("a.csv");
    append_rows(&csv, &curve("skip")).unwrap();
    let mut manifest = Manifest::begin("sweep", &serde_json::json!({}), &[42]).unwrap();
    manifest.end(true);
    manifest.write(dir.path().join("a.manifest.json")).unwrap();
    lora_hbm(dir.path())
        .args(["report", "a.csv", "--title", "Slots & time"])
        .assert()
        .success()
        .stdout(contains("a.html"));
    let page = std::fs::read_to_string(dir.path().join("a.html")).unwrap();
    for part in ["Slots &amp; time", "<svg", "from 128 slots on", "<code>sweep</code>", "policy skip"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    // Lines by what is no column: no page, as `plot` draws no figure.
    for command in ["report", "plot"] {
        lora_hbm(dir.path())
            .args([command, "a.csv", "--lines", "nope", "-o", "lines"])
            .assert()
            .code(2)
            .stderr(contains("no column 'nope'"));
    }
    assert!(!dir.path().join("lines").exists());
    lora_hbm(dir.path()).args(["report", "none.csv"]).assert().code(1).stderr(contains("none.csv"));
    std::fs::write(dir.path().join("other.csv"), "a,b\n1,2\n").unwrap();
    lora_hbm(dir.path()).args(["report", "other.csv", "-o", "other.html"]).assert().code(1);
    assert!(!dir.path().join("other.html").exists());
}
