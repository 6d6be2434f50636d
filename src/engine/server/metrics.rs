//! `GET /metrics`: Prometheus text, under vLLM's names where it has one.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State as Shared;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use lora_sched::AdapterId;

use super::error::ApiError;
use super::observed::{AdapterPhase, Observed};
use super::state::{State, unix_seconds};
use crate::engine::adapters::AdapterView;
use crate::engine::{EngineStats, SlotView};

pub(super) async fn metrics(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let (engine, info) = state.loaded()?;
    let model = format!("model_name=\"{}\"", escaped(&info.model));
    let name =
        |adapter: AdapterId| escaped(&engine.adapter_name(adapter).unwrap_or_else(|| adapter.to_string()));
    let mut text = of_engine(&engine.stats(), &model, name);
    text += &of_adapters(&engine.adapters(), &model);
    text += &of_server(&state.observed, &model, info.gpu_loras, name);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// A label's value.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Appends a family.
fn family<L: AsRef<str>>(
    out: &mut String,
    (name, kind, help): (&str, &str, &str),
    model: &str,
    samples: &[(L, f64)],
) {
    // Writing into a string cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let labels = labels.as_ref();
        let comma = if labels.is_empty() { "" } else { "," };
        let _ = writeln!(out, "{name}{{{model}{comma}{labels}}} {value}");
    }
}

/// What the engine counts.
fn of_engine(s: &EngineStats, model: &str, adapter: impl Fn(AdapterId) -> String) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
        family(&mut out, (name, kind, help), model, samples);
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
    let mut resident = Vec::new();
    for (slot, view) in s.slots.iter().enumerate() {
        if let SlotView::Resident(a) = *view {
            resident.push((format!("adapter=\"{}\",slot=\"{slot}\"", adapter(a)), 1.0));
        }
    }
    let (name, help) = ("lora_hbm:adapter_resident", "1 for each adapter in a slot.");
    self::family(&mut out, (name, "gauge", help), model, &resident);
    out
}

/// What is known of each adapter.
fn of_adapters(adapters: &[AdapterView], model: &str) -> String {
    let mut out = String::new();
    type Value = fn(&AdapterView) -> u64;
    let families: [(&str, &str, &str, Value); 4] = [
        ("lora_hbm:adapter_requests_total", "counter", "Requests taken, by adapter.", |a| a.requests),
        ("lora_hbm:adapter_hits_total", "counter", "Requests whose adapter was there.", |a| a.hits),
        ("lora_hbm:adapter_swaps_total", "counter", "Copies into slots, by adapter.", |a| a.swaps),
        ("lora_hbm:adapter_pins", "gauge", "Requests that hold its slot.", |a| a.pinned_by.into()),
    ];
    for (name, kind, help, value) in families {
        let sample = |a: &AdapterView| (format!("adapter=\"{}\"", escaped(&a.name)), value(a) as f64);
        let samples: Vec<_> = adapters.iter().map(sample).collect();
        family(&mut out, (name, kind, help), model, &samples);
    }
    let tier =
        |a: &AdapterView| (format!("adapter=\"{}\",tier=\"{}\"", escaped(&a.name), a.tier.as_str()), 1.0);
    let tiers: Vec<_> = adapters.iter().map(tier).collect();
    let help = "1 for each adapter where it is: slot, loading, host or disk.";
    family(&mut out, ("lora_hbm:adapter_tier", "gauge", help), model, &tiers);
    out
}

/// What the server sees.
fn of_server(o: &Observed, model: &str, slots: usize, adapter: impl Fn(AdapterId) -> String) -> String {
    let mut out = String::new();
    for (name, help, histogram) in [
        ("vllm:time_to_first_token_seconds", "Receipt to the first token handed over.", &o.ttft),
        ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", &o.inter_token),
        ("vllm:e2e_request_latency_seconds", "Receipt to the last token handed over.", &o.e2e),
        ("vllm:request_queue_time_seconds", "Waiting for a place, blocks, a slot or a copy.", &o.queue),
        ("vllm:request_prefill_time_seconds", "The prompt in steps.", &o.prefill),
        ("vllm:request_decode_time_seconds", "First token to the last.", &o.decode),
        ("vllm:request_prompt_tokens", "Prompt tokens of sequences that ended.", &o.prompt_tokens),
        ("vllm:request_generation_tokens", "Output tokens of sequences that ended.", &o.output_tokens),
        ("lora_hbm:request_swap_time_seconds", "Waiting for the copy of the adapter alone.", &o.swap),
    ] {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        histogram.render(&mut out, name, model);
    }
    let names = |phase| {
        let names: Vec<String> = o.adapters_in(phase).into_iter().map(&adapter).collect();
        names.join(",")
    };
    let labels = format!(
        "max_lora=\"{slots}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"",
        names(AdapterPhase::Running),
        names(AdapterPhase::Waiting)
    );
    let help = "Adapters of open requests; the value is the time of the scrape.";
    family(&mut out, ("vllm:lora_requests_info", "gauge", help), model, &[(labels, unix_seconds() as f64)]);
    let responses: Vec<(String, f64)> = o
        .responses()
        .into_iter()
        .map(|((path, status), n)| (format!("path=\"{path}\",status=\"{status}\""), n as f64))
        .collect();
    let help = "Answers begun, by path and status.";
    family(&mut out, ("lora_hbm:http_responses_total", "counter", help), model, &responses);
    let abandoned = [("", o.abandoned_so_far() as f64)];
    let help = "Sequences whose client went before their ends.";
    family(&mut out, ("lora_hbm:client_disconnects_total", "counter", help), model, &abandoned);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "model_name=\"m\"";

    #[test]
    fn residency_and_parts_are_told_with_labels() {
        let stats = EngineStats {
            parts_ns: [0, 500_000_000, 0, 0, 0, 0],
            slots: vec![SlotView::Loading(AdapterId(1)), SlotView::Resident(AdapterId(7)), SlotView::Free],
            ..EngineStats::default()
        };
        let text = of_engine(&stats, MODEL, |a| format!("lora-{a}"));
        for line in [
            "lora_hbm:adapter_resident{model_name=\"m\",adapter=\"lora-7\",slot=\"1\"} 1\n",
            "lora_hbm:ttft_part_seconds_total{model_name=\"m\",part=\"queue\"} 0.5\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(!text.contains("slot=\"0\"") && !text.contains("slot=\"2\""));
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn open_requests_of_adapters_are_told_as_gateways_read_them() {
        let observed = Observed::new();
        for adapter in [1, 2, 3] {
            observed.adapter_enters(Some(AdapterId(adapter)));
        }
        observed.adapter_moves(Some(AdapterId(2)));
        let text = of_server(&observed, MODEL, 2, |a| format!("lora-{a}"));
        let info = "vllm:lora_requests_info{model_name=\"m\",max_lora=\"2\",running_lora_adapters=\"lora-2\",\
                    waiting_lora_adapters=\"lora-1,lora-3\"} ";
        assert!(text.contains(info), "{text}");
    }
}
