//! Result rows by their columns' names, and the settings that tell them apart.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use serde_json::{Map, Value};

use super::results::ResultRow;
use super::settings;

/// Columns by which rows can differ, beside those that [`settings`] makes of one column's text.
const SETTINGS: [&str; 14] = [
    "model",
    "total_loras",
    "rank",
    "prompt_regime",
    "rho",
    "arrival_rate",
    "arrivals",
    "popularity",
    "policy",
    "evict",
    "swap_mode",
    "max_num_seqs",
    "max_tokens",
    "num_requests",
];

/// A row with its columns by name. Each setting that the column `settings` of any of the rows names is a column too.
pub(crate) struct Row<'a> {
    pub(crate) row: &'a ResultRow,
    pub(crate) columns: Map<String, Value>,
    /// Names of those settings.
    named: Rc<[String]>,
}

impl<'a> Row<'a> {
    /// All rows that are looked at together.
    pub(crate) fn all(rows: impl IntoIterator<Item = &'a ResultRow>) -> Vec<Self> {
        let rows: Vec<&ResultRow> = rows.into_iter().collect();
        let told: Vec<Option<BTreeMap<String, String>>> =
            settings::of_rows(&rows).into_iter().map(|text| Some(settings::split(&text?))).collect();
        let names: BTreeSet<String> = told.iter().flatten().flat_map(BTreeMap::keys).cloned().collect();
        let named: Rc<[String]> = names.into_iter().collect();
        let with_columns = |(row, told): (&'a ResultRow, Option<BTreeMap<String, String>>)| {
            let mut columns = match serde_json::to_value(row) {
                Ok(Value::Object(columns)) => columns,
                _ => Map::new(),
            };
            for name in &*named {
                let value = |of_row: &BTreeMap<String, String>| {
                    of_row.get(name).map_or(settings::DEFAULT, String::as_str).to_owned()
                };
                columns.entry(name.clone()).or_insert(told.as_ref().map(value).into());
            }
            Self { row, columns, named: named.clone() }
        };
        rows.into_iter().zip(told).map(with_columns).collect()
    }

    /// A column as text; none where it is empty.
    pub(crate) fn get(&self, column: &str) -> Option<String> {
        match self.columns.get(column)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            Value::Number(n) => Some(n.as_f64().map_or_else(|| n.to_string(), |f| f.to_string())),
            other => Some(other.to_string()),
        }
    }

    /// Every column by which this row and those that it was made with can differ.
    pub(crate) fn settings(&self) -> impl Iterator<Item = &str> {
        SETTINGS.into_iter().chain(self.named.iter().map(String::as_str))
    }
}

/// The distinct values of a column among rows that have one.
pub(crate) fn values(rows: &[Row<'_>], column: &str) -> BTreeSet<String> {
    rows.iter().filter_map(|r| r.get(column)).collect()
}

/// The settings of which the rows have several values; not the rate where the load that it follows from varies.
pub(crate) fn varying(rows: &[Row<'_>]) -> Vec<String> {
    let several = |column: &str| values(rows, column).len() > 1;
    let implied = |column: &str| column == "arrival_rate" && several("rho");
    let settings = rows.first().into_iter().flat_map(Row::settings);
    settings.filter(|c| several(c) && !implied(c)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::settings::tests::row;

    #[test]
    fn settings_without_a_column_of_their_own_are_columns() {
        let rows = [
            row("a", Some("default")),
            row("b", Some("device=cuda;prefetch=2")),
            row("c", Some("device=cuda")),
            row("b", None),
            row("d", None),
        ];
        let rows = Row::all(&rows);
        assert_eq!(varying(&rows), ["device", "prefetch"]);
        let prefetch: Vec<_> = rows.iter().map(|r| r.get("prefetch").unwrap_or_default()).collect();
        assert_eq!(prefetch, ["default", "2", "default", "2", ""]);
    }
}
