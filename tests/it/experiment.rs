//! Experiment files: what cells they resolve to, and what they refuse.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use lora_hbm::experiment::{Experiment, Shard, Simulator, Sources};
use lora_hbm::profile::Profile;
use lora_hbm::report::results::{ResultRow, Source, read_rows};
use lora_hbm::workload::popularity::Popularity;

fn parse(text: &str) -> Experiment {
    Experiment::parse(text, "test.toml").unwrap()
}

fn refused(text: &str) -> String {
    let message = Experiment::parse(text, "test.toml").unwrap_err().to_string();
    assert!(message.starts_with("test.toml"), "{message}");
    message
}

fn shipped(name: &str) -> Experiment {
    Experiment::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/experiments").join(name)).unwrap()
}

#[test]
fn the_seed_sweep_has_its_fifteen_budgets_in_two_regimes() {
    let cells = shipped("seed-sweep.toml").cells().to_vec();
    assert_eq!(cells.len(), (7 + 8) * 2);
    assert!(cells.iter().all(|c| c.engine.gpu_loras <= c.engine.total_loras));
    let keys: HashSet<_> = cells.iter().map(|c| c.key()).collect();
    assert_eq!(keys.len(), cells.len());
    assert!(keys.iter().all(|k| k.len() == 16));
}

#[test]
fn the_validation_of_the_demo_has_seven_budgets_five_times() {
    let experiment = shipped("demo-validate.toml");
    assert_eq!((experiment.cells().len(), experiment.runs(None).len()), (7, 35));
    assert_eq!(experiment.name, "demo-validate");
}

#[test]
fn settings_left_out_have_the_defaults_of_the_commands() {
    let cell = &parse("[axes]\ngpu_loras = [2]").cells()[0].clone();
    assert_eq!((cell.engine.total_loras, cell.engine.max_r, cell.engine.max_num_seqs), (128, 8, 16));
    assert_eq!((cell.workload.arrival_rate, cell.workload.num_requests), (Some(2.0), Some(200)));
    assert_eq!((cell.workload.max_tokens, cell.workload.popularity), (Some(16), Some(Popularity::Uniform)));
}

#[test]
fn a_key_follows_from_the_settings_alone() {
    let key = |text: &str| parse(text).cells()[0].key().to_owned();
    let plain = key("[engine]\ngpu_loras = 4");
    assert_eq!(plain, key("[axes]\ngpu-loras = [4]\n[replicate]\nseeds = [1, 2]\nrepeats = 3"));
    assert_eq!(
        plain,
        key("[engine]\npolicy = \"skip\"\nrank = 8\ngpu_loras = 4\n[workload]\narrival_rate = 2")
    );
    assert_ne!(plain, key("[engine]\ngpu_loras = 4\npolicy = \"fcfs\""));
    // Results of earlier versions are found again only while this holds.
    assert_eq!(plain, "a2aaec1a6e54887f");
}

/// Rows of a committed results file, by cell.
fn committed(csv: &str) -> BTreeMap<String, ResultRow> {
    let rows = read_rows(Path::new(env!("CARGO_MANIFEST_DIR")).join("plots").join(csv)).unwrap();
    rows.into_iter().map(|row| (row.cell.clone().unwrap(), row)).collect()
}

#[test]
fn committed_results_are_of_the_cells_of_their_experiments() {
    for (csv, experiments) in [
        (
            "h100-pilot/h100-pilot.csv",
            &["h100-pilot.toml", "h100-pilot-heavy.toml", "h100-pilot-repeats.toml"][..],
        ),
        ("h100-pilot/plan.csv", &["h100-plan.toml"]),
        ("h200-pilot/h200-pilot.csv", &["h100-pilot.toml"]),
        ("h200-pilot/plan.csv", &["h100-plan.toml"]),
        ("h100-ranks/h100-ranks.csv", &["h100-ranks.toml"]),
        ("demo-validate/demo-validate.csv", &["demo-validate.toml"]),
    ] {
        let of_file: BTreeSet<String> = committed(csv).into_keys().collect();
        let cells =
            |name: &&str| shipped(name).cells().iter().map(|c| c.key().to_owned()).collect::<Vec<_>>();
        let keys: BTreeSet<String> = experiments.iter().flat_map(cells).collect();
        assert_eq!(of_file, keys, "{csv}");
    }
}

