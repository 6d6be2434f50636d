//! Models and adapters as they lie in folders: shards, number formats, tied embeddings, patterns.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use lora_hbm::engine::adapters::HostPool;
use lora_hbm::engine::batch::BatchLimits;
use lora_hbm::engine::model::{DummyWeights, resolve};
use serde_json::{Value, json};

use crate::rig::{Reference, Rig, Share, distance};

const LIMITS: BatchLimits = BatchLimits {
    max_num_seqs: 4,
    max_num_batched_tokens: 64,
    max_model_len: 96,
    block_size: 8,
    kv_blocks: 32,
};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama")
}

fn tensors(file: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

/// The fixture's configuration with these fields.
fn config(fields: &[(&str, Value)]) -> String {
    let text = std::fs::read_to_string(fixture().join("model/config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in fields {
        json[*field] = value.clone();
    }
    json.to_string()
}

/// Logits of the base model in `folder` after these tokens.
fn logits(folder: &Path) -> Vec<f32> {
    let model = resolve(folder.to_str().unwrap(), DummyWeights::Never, 0).unwrap();
    let pool = HostPool::empty(&model.spec, 1);
    let mut rig = Rig::of(model, pool, 1, 1, LIMITS);
    rig.step(&[Share { place: 0, who: None, start: 0, tokens: Some(&[5, 9, 41, 7, 88, 3, 3, 60]) }]);
    rig.executor.logits(0).unwrap().to_vec()
}

#[test]
fn a_sharded_checkpoint_gives_the_logits_of_the_whole_one() {
    let whole = fixture().join("model");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config(&[])).unwrap();
    // Every second tensor in the second shard; the index says where each is.
    let mut names: Vec<_> = tensors(&whole.join("model.safetensors")).into_iter().collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    let mut map = serde_json::Map::new();
    let mut shards = [HashMap::new(), HashMap::new()];
    for (i, (name, tensor)) in names.into_iter().enumerate() {
        map.insert(name.clone(), format!("model-{:05}-of-00002.safetensors", i % 2 + 1).into());
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        let file = dir.path().join(format!("model-{:05}-of-00002.safetensors", i + 1));
        candle_core::safetensors::save(shard, file).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_eq!(logits(dir.path()), logits(&whole));

    // A shard that lacks a tensor is named by the tensor.
    shards[1].remove("model.layers.1.mlp.up_proj.weight");
    shards[0].remove("model.layers.1.mlp.up_proj.weight");
    for (i, shard) in shards.iter().enumerate() {
        let file = dir.path().join(format!("model-{:05}-of-00002.safetensors", i + 1));
        candle_core::safetensors::save(shard, file).unwrap();
    }
    let model = resolve(dir.path().to_str().unwrap(), DummyWeights::Never, 0).unwrap();
    let error = rig_error(model);
    assert!(error.contains("model.layers.1.mlp.up_proj.weight is missing"), "{error}");
}

/// Why no executor can be made of a model.
fn rig_error(model: lora_hbm::engine::model::Model) -> String {
    let adapters = std::sync::Arc::new(HostPool::empty(&model.spec, 1));
    let made = lora_hbm::engine::cpu::cpu_executor(lora_hbm::engine::cpu::CpuOptions {
        limits: LIMITS,
        spec: model.spec,
        weights: model.weights,
        loaded: Default::default(),
        adapters,
        gpu_loras: 1,
        swap_mode: lora_sched::SwapMode::Layered,
        threads: 1,
        allowed_tokens: None,
        keep_logits: true,
    });
    made.err().expect("the model is not whole").to_string()
}

#[test]
fn number_formats_and_tied_embeddings_give_the_same_model() {
    let original = tensors(&fixture().join("model/model.safetensors"));
    let save = |dtype: DType, tied: bool| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config(&[("tie_word_embeddings", tied.into())]))
            .unwrap();
        let mut all: HashMap<_, _> =
            original.iter().map(|(name, t)| (name.clone(), t.to_dtype(dtype).unwrap())).collect();
        let embeddings = all["model.embed_tokens.weight"].clone();
        if tied {
            all.remove("lm_head.weight");
        } else {
            all.insert("lm_head.weight".into(), embeddings);
        }
        candle_core::safetensors::save(&all, dir.path().join("model.safetensors")).unwrap();
        dir
    };
    let wide = logits(save(DType::F32, false).path());
    // The fixture's values are bf16 ones, which f32 holds, and f16 nearly does.
    assert_eq!(logits(save(DType::BF16, false).path()), wide);
    assert!(distance(&logits(save(DType::F16, false).path()), &wide) < 1e-2);
    assert_eq!(logits(save(DType::F32, true).path()), wide);
}

#[test]
fn linear_rope_scaling_is_what_slower_positions_give() {
    let folder = |fields: &[(&str, Value)]| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config(fields)).unwrap();
        std::fs::copy(fixture().join("model/model.safetensors"), dir.path().join("model.safetensors"))
            .unwrap();
        dir
    };
    let unscaled = logits(folder(&[]).path());
    let scaled = |factor: f64| {
        logits(folder(&[("rope_scaling", json!({"rope_type": "linear", "factor": factor}))]).path())
    };
    assert_eq!(scaled(1.0), unscaled);
    assert!(distance(&scaled(4.0), &unscaled) > 1e-2, "the factor has no effect");
}

#[test]
fn adapters_with_patterns_of_modules_ranks_and_alphas_give_pefts_logits() {
    const NAMES: [&str; 2] = ["all", "pattern"];
    let reference = Reference::open_inside("llama", "patterns", &NAMES);
    let model = resolve(fixture().join("model").to_str().unwrap(), DummyWeights::Never, 0).unwrap();
    let pool = HostPool::load(&model.spec, 16, &fixture().join("patterns"), None).unwrap();
    let ranks: Vec<u32> = pool.specs().iter().map(|s| s.rank).collect();
    assert_eq!(ranks, [2, 12], "the largest rank of any module");
    let mut rig = Rig::of(model, pool, 2, 1, LIMITS);
    for (who, name) in NAMES.iter().enumerate() {
        rig.in_chunks(&reference, Some(who), 16, |position, got, want| {
            let off = distance(got, want);
            assert!(off < 1e-4, "{name}, position {position}: off by {off}");
        });
    }
}
