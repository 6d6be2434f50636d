//! The reference's printed summary of one run.

use std::collections::BTreeMap;

use super::lag::Lag;
use crate::report::results::ResultRow;

/// Prints counts, prompt tokens, TTFT and latency under a title, to standard output.
pub fn print_summary(title: &str, row: &ResultRow, lag: &Lag, faults: &BTreeMap<String, u64>) {
    let line = "=".repeat(60);
    println!("\n{line}\n{title}\n{line}");
    println!("\nRequest counts:");
    println!("  Total:      {}", row.total_requests);
    println!("  Successful: {}", row.successful);
    println!("  Errors:     {}", row.errors);
    println!("  Timeouts:   {}", row.timeouts);
    println!("  Error rate: {:.2}%", row.error_rate.unwrap_or_default());
    for (kind, count) in faults {
        println!("    {kind}: {count}");
    }
    if let (Some(min), Some(max), Some(mean)) =
        (row.prompt_tokens_min, row.prompt_tokens_max, row.prompt_tokens_mean)
    {
        println!("\nPrompt tokens:\n  Min:  {min}\n  Max:  {max}\n  Mean: {mean:.1}");
    }
    let ttft = [row.ttft_min, row.ttft_median, row.ttft_mean, row.ttft_p90, row.ttft_p99, row.ttft_max];
    times("TTFT (Time to First Token)", ttft);
    let latency = [
        row.latency_min,
        row.latency_median,
        row.latency_mean,
        row.latency_p90,
        row.latency_p99,
        row.latency_max,
    ];
    times("Latency (end-to-end)", latency);
    println!("\nClient lag (sent after scheduled): {lag}");
    match row.saturated {
        Some(true) => println!("Saturated: yes (the number of requests in flight kept growing)"),
        Some(false) => println!("Saturated: no"),
        None => println!("Saturated: unknown (too few requests to tell)"),
    }
}

/// Min, median, mean, p90, p99 and max in seconds, printed in milliseconds.
fn times(what: &str, values: [Option<f64>; 6]) {
    let names = ["Min:   ", "Median:", "Mean:  ", "P90:   ", "P99:   ", "Max:   "];
    if values[1].is_none() {
        return;
    }
    println!("\n{what}:");
    for (name, value) in names.iter().zip(values) {
        println!("  {name} {:.1} ms", value.unwrap_or(f64::NAN) * 1e3);
    }
}