#[test]
fn the_pilot_s_loads_are_what_they_were_whatever_the_number_of_requests() {
    let simulator = Simulator::new(Profile::named("h100-llama2-7b").unwrap()).unwrap();
    let rows = committed("h100-pilot/h100-pilot.csv");
    for cell in shipped("h100-pilot.toml").cells() {
        let rate = |requests: u64| {
            let mut workload = cell.workload.clone();
            workload.num_requests = Some(requests);
            let burst = Sources::default().burst(&cell.engine, &workload, 11).unwrap();
            cell.workload.rho.unwrap() * simulator.saturation_rate(&cell.at_full_budget(), &burst).unwrap()
        };
        let was = rows[cell.key()].arrival_rate.unwrap();
        assert_eq!([rate(200), rate(10), rate(5000)], [was; 3]);
    }
}

#[test]
fn with_a_trace_what_is_not_set_is_the_trace_s() {
    let cell = |more: &str| {
        parse(&format!("[engine]\ngpu_loras = 2\n[workload]\ntrace = \"t.jsonl\"\n{more}")).cells()[0].clone()
    };
    let kept = cell("arrivals = \"trace\"").workload;
    assert_eq!(
        (kept.num_requests, kept.max_tokens, kept.popularity, kept.arrival_rate),
        (None, None, None, None)
    );
    let set = cell("num_requests = 200\nmax_tokens = 16\npopularity = \"uniform\"");
    assert_eq!((set.workload.num_requests, set.workload.max_tokens), (Some(200), Some(16)));
    assert_ne!(set.key(), cell("").key(), "what is set goes before the trace's, so it is another cell");
}

#[test]
fn an_axis_may_be_any_setting_of_engine_or_workload() {
    let experiment = parse(
        "[axes]\ngpu_loras = [2, 4]\nrank = [8, 64]\npopularity = [\"uniform\", \"zipf:1\"]\nrho = [0.5, 0.8, 0.95]\n\
         [[exclude]]\nrank = 64\nrho = [0.8, 0.95]",
    );
    assert_eq!(experiment.cells().len(), 2 * 2 * 2 * 3 - 2 * 2 * 2);
    assert!(experiment.cells().iter().all(|c| c.workload.arrival_rate.is_none()));
    assert!(!experiment.cells().iter().any(|c| c.engine.max_r == 64 && c.workload.rho != Some(0.5)));
}

#[test]
fn shards_share_the_cells_out() {
    let experiment = shipped("seed-sweep.toml");
    let parts: Vec<usize> =
        ["1/3", "2/3", "3/3"].map(|s| experiment.runs(Some(s.parse::<Shard>().unwrap())).len()).to_vec();
    assert_eq!(parts.iter().sum::<usize>(), 30);
    assert!(parts.iter().all(|n| *n > 0), "{parts:?}");
}

#[test]
fn resuming_leaves_out_what_the_rows_have_of_the_same_source() {
    let experiment = parse("[axes]\ngpu_loras = [2, 4]\n[replicate]\nseeds = [1, 2]\nrepeats = 2");
    let runs = experiment.runs(None);
    let row = |source, i: usize| {
        let context = runs[i].cell.run_context(source, runs[i].seed, runs[i].repeat);
        ResultRow::from_records(&[], &context)
    };
    let rows = [row(Source::Measured, 0), row(Source::Measured, 3), row(Source::Simulated, 5)];
    let pending = experiment.pending(None, Source::Measured, &rows);
    assert_eq!(pending.len(), 8 - 2);
    assert!(!pending.contains(&runs[0]) && !pending.contains(&runs[3]) && pending.contains(&runs[5]));
}

#[test]
fn rows_say_what_the_cell_was_run_with() {
    let experiment =
        parse("[engine]\ngpu_loras = 2\nranks = [8, 64]\n[workload]\narrivals = \"gamma:2\"\nrho = 0.5");
    let run = experiment.runs(None)[0];
    let row = ResultRow::from_records(&[], &run.cell.run_context(Source::Simulated, run.seed, run.repeat));
    assert_eq!((row.rank.as_deref(), row.arrivals.as_deref()), (Some("8+64"), Some("gamma:2")));
    assert_eq!((row.rho, row.arrival_rate, row.seed), (Some(0.5), None, Some(42)));
    assert_eq!(row.cell.as_deref(), Some(run.cell.key()));
    assert_eq!(row.settings.as_deref(), Some("default"));
}

