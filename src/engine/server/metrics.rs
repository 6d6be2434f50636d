//! `GET /metrics`: Prometheus text, under vLLM's names where it has one.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::State;
use crate::engine::{EngineStats, SlotView};

pub(super) async fn metrics(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let (engine, info) = state.loaded()?;
    let text = render(&engine.stats(), &info.model);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

fn render(s: &EngineStats, model: &str) -> String {
    let model = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let comma = if labels.is_empty() { "" } else { "," };
            let _ = writeln!(out, "{name}{{model_name=\"{model}\"{comma}{labels}}} {value}");
        }
    };
    let n = |v: u64| v as f64;
    let seconds = |ns: u64| ns as f64 * 1e-9;
    family("vllm:num_requests_running", "gauge", "Requests running.", &[("", n(s.running))]);
    family("vllm:num_requests_waiting", "gauge", "Requests waiting.", &[("", n(s.waiting))]);
    let usage = if s.kv_total == 0 { 0.0 } else { n(s.kv_used) / n(s.kv_total) };
    family("vllm:kv_cache_usage_perc", "gauge", "KV cache usage, 1 is full.", &[("", usage)]);
    family("vllm:prompt_tokens_total", "counter", "Prompt tokens taken.", &[("", n(s.prompt_tokens))]);
    family("vllm:generation_tokens_total", "counter", "Tokens made.", &[("", n(s.generation_tokens))]);
    let ended = [
        ("finished_reason=\"stop\"", n(s.finished_stop)),
        ("finished_reason=\"length\"", n(s.finished_length)),
        ("finished_reason=\"abort\"", n(s.cancelled)),
    ];
    family("vllm:request_success_total", "counter", "Requests ended, by reason.", &ended);
    family("vllm:num_preemptions_total", "counter", "Preemptions.", &[("", n(s.preempted))]);
    family("lora_hbm:requests_refused_total", "counter", "Requests refused.", &[("", n(s.refused))]);
    family("lora_hbm:steps_total", "counter", "Forward passes.", &[("", n(s.steps))]);
    family("lora_hbm:swaps_total", "counter", "Adapters copied into slots.", &[("", n(s.swaps))]);
    family("lora_hbm:swap_bytes_total", "counter", "Bytes copied into slots.", &[("", n(s.swap_bytes))]);
    family("lora_hbm:swap_seconds_total", "counter", "Time of swaps.", &[("", seconds(s.swap_ns))]);
    family("lora_hbm:adapters", "gauge", "Adapters that requests may name.", &[("", n(s.adapters))]);
    family("lora_hbm:disk_loads_total", "counter", "Adapters read from disk.", &[("", n(s.fetches))]);
    family("lora_hbm:disk_loads_failed_total", "counter", "Reads that failed.", &[("", n(s.fetches_failed))]);
    family("lora_hbm:disk_load_bytes_total", "counter", "Bytes read from disk.", &[("", n(s.fetch_bytes))]);
    family("lora_hbm:disk_load_seconds_total", "counter", "Time of reads.", &[("", seconds(s.fetch_ns))]);
    family("lora_hbm:requests_failed_total", "counter", "Adapter unreadable.", &[("", n(s.failed))]);
    family("lora_hbm:first_tokens_total", "counter", "First tokens.", &[("", n(s.first_tokens))]);
    let [front, queue, kv, slot, swap, prefill] = s.parts_ns.map(seconds);
    let parts = [
        ("part=\"front\"", front),
        ("part=\"queue\"", queue),
        ("part=\"kv\"", kv),
        ("part=\"slot\"", slot),
        ("part=\"swap\"", swap),
        ("part=\"prefill\"", prefill),
    ];
    family("lora_hbm:ttft_part_seconds_total", "counter", "Time to first token, by cause.", &parts);
    let resident: Vec<String> = s
        .slots
        .iter()
        .enumerate()
        .filter_map(|(i, view)| match view {
            SlotView::Resident(a) => Some(format!("adapter=\"{a}\",slot=\"{i}\"")),
            SlotView::Free | SlotView::Loading(_) => None,
        })
        .collect();
    let samples: Vec<(&str, f64)> = resident.iter().map(|l| (l.as_str(), 1.0)).collect();
    family("lora_hbm:adapter_resident", "gauge", "1 for each adapter in a slot.", &samples);
    out
}

#[cfg(test)]
mod tests {
    use lora_sched::AdapterId;

    use super::*;

    #[test]
    fn residency_and_parts_are_told_with_labels() {
        let stats = EngineStats {
            parts_ns: [0, 500_000_000, 0, 0, 0, 0],
            slots: vec![SlotView::Loading(AdapterId(1)), SlotView::Resident(AdapterId(7))],
            ..EngineStats::default()
        };
        let text = render(&stats, "a\"b");
        assert!(
            text.contains("lora_hbm:adapter_resident{model_name=\"a\\\"b\",adapter=\"7\",slot=\"1\"} 1\n")
        );
        assert!(
            text.contains("lora_hbm:ttft_part_seconds_total{model_name=\"a\\\"b\",part=\"queue\"} 0.5\n")
        );
        assert!(!text.contains("adapter=\"1\""));
    }
}
