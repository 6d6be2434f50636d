//! Result rows by their columns' names, and the settings that tell them apart.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::results::ResultRow;

/// Settings by which rows can differ.
pub(crate) const SETTINGS: [&str; 13] = [
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
];

/// A row with its columns by name.
pub(crate) struct Row<'a> {
    pub(crate) row: &'a ResultRow,
    pub(crate) columns: Map<String, Value>,
}

impl<'a> Row<'a> {
    pub(crate) fn new(row: &'a ResultRow) -> Self {
        let columns = match serde_json::to_value(row) {
            Ok(Value::Object(columns)) => columns,
            _ => Map::new(),
        };
        Self { row, columns }
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
}

/// The distinct values of a column among rows that have one.
pub(crate) fn values(rows: &[Row<'_>], column: &str) -> BTreeSet<String> {
    rows.iter().filter_map(|r| r.get(column)).collect()
}

/// The settings of which the rows have several values; not the rate where the load that it follows from varies.
pub(crate) fn varying(rows: &[Row<'_>]) -> Vec<&'static str> {
    let several = |column: &str| values(rows, column).len() > 1;
    let implied = |column: &str| column == "arrival_rate" && several("rho");
    SETTINGS.into_iter().filter(|c| several(c) && !implied(c)).collect()
}
