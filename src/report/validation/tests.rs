//! What a validation makes of rows.

use approx::assert_relative_eq;

use super::*;
use crate::report::results::RunContext;

fn row(source: Source, gpu_loras: u32, repeat: u32, median: f64, swaps: u64) -> ResultRow {
    let context = RunContext {
        repeat: Some(repeat),
        swap_count: Some(swaps),
        arrival_rate: Some(2.0),
        ..RunContext::new(source, 128, gpu_loras, "short")
    };
    ResultRow {
        ttft_median: Some(median),
        ttft_mean: Some(median),
        ttft_p90: Some(2.0 * median),
        ttft_p99: Some(3.0 * median),
        ttft_front_mean: Some(0.01),
        ttft_prefill_mean: Some(0.03),
        ttft_deliver_mean: Some(0.01),
        ..ResultRow::from_records(&[], &context)
    }
}

/// Medians 0.4, 0.2, 0.1, 0.1 at 2, 8, 32, 128; two repeats, 1 % apart.
fn rows(simulated: [f64; 4]) -> Vec<ResultRow> {
    let measured = [0.4, 0.2, 0.1, 0.1];
    let budgets = [2, 8, 32, 128];
    let mut rows = Vec::new();
    for ((budget, m), s) in budgets.into_iter().zip(measured).zip(simulated) {
        rows.push(row(Source::Measured, budget, 0, m * 0.995, 100));
        rows.push(row(Source::Measured, budget, 1, m * 1.005, 100));
        rows.push(row(Source::Simulated, budget, 0, s, 101));
    }
    rows
}

#[test]
fn a_good_simulation_has_small_errors_the_order_the_knee_and_skill() {
    let v = Validation::of(&rows([0.408, 0.198, 0.101, 0.1])).unwrap();
    assert_relative_eq!(v.budgets[0].median.error_percent, 2.0, epsilon = 1e-9);
    assert!(v.budgets.iter().all(|b| b.misses().is_empty()), "{v:?}");
    assert_eq!((v.tau, v.knee), (Some(1.0), Some((32, 32))));
    assert!(v.skill.unwrap() > 0.9 && v.breaches(5.0, 8.0, 0.8).is_empty());
    // Of the six pairs, 32 and 128 are not told apart by repeats.
    assert_relative_eq!(v.budgets[0].naive.constant_percent.unwrap(), -62.5, epsilon = 1e-9);
    assert_relative_eq!(v.budgets[0].naive.service_percent.unwrap(), -87.5, epsilon = 1e-9);
}

#[test]
fn a_bad_one_misses_each_of_them() {
    let mut rows = rows([0.2, 0.4, 0.05, 0.2]);
    rows.iter_mut().filter(|r| r.source == Source::Simulated).for_each(|r| r.swap_count = Some(110));
    let v = Validation::of(&rows).unwrap();
    assert_eq!(v.budgets[0].misses(), ["median", "mean", "p99", "swaps"]);
    // A server that does not count its swaps is not held to any number of them.
    rows.iter_mut().filter(|r| r.source == Source::Measured).for_each(|r| r.swap_count = None);
    let uncounted = Validation::of(&rows).unwrap();
    assert_eq!(uncounted.budgets[0].swaps, (None, Some(110.0)));
    assert_eq!(uncounted.budgets[0].misses(), ["median", "mean", "p99"]);
    assert_eq!(v.knee, Some((32, 32)));
    assert!(v.tau.unwrap() < 1.0 && v.skill.unwrap() < 0.8);
    let breaches = v.breaches(10.0, 20.0, 0.8);
    assert_eq!((breaches.len(), breaches[0].as_str()), (9, "median at 2 slots -50.0 %"));
    assert!(breaches[8].starts_with("skill -"), "{breaches:?}");
}

#[test]
fn configurations_are_validated_apart() {
    let mut all = rows([0.4, 0.2, 0.1, 0.1]);
    let mut long = rows([0.8, 0.4, 0.2, 0.2]);
    long.iter_mut().for_each(|r| r.prompt_regime = "long".to_owned());
    all.extend(long);
    let each = Validation::each(&all).unwrap();
    assert_eq!(each.len(), 2);
    assert!(each[0].what.contains("long") && !each[0].breaches(10.0, 20.0, 0.8).is_empty());
    assert!(each[1].what.contains("short") && each[1].breaches(10.0, 20.0, 0.8).is_empty());
}

