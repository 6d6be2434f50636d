//! The column `settings` of a results CSV: what a run's cell sets that no other column tells, and is not the default.
//!
//! `key=value;key=value`, keys in alphabetical order, with `%` and `;` inside of a value as `%25` and `%3B`. Where
//! everything is the default it is the word `default`: empty means unknown, as everywhere in the file.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::results::ResultRow;

/// Stands for a setting that is the default, where others are told by name.
pub const DEFAULT: &str = "default";

/// Settings as the column has them.
pub fn join(settings: &BTreeMap<String, String>) -> String {
    if settings.is_empty() {
        return DEFAULT.to_owned();
    }
    let one =
        |(key, value): (&String, &String)| format!("{key}={}", value.replace('%', "%25").replace(';', "%3B"));
    settings.iter().map(one).collect::<Vec<_>>().join(";")
}

/// The settings that are not the default, of the column's text. What is not `key=value` is left out.
pub fn split(text: &str) -> BTreeMap<String, String> {
    let one = |part: &str| {
        let (key, value) = part.split_once('=')?;
        Some((key.to_owned(), value.replace("%3B", ";").replace("%25", "%")))
    };
    text.split(';').filter_map(one).collect()
}

/// What each row says of its settings. Equal cells have equal settings: a row that does not say, of a file that is older
/// than the column, has those that another row of its cell names.
pub(crate) fn of_rows(rows: &[&ResultRow]) -> Vec<Option<String>> {
    let told: HashMap<&str, &str> =
        rows.iter().filter_map(|r| Some((r.cell.as_deref()?, r.settings.as_deref()?))).collect();
    let of_cell =
        |row: &ResultRow| row.cell.as_deref().and_then(|cell| told.get(cell)).map(|s| (*s).to_owned());
    rows.iter().map(|row| row.settings.clone().or_else(|| of_cell(row))).collect()
}

/// Rows that all columns say are of one configuration, and that are not: their mean would be nobody's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the rows at {gpu_loras} slots are of the cells {}, which have other settings that no column tells: take the rows of \
     one configuration, or run them anew into another file, which will have the column 'settings'",
    cells.join(" and ")
)]
pub struct Mixture {
    /// The budget.
    pub gpu_loras: u32,
    /// Keys of its cells.
    pub cells: Vec<String>,
}

impl Mixture {
    /// Refuses rows of several cells at one budget. Rows of no experiment have no cell, and are not told apart.
    pub(crate) fn refuse<'a>(rows: impl IntoIterator<Item = &'a ResultRow>) -> Result<(), Self> {
        let mut cells: BTreeMap<u32, BTreeSet<&str>> = BTreeMap::new();
        for row in rows {
            cells.entry(row.gpu_loras).or_default().extend(row.cell.as_deref());
        }
        let owned = |cells: BTreeSet<&str>| cells.into_iter().map(str::to_owned).collect();
        match cells.into_iter().find(|(_, cells)| cells.len() > 1) {
            Some((gpu_loras, cells)) => Err(Self { gpu_loras, cells: owned(cells) }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::results::{RunContext, Source};

    #[test]
    fn what_is_joined_is_split_again() {
        let pairs = [("prefetch", "2"), ("dataset", "/a;b=100%3B.json"), ("device", "cuda")];
        let settings: BTreeMap<String, String> =
            pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let text = join(&settings);
        assert_eq!(text, "dataset=/a%3Bb=100%253B.json;device=cuda;prefetch=2");
        assert_eq!(split(&text), settings);
        assert_eq!(join(&BTreeMap::new()), "default");
        assert!(split("default").is_empty());
    }

    pub(crate) fn row(cell: &str, settings: Option<&str>) -> ResultRow {
        let run = RunContext {
            cell: Some(cell.to_owned()),
            settings: settings.map(str::to_owned),
            ..RunContext::new(Source::Measured, 4, 2, "short")
        };
        ResultRow::from_records(&[], &run)
    }

    #[test]
    fn cells_that_look_alike_are_refused() {
        let rows = [row("a", None), row("b", None)];
        let refused = Mixture::refuse(&rows).unwrap_err();
        assert_eq!((refused.gpu_loras, refused.cells.join(" ").as_str()), (2, "a b"));
        assert_eq!(Mixture::refuse(&rows[..1]), Ok(()));
    }

    #[test]
    fn an_older_row_has_the_settings_of_its_cell() {
        let rows = [row("a", None), row("a", Some("prefetch=2")), row("b", None)];
        assert_eq!(
            of_rows(&rows.each_ref()),
            [Some("prefetch=2".to_owned()), Some("prefetch=2".to_owned()), None]
        );
    }
}
