//! Requests a second of the simulator, end to end on one core: drawing the workload, the shared
//! scheduler, costs, statistics. The short regime with 16 output tokens, 128 adapters, budget 32,
//! at a fifth, four fifths and eleven tenths of the full budget's saturation rate.
//!
//! ```sh
//! cargo bench --no-default-features --bench simulator
//! ```
//!
//! Costs are lower bounds for Llama-2-7B on an H100 (its arithmetic and memory traffic over the
//! rates of the device): near enough to give a run the right number of steps a request. `PROFILE_OUT=FILE`
//! writes them as a profile, which says that nothing of it was measured; `REQUESTS=N` is a run's length.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_hbm::experiment::{EngineSettings, Simulator};
use lora_hbm::profile::{
    AdapterCosts, EngineFacts, Holdout, HostCosts, Kind, Profile, Quantiles, SCHEMA_VERSION, StepCosts,
    SwapCosts,
};
use lora_hbm::report::results::{RunContext, Source};
use lora_hbm::workload::arrivals::Arrivals;
use lora_hbm::workload::pool::PromptPool;
use lora_hbm::workload::popularity::Popularity;
use lora_hbm::workload::regime::Regime;
use lora_hbm::workload::spec::{Amount, Requests, WorkloadSpec};

/// 758 TFLOP/s of matrix products, 3.07 TB/s of memory, 54 GB/s of copies from the host.
fn floors() -> Profile {
    let features = ["step", "tokens:0-256", "tokens:256-", "prefill_pairs", "decode_context:0-", "adapters"];
    Profile {
        schema_version: SCHEMA_VERSION,
        kind: Kind::Scaled,
        created: "2026-01-01T00:00:00Z".to_owned(),
        tool: "bench".to_owned(),
        machine: serde_json::json!({ "note": "lower bounds, nothing measured" }),
        model: "llama-2-7b".to_owned(),
        adapter: AdapterCosts { ranks: vec![16], bytes: vec![80_000_000] },
        engine: EngineFacts {
            device: "cuda".to_owned(),
            dtype: "bfloat16".to_owned(),
            threads: 1,
            layers: 32,
            block_size: 16,
            kv_block_bytes: 16 * 524_288,
            weights_bytes: 13_200_000_000,
            workspace_bytes: 1_000_000_000,
            memory_bytes: Some(72_000_000_000),
            kv_memory_bytes: None,
            max_model_len: 4352,
            max_num_batched_tokens: 4096,
            max_num_seqs: 16,
        },
        step: StepCosts {
            features: features.map(str::to_owned).to_vec(),
            coef_ns: vec![4_300_000.0, 300.0, 17_090.0, 0.69, 170.7, 26_000.0],
        },
        swap: SwapCosts {
            fixed_s: 2e-5,
            bytes_per_s: 54e9,
            busy_bytes_per_s: 50e9,
            step_slowdown: 0.02,
            reading_s: 0.0,
        },
        host: HostCosts {
            loop_s: 5e-5,
            front_s: 1e-4,
            tokenize_s_per_byte: 1e-8,
            handover_s: 0.0,
            handover_bytes: 0.0,
            deliver_s: 5e-5,
            bytes_per_token: 4.0,
        },
        residuals: Quantiles::default(),
        holdout: Holdout::default(),
        samples_file: None,
        sha256: String::new(),
    }
    .signed()
}

fn workload(rate: f64, requests: u64) -> WorkloadSpec {
    WorkloadSpec {
        regime: Regime::Short,
        arrivals: Arrivals::Poisson,
        rate,
        popularity: Popularity::Uniform,
        total_loras: 128,
        amount: Amount::Requests(requests),
        max_tokens: 16,
        seed: 42,
        ranks: vec![16],
    }
}

fn engine(gpu_loras: u32) -> EngineSettings {
    EngineSettings { model: "llama-2-7b".to_owned(), max_r: 16, gpu_loras, ..EngineSettings::default() }
}

fn simulator(c: &mut Criterion) {
    let requests = std::env::var("REQUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(500_000);
    let simulator = Simulator::new(floors()).expect("a sound profile");
    let pool = PromptPool::embedded(Regime::Short);
    let full = simulator
        .saturation_rate_of(&engine(128), &workload(1.0, 200), &pool)
        .expect("a sound configuration");
    let context = RunContext::new(Source::Simulated, 128, 32, "short");
    let mut group = c.benchmark_group("simulate");
    group.throughput(Throughput::Elements(requests)).sample_size(10);
    for rho in [0.2, 0.8, 1.1] {
        let spec = workload(rho * full, requests);
        group.bench_with_input(BenchmarkId::new("rho", rho), &spec, |b, spec| {
            b.iter(|| {
                let drawn = Requests::new(spec, &pool).expect("a sound workload");
                simulator.stream(&engine(32), drawn, (requests as usize, 0), &context).expect("a sound run")
            });
        });
    }
    group.finish();
    if let Some(path) = std::env::var_os("PROFILE_OUT") {
        let text = serde_json::to_string_pretty(&floors()).expect("plain numbers");
        std::fs::write(path, text).expect("a writable path");
    }
}

criterion_group!(benches, simulator);
criterion_main!(benches);
