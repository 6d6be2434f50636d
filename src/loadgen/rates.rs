//! What `probe` says about arrival rates: summaries in the reference's words, table and file formats.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::lag::Lag;
use super::run::LoadOutcome;
use super::saturation::saturated;
use super::status::RateStatus;
use super::summary::print_summary;
use crate::report::results::{ResultRow, RunContext, Source};

/// Columns of the CSV: the reference's, then `saturated`.
const COLUMNS: &[&str] = &[
    "run_timestamp",
    "arrival_rate",
    "prompt_regime",
    "total_requests",
    "successful",
    "errors",
    "timeouts",
    "success_rate",
    "error_rate",
    "prompt_tokens_min",
    "prompt_tokens_max",
    "prompt_tokens_mean",
    "ttft_min",
    "ttft_median",
    "ttft_mean",
    "ttft_p90",
    "ttft_p99",
    "ttft_max",
    "latency_min",
    "latency_median",
    "latency_mean",
    "latency_p90",
    "latency_p99",
    "latency_max",
    "status",
    "saturated",
];

/// A CSV that belongs to something else.
#[derive(Debug, thiserror::Error)]
pub enum RatesError {
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Other columns.
    #[error("{} has another header than probe's ({}): write to another file", path.display(), COLUMNS.join(","))]
    Header {
        /// The file.
        path: PathBuf,
    },
}

/// One rate.
#[derive(Clone, Debug)]
pub struct RateSummary {
    rate: f64,
    row: ResultRow,
    lag: Lag,
    faults: BTreeMap<String, u64>,
    status: RateStatus,
}

impl RateSummary {
    /// Of a run at `rate` arrivals a second.
    pub fn of(outcome: &LoadOutcome, rate: f64, regime: &str, total_loras: u32) -> Self {
        let run = RunContext {
            arrival_rate: Some(rate),
            duration_seconds: Some(outcome.wall_s),
            saturated: saturated(&outcome.records),
            ..RunContext::new(Source::Measured, total_loras, 0, regime)
        };
        let row = ResultRow::from_records(&outcome.records, &run);
        let status = RateStatus::of(row.error_rate.unwrap_or(100.0), row.ttft_median, row.ttft_p99);
        Self { rate, row, lag: outcome.lag, faults: outcome.faults.clone(), status }
    }

    /// The reference's verdict.
    pub fn status(&self) -> RateStatus {
        self.status
    }

    /// Prints the summary and what the reference calls the assessment.
    pub fn print(&self) {
        let title = format!("SUMMARY (arrival_rate={} rps, regime={})", self.rate, self.row.prompt_regime);
        print_summary(&title, &self.row, &self.lag, &self.faults);
        print!("{}", self.assessment());
    }

    fn assessment(&self) -> String {
        let line = "=".repeat(60);
        let mut text = format!("\n{line}\nASSESSMENT:\n");
        let mut issues = String::new();
        let mut say = |good: bool, fine: String, wrong: String| {
            // Writing to a string cannot fail.
            let _ = if good { writeln!(text, "  ✓ {fine}") } else { writeln!(issues, "    ✗ {wrong}") };
        };
        let errors = self.row.error_rate.unwrap_or(100.0);
        say(
            errors <= 1.0,
            format!("Error rate OK ({errors:.2}% < 1%)"),
            format!("Error rate too high ({errors:.1}% > 1%)"),
        );
        if let (Some(median), Some(p99)) = (self.row.ttft_median, self.row.ttft_p99) {
            let ratio = if median > 0.0 { p99 / median } else { 0.0 };
            say(
                p99 <= 5.0 * median,
                format!("TTFT variance OK (p99/median = {ratio:.1}x)"),
                format!("TTFT variance too high (p99/median = {ratio:.1}x > 5x)"),
            );
            let ms = p99 * 1e3;
            say(
                p99 <= 10.0,
                format!("TTFT p99 reasonable ({ms:.0}ms)"),
                format!("TTFT p99 too high ({ms:.0}ms > 10s)"),
            );
        }
        if self.row.saturated == Some(true) {
            issues += "    ✗ Saturated: the number of requests in flight kept growing\n";
        }
        let rate = self.rate;
        text += &if issues.is_empty() {
            format!("\n  → This arrival rate ({rate} rps) looks ACCEPTABLE\n")
        } else {
            format!("\n  Issues found:\n{issues}\n  → This arrival rate ({rate} rps) may be TOO HIGH\n")
        };
        text + &format!("{line}\n\n")
    }