#[test]
fn where_the_budget_hardly_matters_no_skill_is_asked_for() {
    let alike = |simulated: [f64; 2], smallest: f64| {
        let mut rows = Vec::new();
        for ((budget, m), s) in [2, 128].into_iter().zip([smallest, 0.1]).zip(simulated) {
            rows.push(row(Source::Measured, budget, 0, m, 100));
            rows.push(row(Source::Simulated, budget, 0, s, 101));
        }
        Validation::of(&rows).unwrap()
    };
    let v = alike([0.1, 0.105], 0.104);
    assert!(v.skill.unwrap() < 0.0 && v.breaches(10.0, 20.0, 0.8).is_empty(), "{v:?}");
    let v = alike([0.145, 0.13], 0.16);
    assert_eq!(v.breaches(90.0, 90.0, 0.8).len(), 1, "{v:?}");
}

/// A run of a trace: medians differ from seed to seed by a factor.
fn of_seed(source: Source, gpu_loras: u32, (seed, repeat): (u64, u32), median: f64) -> ResultRow {
    ResultRow { seed: Some(seed), ..row(source, gpu_loras, repeat, median, 100) }
}

#[test]
fn a_trace_is_held_against_itself_and_what_has_no_partner_is_left_out() {
    let mut rows = Vec::new();
    for (budget, least) in [(2, 0.3), (128, 0.1)] {
        rows.extend(
            (1..=5).map(|seed| of_seed(Source::Simulated, budget, (seed, 0), least * f64::from(seed as u32))),
        );
        rows.push(of_seed(Source::Measured, budget, (3, 0), least * 3.0));
        rows.push(of_seed(Source::Measured, budget, (9, 0), least));
    }
    let v = Validation::of(&rows).unwrap();
    for b in &v.budgets {
        assert_eq!((b.median.error_percent, b.median.spread_percent), (0.0, None), "{b:?}");
        assert_eq!((b.traces, b.runs), (1, 1));
    }
    assert_eq!(v.left_out, LeftOut { measured: 1, simulated: 4 });
    assert!(v.said().contains(&"left out: 4 seeds with simulated rows alone".to_owned()), "{:?}", v.said());
    assert_eq!((v.skill, v.budgets[0].naive.constant_percent.is_some()), (Some(1.0), true));
}

#[test]
fn traces_that_differ_are_no_spread_that_would_excuse_an_error() {
    let mut rows = Vec::new();
    for (seed, median) in [(1, 0.1), (2, 0.2), (3, 0.5), (4, 0.05), (5, 0.3)] {
        rows.push(of_seed(Source::Simulated, 8, (seed, 0), median));
        rows.push(of_seed(Source::Measured, 8, (seed, 0), median * 1.07));
    }
    let v = Validation::of(&rows).unwrap();
    let b = &v.budgets[0];
    assert_relative_eq!(b.median.error_percent, (1.0 / 1.07 - 1.0) * 100.0, epsilon = 1e-9);
    assert_eq!((b.median.spread_percent, b.traces, b.runs), (None, 5, 5));
    assert_eq!(b.misses(), ["median", "mean", "p99"]);
}

#[test]
fn without_repeats_no_budgets_are_told_apart() {
    let of = |repeats: [u32; 2]| {
        let mut rows = Vec::new();
        for ((budget, median), repeats) in [(2, 0.4), (128, 0.1)].into_iter().zip(repeats) {
            rows.push(of_seed(Source::Simulated, budget, (1, 0), median));
            rows.extend((0..repeats).map(|i| of_seed(Source::Measured, budget, (1, i), median)));
        }
        Validation::of(&rows).unwrap()
    };
    assert_eq!((of([1, 1]).tau, of([2, 1]).tau, of([2, 2]).tau), (None, None, Some(1.0)));
    let said = of([2, 1]).said();
    assert!(said.iter().any(|s| s.starts_with("no Kendall's tau")), "{said:?}");
}

