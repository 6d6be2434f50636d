use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;

use super::*;
use crate::workload::gguf::tests::write;

const HIDDEN: usize = 32;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const VOCAB: usize = 64;

type Tensor = (String, Vec<f32>, Vec<usize>, GgmlDType);

fn metadata() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(64)),
        ("llama.attention.head_count", Value::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(100_000.0)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ]
}

/// Every value of a row is the row's number.
fn numbered(name: &str, rows: usize, cols: usize, format: GgmlDType) -> Tensor {
    let values = (0..rows * cols).map(|i| (i / cols) as f32).collect();
    (name.to_owned(), values, vec![rows, cols], format)
}

fn tensors() -> Vec<Tensor> {
    let vector = |name: &str, n| (name.to_owned(), vec![1.0; n], vec![n], GgmlDType::F32);
    let q8 = GgmlDType::Q8_0;
    vec![
        numbered("token_embd.weight", VOCAB, HIDDEN, q8),
        vector("output_norm.weight", HIDDEN),
        vector("blk.0.attn_norm.weight", HIDDEN),
        vector("blk.0.ffn_norm.weight", HIDDEN),
        numbered("blk.0.attn_q.weight", HEADS * HEAD_DIM, HIDDEN, GgmlDType::F32),
        numbered("blk.0.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN, GgmlDType::F16),
        numbered("blk.0.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN, q8),
        numbered("blk.0.attn_output.weight", HIDDEN, HEADS * HEAD_DIM, q8),
        numbered("blk.0.ffn_gate.weight", 64, HIDDEN, q8),
        numbered("blk.0.ffn_up.weight", 64, HIDDEN, q8),
        numbered("blk.0.ffn_down.weight", HIDDEN, 64, q8),
    ]
}

fn open(metadata: &[(&str, Value)], tensors: &[Tensor]) -> Result<(ModelSpec, GgufWeights), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    write(&path, metadata, tensors);
    GgufWeights::open("small", &path).map_err(|e| {
        let message = e.to_string();
        assert!(message.contains("small.gguf"), "{message}");
        message
    })
}

#[test]
fn the_shape_comes_from_the_metadata() {
    let (spec, weights) = open(&metadata(), &tensors()).unwrap();
    assert_eq!((spec.hidden, spec.heads, spec.kv_heads, spec.head_dim), (HIDDEN, HEADS, KV_HEADS, HEAD_DIM));
    assert_eq!((spec.layers, spec.vocab_size, spec.max_positions), (1, VOCAB, 128));
    assert_eq!((spec.bos, spec.eos, spec.tie_embeddings), (Some(1), vec![2], true));
    assert_eq!((spec.norm_eps, spec.rope_theta), (1e-5, 1e5));
    assert!(weights.has("model.layers.0.mlp.up_proj.weight"));
    assert!(!weights.has("model.layers.1.mlp.up_proj.weight") && !weights.has("lm_head.weight"));
    let untied = [tensors(), vec![numbered("output.weight", VOCAB, HIDDEN, GgmlDType::Q8_0)]].concat();
    assert!(!open(&metadata(), &untied).unwrap().0.tie_embeddings);
}

#[test]
fn rows_of_queries_and_keys_are_put_back_in_halves() {
    let (_, weights) = open(&metadata(), &tensors()).unwrap();
    let rows = |name: &str, rows: usize| -> Vec<f32> {
        let values =
            weights.read(&format!("model.layers.0.self_attn.{name}.weight"), &[rows, HIDDEN]).unwrap();
        values.chunks_exact(HIDDEN).map(|row| row[HIDDEN - 1].round()).collect()
    };
    // llama.cpp's converter: reshape(heads, 2, dim / 2).swapaxes(1, 2); here is its inverse.
    let head = [0, 2, 4, 6, 1, 3, 5, 7].map(|v| v as f32);
    let expected = |heads: usize| -> Vec<f32> {
        (0..heads).flat_map(|h| head.map(|v| v + (h * HEAD_DIM) as f32)).collect()
    };
    assert_eq!(rows("q_proj", HEADS * HEAD_DIM), expected(HEADS));
    assert_eq!(rows("k_proj", KV_HEADS * HEAD_DIM), expected(KV_HEADS));
    let in_order: Vec<f32> = (0..KV_HEADS * HEAD_DIM).map(|v| v as f32).collect();
    assert_eq!(rows("v_proj", KV_HEADS * HEAD_DIM), in_order);
}

#[test]
fn rope_scaling_is_read_by_name_or_as_divisors() {
    let mut linear = metadata();
    linear.push(("llama.rope.scaling.type", Value::String("linear".into())));
    assert!(open(&linear, &tensors()).unwrap_err().contains("no llama.rope.scaling.factor"));
    linear.push(("llama.rope.scaling.factor", Value::F32(4.0)));
    assert_eq!(open(&linear, &tensors()).unwrap().0.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    let divisors = vec![1.0, 1.0, 8.0, 8.0];
    let more = vec![("rope_freqs.weight".to_owned(), divisors.clone(), vec![HEAD_DIM / 2], GgmlDType::F32)];
    let with = [tensors(), more].concat();
    assert_eq!(open(&metadata(), &with).unwrap().0.rope_scaling, RopeScaling::Divisors(divisors));
    assert!(open(&linear, &with).unwrap_err().contains("rope_freqs.weight"));
}

#[test]
fn what_the_engine_does_not_run_is_named() {
    let with = |key: &'static str, value: Value| {
        let mut all = metadata();
        all.retain(|(k, _)| *k != key);
        all.push((key, value));
        open(&all, &tensors()).unwrap_err()
    };
    for (key, value, said) in [
        ("general.architecture", Value::String("qwen2".into()), "architecture qwen2"),
        ("llama.expert_count", Value::U32(8), "expert_count 8"),
        ("llama.rope.dimension_count", Value::U32(4), "rope.dimension_count 4"),
        ("llama.rope.scaling.type", Value::String("yarn".into()), "yarn"),
        ("llama.block_count", Value::U32(0), "block_count 0"),
        ("llama.attention.head_count_kv", Value::U32(3), "3 key/value heads"),
        ("llama.embedding_length", Value::String("wide".into()), "embedding_length is not a whole number"),
    ] {
        let message = with(key, value);
        assert!(message.contains(said), "{key}: {message}");
    }
    let mut less = metadata();
    less.retain(|(key, _)| *key != "llama.context_length");
    assert!(open(&less, &tensors()).unwrap_err().contains("no llama.context_length"));
    let norm = vec![("blk.0.attn_q_norm.weight".to_owned(), vec![1.0; 8], vec![8], GgmlDType::F32)];
    assert!(open(&metadata(), &[tensors(), norm].concat()).unwrap_err().contains("attn_q_norm"));
    let bias = vec![("blk.0.attn_q.bias".to_owned(), vec![1.0; 32], vec![32], GgmlDType::F32)];
    assert!(open(&metadata(), &[tensors(), bias].concat()).unwrap_err().contains("biases on some"));
}

#[test]
fn tensors_of_another_shape_are_refused_with_both() {
    let (_, weights) = open(&metadata(), &tensors()).unwrap();
    let error = weights.read("model.layers.0.mlp.up_proj.weight", &[64, 16]).unwrap_err().to_string();
    assert!(
        error.contains("blk.0.ffn_up.weight") && error.contains("[64, 32]") && error.contains("[64, 16]")
    );
    let error = weights.read("lm_head.weight", &[VOCAB, HIDDEN]).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight is missing"), "{error}");
}