    /// As an object: what is not known is left out.
    pub fn json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("type".to_owned(), "summary".into());
        for (column, value) in COLUMNS.iter().zip(self.values()) {
            if !value.is_null() {
                map.insert((*column).to_owned(), value);
            }
        }
        map.insert("client_lag".to_owned(), json!(self.lag));
        map.insert("errors_by_kind".to_owned(), json!(self.faults));
        map
    }

    /// The values of [`COLUMNS`].
    fn values(&self) -> Vec<Value> {
        let row = json!(self.row);
        let own = |column: &str| match column {
            "status" => json!(self.status),
            column => row[column].clone(),
        };
        COLUMNS.iter().map(|column| own(column)).collect()
    }
}

/// The table over all rates, with a recommendation.
pub fn comparison(regime: &str, summaries: &[RateSummary]) -> String {
    let line = "=".repeat(80);
    let mut text = format!("\n{line}\nCOMPARATIVE SUMMARY ({regime} prompts)\n{line}\n");
    text += &format!(
        "{:>8} | {:>8} | {:>8} | {:>10} | {:>10} | {:>10} | {:>12}\n",
        "Rate", "Success%", "Tokens", "TTFT Med", "TTFT P99", "Lat Med", "Status"
    );
    let dashes: Vec<String> = [8, 8, 8, 10, 10, 10, 12].map(|n| "-".repeat(n)).into();
    text += &format!("{}\n", dashes.join("-+-"));
    for s in summaries {
        let ms = |seconds: Option<f64>| seconds.unwrap_or(f64::NAN) * 1e3;
        // Beside the reference's columns, so that an `OK` which only hides a growing queue is seen.
        let beside = if s.row.saturated == Some(true) { "  saturated" } else { "" };
        text += &format!(
            "{:>8.1} | {:>7.1}% | {:>8.0} | {:>8.1}ms | {:>8.1}ms | {:>8.1}ms | {:>12}{beside}\n",
            s.rate,
            s.row.success_rate.unwrap_or_default(),
            s.row.prompt_tokens_mean.unwrap_or_default(),
            ms(s.row.ttft_median),
            ms(s.row.ttft_p99),
            ms(s.row.latency_median),
            s.status,
        );
    }
    text += &format!("{line}\n\n");
    let good = summaries.iter().filter(|s| s.status == RateStatus::Ok && s.row.saturated != Some(true));
    text + &match good.map(|s| s.rate).max_by(f64::total_cmp) {
        Some(best) => format!("Recommendation: {best} rps, the highest rate that is OK and not saturated.\n"),
        None => "Recommendation: no rate is OK and not saturated: try lower ones.\n".to_owned(),
    }
}

/// Lines to append to a JSONL file: metadata, then a summary a rate.
pub fn jsonl(metadata: &Map<String, Value>, summaries: &[Value], there: bool) -> String {
    let mut text = String::new();
    if there {
        text += &format!("\n# === New run: {} ===\n", run_timestamp(metadata.get("run_timestamp")));
    }
    text += &format!("{}\n", Value::Object(metadata.clone()));
    summaries.iter().fold(text, |text, summary| text + &format!("{summary}\n"))
}

/// Lines to append to a CSV file: the header for a new one, a comment that tells runs apart for another.
pub fn csv(summaries: &[RateSummary], there: bool) -> String {
    let mut text = if there {
        let stamp = summaries.first().map(|s| s.row.run_timestamp.as_str()).unwrap_or_default();
        format!("# --- New run: {stamp} ---\n")
    } else {
        format!("{}\n", COLUMNS.join(","))
    };
    for summary in summaries {
        let cells: Vec<String> = summary.values().iter().map(cell).collect();
        text += &format!("{}\n", cells.join(","));
    }
    text
}

/// Refuses a CSV whose header is not probe's. A file that is not there is fine.
pub fn check_csv(path: &Path) -> Result<(), RatesError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RatesError::Read { path: path.to_owned(), source }),
    };
    let header = text.lines().find(|l| !l.starts_with('#') && !l.trim().is_empty());
    match header {
        Some(header) if header.trim_end() != COLUMNS.join(",") => {
            Err(RatesError::Header { path: path.to_owned() })
        }
        _ => Ok(()),
    }
}

