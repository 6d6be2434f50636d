//! Rows that do not tell how they were made: measured ones of a foreign server, and those of older files.

use std::collections::{BTreeSet, HashMap};

use crate::report::results::{ResultRow, Source};
use crate::report::settings;

/// The settings that a foreign server does not tell.
fn untold(row: &ResultRow) -> [Option<String>; 5] {
    [
        row.rank.clone(),
        row.policy.clone(),
        row.evict.clone(),
        row.swap_mode.clone(),
        row.max_num_seqs.map(|n| n.to_string()),
    ]
}

/// What both kinds of rows know.
fn told(row: &ResultRow) -> impl PartialEq {
    (
        (row.model.clone(), row.total_loras, row.gpu_loras, row.prompt_regime.clone(), row.max_tokens),
        (row.popularity.clone(), row.arrivals.clone()),
        row.arrival_rate.map(f64::to_bits),
        row.rho.map(f64::to_bits),
    )
}

/// Gives each measured row of a server that told none of its settings those of the simulated rows of the same
/// workload and budget, if all of these agree: the simulation was made to be compared with it. What a row does not say of
/// its requests' number and of the settings that have no column is as in the others of its configuration, if these agree.
pub(super) fn adopt_settings(rows: &mut [ResultRow]) {
    let told_settings = settings::of_rows(&rows.iter().collect::<Vec<_>>());
    rows.iter_mut().zip(told_settings).for_each(|(row, told)| row.settings = told);
    let simulated: Vec<ResultRow> = rows.iter().filter(|r| r.source == Source::Simulated).cloned().collect();
    let foreign = |r: &ResultRow| r.source == Source::Measured && untold(r).iter().all(Option::is_none);
    for row in rows.iter_mut().filter(|r| foreign(r)) {
        let mut same = simulated.iter().filter(|s| told(s) == told(row));
        let Some(first) = same.next() else { continue };
        if same.all(|s| untold(s) == untold(first)) {
            row.rank = first.rank.clone();
            row.policy = first.policy.clone();
            row.evict = first.evict.clone();
            row.swap_mode = first.swap_mode.clone();
            row.max_num_seqs = first.max_num_seqs;
        }
    }
    let mut known: HashMap<String, (BTreeSet<String>, BTreeSet<u64>)> = HashMap::new();
    for row in rows.iter() {
        let (settings, num_requests) = known.entry(super::what(row)).or_default();
        settings.extend(row.settings.clone());
        num_requests.extend(row.num_requests);
    }
    for row in rows.iter_mut().filter(|r| r.settings.is_none() || r.num_requests.is_none()) {
        let Some((settings, num_requests)) = known.get(&super::what(row)) else { continue };
        row.settings = row.settings.take().or_else(|| only(settings));
        row.num_requests = row.num_requests.or_else(|| only(num_requests));
    }
}

/// The one value among these; none of several.
fn only<T: Clone + Ord>(values: &BTreeSet<T>) -> Option<T> {
    values.first().filter(|_| values.len() == 1).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::{RunContext, rank_column};

    fn row(source: Source, gpu_loras: u32, evict: Option<&str>) -> ResultRow {
        let known = evict.is_some();
        let run = RunContext {
            evict: evict.map(str::to_owned),
            policy: known.then(|| "skip".to_owned()),
            rank: rank_column(if known { &[8] } else { &[] }),
            max_num_seqs: known.then_some(8),
            ..RunContext::new(source, 4, gpu_loras, "short")
        };
        ResultRow::from_records(&[], &run)
    }

    #[test]
    fn a_foreign_row_takes_the_settings_that_it_was_simulated_with() {
        let mut rows = [
            row(Source::Measured, 2, None),
            row(Source::Measured, 3, None),
            row(Source::Measured, 4, None),
            row(Source::Simulated, 2, Some("lru")),
            row(Source::Simulated, 3, Some("lru")),
            row(Source::Simulated, 3, Some("lfu")),
        ];
        adopt_settings(&mut rows);
        assert_eq!((rows[0].evict.as_deref(), rows[0].max_num_seqs), (Some("lru"), Some(8)));
        // Two simulations that differ, and none at all.
        assert_eq!((rows[1].evict.as_deref(), rows[2].evict.as_deref()), (None, None));
    }

    #[test]
    fn what_a_row_does_not_say_of_other_settings_is_as_in_those_like_it() {
        let set = |source, settings: Option<&str>, num_requests| ResultRow {
            settings: settings.map(str::to_owned),
            num_requests,
            ..row(source, 2, Some("lru"))
        };
        let mut rows =
            [set(Source::Measured, None, None), set(Source::Simulated, Some("prefetch=2"), Some(200))];
        adopt_settings(&mut rows);
        assert_eq!((rows[0].settings.as_deref(), rows[0].num_requests), (Some("prefetch=2"), Some(200)));
        let mut rows = [
            set(Source::Measured, None, None),
            set(Source::Simulated, Some("prefetch=2"), Some(200)),
            set(Source::Simulated, Some("default"), Some(200)),
        ];
        adopt_settings(&mut rows);
        assert_eq!((rows[0].settings.as_deref(), rows[0].num_requests), (None, Some(200)));
    }

    #[test]
    fn a_row_that_tells_anything_stays_as_it_is() {
        let mut rows = [row(Source::Measured, 2, Some("fifo")), row(Source::Simulated, 2, Some("lru"))];
        adopt_settings(&mut rows);
        assert_eq!(rows[0].evict.as_deref(), Some("fifo"));
    }
}
