//! The tokenizer in a GGUF file's metadata, as the `tokenizer.json` that it would be.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::workload::gguf::{Gguf, GgufError};

/// Token types of GGUF files.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// Splits a text before byte-level BPE, as the models of these families do.
const LLAMA_3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The file's tokenizer as the text of a `tokenizer.json`.
///
/// # Errors
/// If the metadata has none, or one of a kind that is not read: the message says which.
pub fn tokenizer_json(file: &Gguf) -> Result<String, GgufError> {
    let key = "tokenizer.ggml.model";
    let kind = file.required(key, file.text(key)?)?;
    let vocabulary = Vocabulary::read(file)?;
    let json = match kind {
        "gpt2" => byte_level(file, &vocabulary)?,
        "llama" => sentencepiece(file, &vocabulary)?,
        other => {
            return Err(file.unsupported(
                format!("its tokenizer, {key} {other},"),
                "gpt2 and llama are read: give the model's tokenizer.json with --tokenizer",
            ));
        }
    };
    Ok(json.to_string())
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    /// One for each token; empty where the file has none.
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Gguf) -> Result<Self, GgufError> {
        let key = "tokenizer.ggml.tokens";
        let tokens = file.required(key, file.texts(key)?)?;
        let types: Vec<i64> = file
            .reals("tokenizer.ggml.token_type")?
            .unwrap_or_default()
            .into_iter()
            .map(|kind| kind as i64)
            .collect();
        Ok(Self { tokens, types })
    }

    fn kind(&self, id: usize) -> i64 {
        self.types.get(id).copied().unwrap_or(1)
    }

    fn map(&self) -> serde_json::Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect()
    }

    /// Tokens that are found in a text before anything else; control tokens are never shown.
    fn added(&self) -> Vec<Value> {
        let added = |id: usize| [UNKNOWN, CONTROL, USER_DEFINED].contains(&self.kind(id));
        (0..self.tokens.len())
            .filter(|id| added(*id))
            .map(|id| {
                json!({
                    "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": self.kind(id) != USER_DEFINED,
                })
            })
            .collect()
    }

    fn token(&self, file: &Gguf, key: &str) -> Result<Option<(u32, &'a str)>, GgufError> {
        let Some(id) = file.id(key)? else { return Ok(None) };
        Ok(self.tokens.get(id as usize).map(|token| (id, *token)))
    }
}

fn byte_level(file: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value, GgufError> {
    let key = "tokenizer.ggml.pre";
    let pre = file.required(key, file.text(key)?)?;
    let bytes = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
        })
    };
    let sequence =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    // Llama 3's tokens are whole words that no merges lead to, and its texts begin with BOS.
    let mut llama_3 = false;
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            sequence(json!({"type": "Digits", "individual_digits": true}), bytes(true))
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            llama_3 = true;
            sequence(split(LLAMA_3), bytes(false))
        }
        "qwen2" => sequence(split(QWEN_2), bytes(false)),
        other => {
            return Err(file.unsupported(
                format!("its tokenizer, {key} {other},"),
                "gpt-2, smollm, starcoder, refact, command-r, llama-bpe and qwen2 are read: give the model's \
                 tokenizer.json with --tokenizer",
            ));
        }
    };
    let merges = "tokenizer.ggml.merges";
    let merges = file.required(merges, file.texts(merges)?)?;
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": if pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(file, vocabulary, llama_3)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": llama_3,
            "vocab": vocabulary.map(), "merges": merges,
        },
    }))
}

/// SentencePiece's BPE: merges follow from the tokens' scores.
fn sentencepiece(file: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value, GgufError> {
    let key = "tokenizer.ggml.scores";
    let scores = file.required(key, file.reals(key)?)?;
    if scores.len() != vocabulary.tokens.len() {
        let what = format!("{} scores of {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(file.unsupported(what, "each token has one"));
    }
    let unknown = vocabulary.token(file, "tokenizer.ggml.unknown_token_id")?.map(|(_, token)| token);
    let space = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space {
        normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": post_processor(file, vocabulary, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.map(), "merges": merges(vocabulary, &scores),
        },
    }))
}

