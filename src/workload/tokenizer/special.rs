//! The special tokens that a chat template may name.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::workload::gguf::{Gguf, GgufError};

/// Token texts by the names that templates know: `bos_token` and so on.
pub type SpecialTokens = BTreeMap<String, String>;

const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// Those of `tokenizer_config.json`, and of `special_tokens_map.json` where it has none, beside a tokenizer. A
/// file that is not there or no JSON gives none: tokenizers work without either.
pub fn beside(tokenizer: &Path) -> SpecialTokens {
    let mut found = SpecialTokens::new();
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let text = std::fs::read_to_string(tokenizer.with_file_name(file)).ok();
        let Some(config) = text.and_then(|text| serde_json::from_str::<Value>(&text).ok()) else { continue };
        for name in NAMES {
            let token = config.get(name).and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
            if let Some(token) = token {
                found.entry(name.to_owned()).or_insert_with(|| token.to_owned());
            }
        }
    }
    found
}

/// Those of a GGUF file's metadata.
pub fn of_gguf(file: &Gguf) -> Result<SpecialTokens, GgufError> {
    let tokens = file.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let keys = [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ];
    let mut found = SpecialTokens::new();
    for (name, key) in keys {
        if let Some(token) = file.id(key)?.and_then(|id| tokens.get(id as usize)) {
            found.insert(name.to_owned(), (*token).to_owned());
        }
    }
    Ok(found)
}