fn run_timestamp(value: Option<&Value>) -> &str {
    value.and_then(Value::as_str).unwrap_or_default()
}

/// A value as CSV holds it; a name with a comma or a quote is quoted.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::{RequestRecord, Status};

    /// 200 requests, one a second, with this TTFT in seconds and so many errors.
    fn summary(rate: f64, ttft: f64, errors: u64) -> RateSummary {
        let records: Vec<RequestRecord> = (0..200)
            .map(|id| RequestRecord {
                id,
                adapter: Some(0),
                rank: None,
                prompt_tokens: 512,
                output_tokens: 16,
                scheduled_s: id as f64,
                sent_s: id as f64,
                first_s: Some(id as f64 + ttft),
                last_s: Some(id as f64 + 2.0 * ttft),
                ttft_s: Some(ttft),
                latency_s: Some(2.0 * ttft),
                status: if id < errors { Status::Error } else { Status::Ok },
                parts: None,
                error: None,
            })
            .collect();
        let outcome = LoadOutcome {
            records,
            token_times: Vec::new(),
            faults: BTreeMap::new(),
            lag: Lag::default(),
            wall_s: 200.0,
            cut_short: None,
        };
        RateSummary::of(&outcome, rate, "short", 128)
    }

    #[test]
    fn the_table_is_the_references_to_the_byte() {
        let text = comparison("short", &[summary(0.5, 0.0452, 0), summary(8.0, 0.5678, 5)]);
        let expected = "\
            ================================================================================\n\
            COMPARATIVE SUMMARY (short prompts)\n\
            ================================================================================\n    \
                Rate | Success% |   Tokens |   TTFT Med |   TTFT P99 |    Lat Med |       Status\n\
            ---------+----------+----------+------------+------------+------------+-------------\n     \
                 0.5 |   100.0% |      512 |     45.2ms |     45.2ms |     90.4ms |           OK\n     \
                 8.0 |    97.5% |      512 |    567.8ms |    567.8ms |   1135.6ms |     TOO HIGH\n\
            ================================================================================\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("Recommendation: 0.5 rps"), "{text}");
    }

    #[test]
    fn files_are_appended_as_the_reference_does() {
        let summaries = [summary(2.0, 0.1, 0)];
        let fresh = csv(&summaries, false);
        let lines: Vec<&str> = fresh.lines().collect();
        assert!(lines[0].starts_with("run_timestamp,arrival_rate,prompt_regime,total_requests"));
        assert_eq!(lines[1].split(',').count(), COLUMNS.len());
        assert!(lines[1].ends_with(",OK,false"), "{}", lines[1]);
        assert!(csv(&summaries, true).starts_with("# --- New run: 2"));
        let mut metadata = Map::new();
        metadata.insert("type".to_owned(), "metadata".into());
        let objects = [Value::Object(summaries[0].json())];
        let text = jsonl(&metadata, &objects, true);
        assert!(text.starts_with("\n# === New run: "));
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(
            (&last["type"], &last["status"], &last["successful"]),
            (&json!("summary"), &json!("OK"), &json!(200))
        );
    }

    #[test]
    fn a_csv_of_something_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.csv");
        assert!(check_csv(&path).is_ok());
        std::fs::write(&path, csv(&[summary(1.0, 0.1, 0)], false)).unwrap();
        assert!(check_csv(&path).is_ok());
        std::fs::write(&path, "a,b\n1,2\n").unwrap();
        let error = check_csv(&path).unwrap_err().to_string();
        assert!(error.contains("p.csv has another header"), "{error}");
    }

    #[test]
    fn a_rate_without_successes_has_a_summary_all_the_same() {
        let failed = summary(4.0, 0.1, 200);
        assert_eq!(failed.status(), RateStatus::TooHigh);
        assert!(comparison("short", std::slice::from_ref(&failed)).contains("TOO HIGH"));
        assert!(!failed.json().contains_key("ttft_median"));
        assert!(failed.assessment().contains("100.0% > 1%"), "{}", failed.assessment());
    }
}