/// Every way to put a token together from two others, the best token first.
fn merges<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut found = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if [UNKNOWN, CONTROL, BYTE].contains(&vocabulary.kind(id)) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                found.push((scores[id], l, r, [left, right]));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found.into_iter().map(|(.., pair)| pair).collect()
}

/// What is put around a text: BOS and EOS where the file says so; `bos` is what holds where it says nothing.
fn post_processor(file: &Gguf, vocabulary: &Vocabulary<'_>, bos: bool) -> Result<Value, GgufError> {
    let mut around = [Vec::new(), Vec::new()];
    let mut special = serde_json::Map::new();
    for (side, (name, default)) in [("bos", bos), ("eos", false)].into_iter().enumerate() {
        if !file.flag(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(default) {
            continue;
        }
        let key = format!("tokenizer.ggml.{name}_token_id");
        let (id, token) = file.required(&key, vocabulary.token(file, &key)?)?;
        around[side].push(json!({"SpecialToken": {"id": token, "type_id": 0}}));
        special.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let [before, after] = around;
    let text = |id: &str| vec![json!({"Sequence": {"id": id, "type_id": 0}})];
    let single = [before.clone(), text("A"), after.clone()].concat();
    let pair = [before, text("A"), text("B"), after].concat();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Value as Meta;

    use super::super::Tokenizer;
    use crate::workload::gguf::tests::write;

    fn texts(texts: &[String]) -> Meta {
        Meta::Array(texts.iter().map(|t| Meta::String(t.clone())).collect())
    }

    fn open(metadata: &[(&str, Meta)]) -> Result<Tokenizer, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.gguf");
        write(&path, metadata, &[]);
        Tokenizer::resolve(path.to_str()).map_err(|e| {
            let message = e.to_string();
            assert!(message.contains("t.gguf"), "{message}");
            message
        })
    }

    /// Letters, the space, and digits of byte-level BPE behind two control tokens, with two merges.
    fn gpt2(pre: &str) -> Vec<(&'static str, Meta)> {
        let tokens: Vec<String> =
            ["<s>", "<e>", "Ġ", "a", "b", "1", "2", "ab", "Ġab", "12"].map(str::to_owned).into();
        let types = tokens.iter().map(|t| Meta::I32(if t.starts_with('<') { 3 } else { 1 })).collect();
        vec![
            ("tokenizer.ggml.model", Meta::String("gpt2".into())),
            ("tokenizer.ggml.pre", Meta::String(pre.into())),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.token_type", Meta::Array(types)),
            ("tokenizer.ggml.merges", texts(&["a b", "Ġ ab", "1 2"].map(str::to_owned))),
            ("tokenizer.ggml.bos_token_id", Meta::U32(0)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(1)),
        ]
    }

    #[test]
    fn byte_level_tokenizers_split_as_their_name_says() {
        let t = open(&gpt2("gpt-2")).unwrap();
        assert_eq!(t.encode("ab ab12").unwrap(), [7, 8, 9]);
        assert_eq!((t.bos(), t.eos(), t.vocab_size()), (None, Some(1), 10));
        assert_eq!(t.decode(&[0, 7, 8, 9, 1]), "ab ab12");
        // Digits one by one.
        assert_eq!(open(&gpt2("smollm")).unwrap().encode("ab ab12").unwrap(), [7, 8, 5, 6]);
        // In groups, behind BOS.
        let t = open(&gpt2("llama-bpe")).unwrap();
        assert_eq!((t.encode("ab ab12").unwrap(), t.bos()), (vec![0, 7, 8, 9], Some(0)));
        // Control tokens in a text are themselves.
        assert_eq!(t.encode_as_is("<s>ab<e>").unwrap(), [0, 7, 1]);
    }

    #[test]
    fn what_the_file_says_about_bos_is_done() {
        let mut metadata = gpt2("gpt-2");
        metadata.push(("tokenizer.ggml.add_bos_token", Meta::Bool(true)));
        assert_eq!(open(&metadata).unwrap().encode("ab").unwrap(), [0, 7]);
        let mut metadata = gpt2("llama-bpe");
        metadata.push(("tokenizer.ggml.add_bos_token", Meta::Bool(false)));
        assert_eq!(open(&metadata).unwrap().encode("ab").unwrap(), [7]);
    }

    #[test]
    fn sentencepiece_merges_follow_from_the_scores() {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        // As Llama 2's: the earlier, the better. "ab" before "▁a".
        tokens.extend(["ab", "▁a", "▁ab", "▁", "a", "b"].map(str::to_owned));
        let types = |id: usize| match id {
            0 => 2,
            1 | 2 => 3,
            3..259 => 6,
            _ => 1,
        };
        let scores = (0..tokens.len()).map(|id| Meta::F32(259.0 - id as f32)).collect();
        let mut metadata = vec![
            ("tokenizer.ggml.model", Meta::String("llama".into())),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.scores", Meta::Array(scores)),
            (
                "tokenizer.ggml.token_type",
                Meta::Array((0..tokens.len()).map(|i| Meta::I32(types(i))).collect()),
            ),
            ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
            ("tokenizer.ggml.unknown_token_id", Meta::U32(0)),
        ];
        let t = open(&metadata).unwrap();
        assert_eq!(t.encode("ab a ñ").unwrap(), [1, 261, 260, 262, 3 + 0xC3, 3 + 0xB1]);
        assert_eq!(t.decode(&t.encode("ab a ñ").unwrap()), "ab a ñ");
        metadata.push(("tokenizer.ggml.add_space_prefix", Meta::Bool(false)));
        assert_eq!(open(&metadata).unwrap().encode("ab").unwrap(), [1, 259]);
    }

    /// Needs `lora-hbm fetch-data` to have run.
    #[test]
    fn llama_2s_merges_follow_from_its_scores_in_their_order() {
        let path = crate::workload::data_folder::llama2_tokenizer_file();
        let Ok(text) = std::fs::read_to_string(&path) else {
            eprintln!("SKIPPED: no {}; run `lora-hbm fetch-data`", path.display());
            return;
        };
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut tokens = vec![""; 32_000];
        for (token, id) in json["model"]["vocab"].as_object().unwrap() {
            tokens[id.as_u64().unwrap() as usize] = token;
        }
        // As its SentencePiece model has them: by id, and runs of spaces last of all.
        let score = |(id, token): (usize, &&str)| {
            if token.trim_matches('▁').is_empty() { -1e9 } else { 259.0 - id as f64 }
        };
        let scores: Vec<f64> = tokens.iter().enumerate().map(score).collect();
        let types = (0..tokens.len()).map(|id| if id < 259 { super::BYTE } else { 1 }).collect();
        let merges = super::merges(&super::Vocabulary { tokens, types }, &scores);
        assert_eq!(merges.len(), 61_249);
        assert_eq!(serde_json::to_value(merges).unwrap(), json["model"]["merges"]);
    }

    #[test]
    fn another_kind_is_refused_by_name() {
        assert!(open(&gpt2("tekken")).unwrap_err().contains("tokenizer.ggml.pre tekken"));
        assert!(open(&[]).unwrap_err().contains("no tokenizer.ggml.model"));
        let other = [
            ("tokenizer.ggml.model", Meta::String("t5".into())),
            ("tokenizer.ggml.tokens", texts(&["a".into()])),
        ];
        let message = open(&other).unwrap_err();
        assert!(message.contains("t5") && message.contains("--tokenizer"), "{message}");
    }
}