#[test]
fn a_budget_without_repeats_is_held_against_its_neighbours_spread() {
    let mut rows = Vec::new();
    for (budget, repeats) in [(2, vec![0.98, 1.02]), (8, vec![1.0]), (32, vec![0.96, 1.04])] {
        rows.push(of_seed(Source::Simulated, budget, (1, 0), 1.1));
        let repeats = (0..).zip(repeats);
        rows.extend(repeats.map(|(i, median)| of_seed(Source::Measured, budget, (1, i), median)));
    }
    let v = Validation::of(&rows).unwrap();
    assert_eq!(v.budgets[1].median.spread_percent, None);
    assert_relative_eq!(v.budgets[1].median.neighbours_percent.unwrap(), 8.0, epsilon = 1e-9);
    // Off by 10 %: more than twice 4 %, less than twice 8.
    let holds: Vec<bool> = v.budgets.iter().map(|b| b.misses().is_empty()).collect();
    assert_eq!(holds, [false, true, true]);
}

#[test]
fn budgets_are_compared_on_the_traces_that_they_share() {
    let mut rows = Vec::new();
    for (budget, seeds) in [(2, vec![1]), (128, vec![1, 2])] {
        for seed in seeds {
            // The second trace is ten times as slow: against it, two slots would be the faster ones.
            let median = if seed == 2 { 10.0 } else { 1.0 } / f64::from(budget).sqrt();
            rows.push(of_seed(Source::Simulated, budget, (seed, 0), median));
            rows.push(of_seed(Source::Measured, budget, (seed, 0), median));
        }
    }
    let v = Validation::of(&rows).unwrap();
    assert_relative_eq!(v.effect.unwrap(), 8.0, epsilon = 1e-9);
    assert_eq!(v.knee, Some((128, 128)));
}

#[test]
fn what_is_of_two_configurations_profiles_or_rates_is_refused() {
    let pair = || vec![row(Source::Measured, 8, 0, 0.1, 1), row(Source::Simulated, 8, 0, 0.1, 1)];
    let refused = |rows: &[ResultRow]| Validation::each(rows).unwrap_err().to_string();
    let mut cells = pair();
    (cells[0].cell, cells[1].cell) = (Some("a".to_owned()), Some("b".to_owned()));
    assert!(refused(&cells).contains("cells a and b"));
    let mut rates = pair();
    rates.iter_mut().for_each(|r| r.rho = Some(0.8));
    (rates[0].arrival_rate, rates[1].arrival_rate) = (Some(34.1), Some(36.7));
    assert!(refused(&rates).contains("at 34.1 and at 36.7 requests a second"));
    rates[1].arrival_rate = Some(34.1 * (1.0 + 1e-9));
    assert_eq!(Validation::each(&rates).unwrap().len(), 1, "rounding");
    let mut predictions = pair();
    predictions.push(row(Source::Simulated, 8, 0, 0.1, 1));
    assert_eq!(Validation::each(&predictions).unwrap()[0].budgets[0].median.error_percent, 0.0);
    predictions[2].ttft_mean = Some(0.2);
    assert!(refused(&predictions).contains("simulated twice with different outcomes"));
}

#[test]
fn settings_without_a_column_are_validated_apart() {
    let of = |settings: Option<&str>, n: u64, simulated: f64| {
        let mut rows = vec![row(Source::Measured, 8, 0, 0.1, 1), row(Source::Simulated, 8, 0, simulated, 1)];
        for r in &mut rows {
            (r.settings, r.num_requests) = (settings.map(str::to_owned), Some(n));
            r.cell = Some(format!("{settings:?}{n}"));
        }
        rows
    };
    let all = [of(Some("default"), 200, 0.1), of(Some("prefetch=2"), 200, 0.2), of(Some("default"), 50, 0.3)];
    let each = Validation::each(&all.concat()).unwrap();
    let found: Vec<(f64, bool, bool)> = each
        .iter()
        .map(|v| {
            (v.budgets[0].median.simulated_s, v.what.contains("prefetch 2"), v.what.contains("50 requests"))
        })
        .collect();
    assert_eq!(found, [(0.3, false, true), (0.1, false, false), (0.2, true, false)]);
    // An older file's rows are of their cell.
    let mut old = of(Some("prefetch=2"), 200, 0.2);
    old[0].settings = None;
    assert_eq!(Validation::each(&old).unwrap().len(), 1);
    let one = Validation::each(&of(Some("default"), 200, 0.1)).unwrap();
    assert!(!one[0].what.contains("requests") && !one[0].what.contains("default"), "{}", one[0].what);
}
