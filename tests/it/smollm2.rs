//! The real SmolLM2-135M-Instruct in its quantised GGUF file, against what `scripts/smollm2.py` computed with
//! transformers over the same file: tokenizer, chat template, logits and greedy tokens.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lora_hbm::engine::adapters::HostPool;
use lora_hbm::engine::batch::BatchLimits;
use lora_hbm::engine::model::{DummyWeights, resolve};
use lora_hbm::workload::tokenizer::{ChatTemplate, Message, Tokenizer};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::rig::{Rig, Share};

/// Absolute, in f32: thirty layers of products in another order. Logits are up to 31.
const TOLERANCE: f32 = 5e-4;

#[derive(Deserialize)]
struct Reference {
    sha256: String,
    stride: usize,
    prompts: BTreeMap<String, Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    messages: Option<Vec<Message>>,
    text: String,
    ids: Vec<u32>,
    greedy: Vec<u32>,
    greedy_text: String,
    least_margin: f32,
}

fn reference() -> (Reference, HashMap<String, Tensor>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/data");
    let text = std::fs::read_to_string(folder.join("smollm2.json")).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("smollm2.safetensors"), &Device::Cpu).unwrap();
    (serde_json::from_str(&text).unwrap(), tensors)
}

fn file(reference: &Reference) -> PathBuf {
    let path: PathBuf = std::env::var_os("LORA_HBM_SMOLLM2")
        .expect("LORA_HBM_SMOLLM2: the .gguf file that `lora-hbm fetch-data --smollm2` gets")
        .into();
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hash, reference.sha256, "{} is another file than the reference's", path.display());
    path
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in LORA_HBM_SMOLLM2"]
fn texts_and_chats_become_the_references_tokens_and_back() {
    let (reference, _) = reference();
    let tokenizer = Tokenizer::resolve(file(&reference).to_str()).unwrap();
    let template = ChatTemplate::of(&tokenizer).unwrap();
    assert!(template.said().ends_with(".gguf"), "{}", template.said());
    for (name, prompt) in &reference.prompts {
        let ids = match &prompt.messages {
            Some(messages) => {
                assert_eq!(template.render(messages, true).unwrap(), prompt.text, "{name}");
                template.encode(messages, true).unwrap()
            }
            None => tokenizer.encode(&prompt.text).unwrap(),
        };
        assert_eq!(ids, prompt.ids, "{name}");
        assert_eq!(tokenizer.decode(&prompt.greedy), prompt.greedy_text, "{name}");
        let mut stream = tokenizer.decode_stream_after(&prompt.ids);
        let mut streamed: String = prompt.greedy.iter().filter_map(|id| stream.push(*id)).collect();
        streamed += &stream.finish().unwrap_or_default();
        assert_eq!(streamed, prompt.greedy_text, "{name}");
    }
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in LORA_HBM_SMOLLM2"]
fn logits_and_greedy_tokens_are_the_references() {
    let (reference, tensors) = reference();
    let model = resolve(file(&reference).to_str().unwrap(), DummyWeights::Never, 0).unwrap();
    let pool = HostPool::empty(&model.spec, 1);
    let limits = BatchLimits {
        max_num_seqs: 6,
        max_num_batched_tokens: 256,
        max_model_len: 256,
        block_size: 16,
        kv_blocks: 96,
    };
    let mut rig = Rig::of(model, pool, 1, 1, limits);
    let strided = |logits: &[f32]| -> Vec<f32> { logits.iter().copied().step_by(reference.stride).collect() };
    for (name, prompt) in &reference.prompts {
        let want: Vec<Vec<f32>> = tensors[&format!("logits.{name}")].to_vec2().unwrap();
        let mut worst = 0f32;
        // The prompt at once, then a token at a time.
        let mut tokens = rig.step(&[Share { place: 0, who: None, start: 0, tokens: Some(&prompt.ids) }]);
        loop {
            let position = prompt.ids.len() + tokens.len() - 2;
            let got = strided(rig.executor.logits(0).unwrap());
            assert_eq!(got.len(), want[position].len());
            let off = got.iter().zip(&want[position]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            worst = worst.max(off);
            if tokens.len() == prompt.greedy.len() {
                break;
            }
            let start = prompt.ids.len() + tokens.len() - 1;
            tokens.extend(rig.step(&[Share { place: 0, who: None, start, tokens: None }]));
        }
        // All of it as one chunk of a longer prompt, beside nothing in the cache.
        let whole = [&prompt.ids[..], &prompt.greedy[..prompt.greedy.len() - 1]].concat();
        rig.step(&[Share { place: 1, who: None, start: 0, tokens: Some(&whole) }]);
        let last = strided(rig.executor.logits(0).unwrap());
        let at_once =
            last.iter().zip(&want[whole.len() - 1]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let size = want.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
        println!(
            "{name}: {} of {} greedy tokens equal; logits off by {worst:.1e} at most ({at_once:.1e} at once) of \
             {size:.1}; least margin {}",
            tokens.iter().zip(&prompt.greedy).filter(|(a, b)| a == b).count(),
            prompt.greedy.len(),
            prompt.least_margin
        );
        assert!(prompt.least_margin > TOLERANCE, "{name}: the reference nearly ties");
        assert!(worst < TOLERANCE && at_once < TOLERANCE, "{name}: off by {worst}, {at_once}");
        assert_eq!(tokens, prompt.greedy, "{name}");
    }
}