#[test]
fn rows_say_what_has_no_column_and_is_not_the_default() {
    let settings = |text: &str| {
        let experiment = parse(text);
        let run = experiment.runs(None)[0];
        run.cell.run_context(Source::Simulated, run.seed, run.repeat).settings.unwrap()
    };
    let text = "[engine]\ngpu_loras = 2\nprefetch = 2\nseed = 3\nkv_memory = \"1GiB\"\nblock_size = 16\n\
                [workload]\nwarm_up = 10\nmax_tokens = 8";
    assert_eq!(settings(text), "engine_seed=3;kv_memory=1GiB;prefetch=2;warm_up=10");
    let text = "[engine]\ngpu_loras = 2\nno_enable_chunked_prefill = true\n[workload]\nnum_requests = 9";
    assert_eq!(settings(text), "no_enable_chunked_prefill=true");
}

#[test]
fn mistakes_are_named_with_a_remedy() {
    for (text, expected) in [
        ("[engin]\n", "unknown table or key 'engin'"),
        ("[engine]\nmodl = \"tiny\"", "unknown key 'modl' in [engine]; did you mean 'model'?"),
        ("[axes]\ngpu_lora = [2]", "did you mean 'gpu_loras'?"),
        ("[replicate]\nrepeat = 2", "did you mean 'repeats'?"),
        ("[output]\ncvs = \"a\"", "use one of csv, requests, decisions, plot"),
        ("[output]\nrequests = \"a\"\ndecisions = \"a\"", "give each its own"),
        ("[axes]\nseed = [1]", "[replicate] seeds"),
        ("[axes]\ngpu_loras = 2", "gpu_loras = [2]"),
        ("[axes]\ngpu_loras = []", "no cell is left"),
        ("[axes]\ngpu_loras = [2, 2]", "two cells have the same settings"),
        ("[workload]\narrival_rate = 1", "gpu_loras must be at least 1: set it"),
        ("[axes]\ngpu_loras = [256]", "greater than total_loras (128)"),
        ("[engine]\ngpu_loras = 2\n[workload]\narrival_rate = 0", "arrival_rate must be greater than 0"),
        ("[engine]\ngpu_loras = 2\n[workload]\narrival_rate = -1.5", "not -1.5"),
        ("[engine]\ngpu_loras = 2\n[workload]\narrival_rate = 1\nrho = 0.5", "give one"),
        (
            "[engine]\ngpu_loras = 2\npolicy = \"lifo\"",
            "unknown policy 'lifo': use one of skip, fcfs, affinity",
        ),
        ("[axes]\ngpu_loras = [2]\nregime = [\"tall\"]", "regime"),
        ("[engine]\ngpu_loras = 2\nblock_size = 0", "block_size must be at least 1"),
        ("[engine]\ngpu_loras = 2\nmax_skip_age = nan", "max_skip_age must be zero or more seconds, not NaN"),
        ("[engine]\ngpu_loras = 2\ntotal_loras = 3000000000", "more than 1000000 adapters are a mistake"),
        ("[engine]\ngpu_loras = -2", "gpu_loras"),
        ("[engine]\ngpu_loras = 2\n[exclude]\nrank = 9", "leaves out no cell"),
        ("[engine]\ngpu_loras = 2\n[replicate]\nrepeats = 0", "repeats = 1 or more"),
        ("[engine]\ngpu_loras = 2\n[workload]\narrivals = \"trace\"", "set trace"),
        ("engine = 3", "write [engine]"),
        ("[engine", "is not TOML"),
    ] {
        let message = refused(text);
        assert!(message.contains(expected), "{text:?} gave {message:?}, expected {expected:?}");
    }
}

#[test]
fn the_references_policy_means_the_same_cells() {
    let keys = |text: &str| parse(text).cells().iter().map(|c| c.key().to_owned()).collect::<Vec<_>>();
    let plain = keys("[engine]\ngpu_loras = 4");
    assert_eq!(plain, keys("[engine]\ngpu_loras = 4\npolicy = \"credit\""));
    assert_eq!(
        plain,
        keys("[engine]\ngpu_loras = 4\n[axes]\npolicy = [\"skip\", \"fcfs\"]\n[exclude]\npolicy = \"fcfs\"")
    );
    let without =
        "[engine]\ngpu_loras = 4\n[axes]\npolicy = [\"credit\", \"fcfs\"]\n[exclude]\npolicy = \"credit\"";
    assert_eq!(parse(without).cells()[0].engine.policy, lora_sched::Policy::Fcfs);
}

#[test]
fn an_engine_without_chunks_is_another_cell() {
    let cell = |text: &str| parse(text).cells()[0].clone();
    let (chunked, not) = (
        cell("[engine]\ngpu_loras = 4\nno-enable-chunked-prefill = false"),
        cell("[engine]\ngpu_loras = 4\nno_enable_chunked_prefill = true"),
    );
    assert_ne!(chunked.key(), not.key());
    assert_eq!(chunked.key(), "a2aaec1a6e54887f");
}
