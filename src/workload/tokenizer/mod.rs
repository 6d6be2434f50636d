//! Text to token ids and back: a `tokenizer.json`, a GGUF file's metadata, or the embedded byte-level tokenizer;
//! and from messages to text.

mod byte_level;
mod chat;
mod gguf;
mod resolve;
mod special;
mod stream;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::Tokenizer as HfTokenizer;

use crate::workload::gguf::{Gguf, GgufError, is_gguf};

pub use chat::{ChatTemplate, ChatTemplateError, Message};
pub use special::SpecialTokens;
pub use stream::DecodeStream;

/// A tokenizer; clones share it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: Kind,
    source: TokenizerSource,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Ids never shown, sorted.
    special: Vec<u32>,
    /// What templates may name.
    named: SpecialTokens,
}

#[derive(Debug)]
enum Kind {
    Bytes,
    // Boxed: it is far larger than the other variant.
    Hf(Box<HfTokenizer>),
}

/// Where a tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// The embedded one: an id a byte.
    ByteLevel,
    /// This `tokenizer.json` or GGUF file.
    File(PathBuf),
}

impl std::fmt::Display for TokenizerSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ByteLevel => f.write_str("byte-level"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// A tokenizer that cannot be had, or text that it cannot take.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Neither a file, nor a folder, nor a known name.
    #[error(
        "there is no tokenizer '{name}': give a tokenizer.json, a folder that holds one, or one of the names that \
         `lora-hbm fetch-data` provides for ({}, …); without --tokenizer an embedded byte-level one is used",
        super::data_folder::LLAMA2_TOKENIZER_NAMES[0]
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// A name that `fetch-data` provides for, and it has not run.
    #[error("the tokenizer '{name}' is not in the data folder ({} is missing): run `lora-hbm fetch-data`", path.display())]
    NotFetched {
        /// What was asked for.
        name: String,
        /// Where it would be.
        path: PathBuf,
    },
    /// A folder without a `tokenizer.json`.
    #[error("the folder {} has no tokenizer.json", folder.display())]
    NoTokenizerJson {
        /// The folder.
        folder: PathBuf,
    },
    /// A file that is no tokenizer.
    #[error("{} is not a tokenizer.json that can be used: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A GGUF file whose tokenizer cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Text that could not be encoded.
    #[error("the tokenizer {source_name} could not encode a text of {bytes} bytes: {message}")]
    Encode {
        /// Which tokenizer.
        source_name: String,
        /// Length of the text.
        bytes: usize,
        /// What it said.
        message: String,
    },
}

impl Tokenizer {
    /// The embedded tokenizer: ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, and 3 + *b* for byte *b*.
    pub fn byte_level() -> Self {
        let inner = Inner {
            kind: Kind::Bytes,
            source: TokenizerSource::ByteLevel,
            vocab_size: byte_level::VOCAB_SIZE,
            bos: Some(byte_level::BOS),
            eos: Some(byte_level::EOS),
            special: vec![byte_level::UNK, byte_level::BOS, byte_level::EOS],
            named: SpecialTokens::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Reads a `tokenizer.json`, or the metadata of a GGUF file. Truncation and padding are ignored: a
    /// prompt's length is its own.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        if is_gguf(path) {
            let file = Gguf::open(path)?;
            let json = gguf::tokenizer_json(&file)?;
            let hf = HfTokenizer::from_bytes(json.as_bytes());
            return Self::from_hf(path, hf, special::of_gguf(&file)?);
        }
        Self::from_hf(path, HfTokenizer::from_file(path), special::beside(path))
    }

    /// A tokenizer that was read from `path`, with the special tokens that are known by name.
    fn from_hf(
        path: &Path,
        hf: tokenizers::Result<HfTokenizer>,
        named: SpecialTokens,
    ) -> Result<Self, TokenizerError> {
        let invalid = |e: &dyn std::fmt::Display| TokenizerError::Invalid {
            path: path.to_owned(),
            message: e.to_string(),
        };
        let mut hf = hf.map_err(|e| invalid(&e))?;
        hf.with_padding(None);
        hf.with_truncation(None).map_err(|e| invalid(&e))?;

        let mut special: Vec<u32> =
            hf.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id).collect();
        special.sort_unstable();
        let vocab_size = hf.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(invalid(&"its vocabulary is empty"));
        }
        // What the post-processor puts in front of an empty text is the beginning of a sequence.
        let empty = hf.encode_fast("", true).map_err(|e| invalid(&e))?;
        let bos = empty.get_ids().first().copied();
        let eos = named
            .get("eos_token")
            .and_then(|token| hf.token_to_id(token))
            .or_else(|| resolve::EOS_NAMES.iter().find_map(|token| hf.token_to_id(token)));
        let source = TokenizerSource::File(path.to_owned());
        let inner = Inner { kind: Kind::Hf(Box::new(hf)), source, vocab_size, bos, eos, special, named };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where it comes from.
    pub fn source(&self) -> &TokenizerSource {
        &self.inner.source
    }

    /// The special tokens that a chat template may name.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.named
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// The id that begins every encoded text, if there is one.
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The id that ends a sequence, if it is known.
    pub fn eos(&self) -> Option<u32> {
        self.inner.eos
    }

    /// Ids of `text`, BOS included.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, true)
    }

    /// Ids of `text` alone, nothing put in front: of a text that brings its own BOS, or is a part of one.
    pub fn encode_as_is(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.inner.kind {
            Kind::Bytes => {
                let mut ids = byte_level::encode(text);
                if !special {
                    ids.remove(0);
                }
                Ok(ids)
            }
            Kind::Hf(hf) => match hf.encode_fast(text, special) {
                Ok(encoding) => Ok(encoding.get_ids().to_vec()),
                Err(e) => Err(TokenizerError::Encode {
                    source_name: self.inner.source.to_string(),
                    bytes: text.len(),
                    message: e.to_string(),
                }),
            },
        }
    }

    /// Text of `ids`, special ids skipped; ids outside the vocabulary have no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.inner.kind {
            Kind::Bytes => byte_level::decode(ids),
            // The decoders of a loaded tokenizer fail only on ids that they do not know, and those
            // are dropped before the decoder sees them.
            Kind::Hf(hf) => hf.decode(ids, true).unwrap_or_default(),
        }
    }

    /// Decodes ids one at a time, from the beginning of a text.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream::new(self.clone(), &[])
    }

    /// Decodes ids one at a time, as the continuation of a text that ends in `before`: a first word
    /// keeps its leading space. Only the last few ids of `before` are looked at.
    pub fn decode_stream_after(&self, before: &[u32]) -> DecodeStream {
        DecodeStream::new(self.clone(), before)
    }

    /// For each id below `vocab_size` (a model's, which may exceed the tokenizer's): whether it
    /// decodes on its own to printable text, not empty and not only white space. Never special ids.
    pub fn printable(&self, vocab_size: usize) -> Vec<bool> {
        let known = vocab_size.min(self.vocab_size());
        let mut mask: Vec<bool> = (0..known as u32)
            .map(|id| !self.is_special(id) && is_printable(&self.decode(std::slice::from_ref(&id))))
            .collect();
        mask.resize(vocab_size, false);
        mask
    }

    fn is_special(&self, id: u32) -> bool {
        self.inner.special.binary_search(&id).is_ok()
    }
}

fn is_printable(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().all(|c| !c.is_control() && c != char::REPLACEMENT_CHARACTER)
}

/// A small tokenizer with the pieces of Llama's: byte fallback, "▁" for spaces, `<s>` in front.
#[cfg(test)]
pub(crate) fn llama_like() -> (tempfile::TempDir, Tokenizer) {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: &str| {
        let id = vocab.len();
        vocab.insert(token.to_owned(), id.into());
    };
    for token in ["<unk>", "<s>", "</s>"] {
        add(token);
    }
    for byte in 0..=255u8 {
        add(&format!("<0x{byte:02X}>"));
    }
    for token in ["▁", "a", "b", "▁a", "ab", "▁ab"] {
        add(token);
    }
    let added: Vec<_> = ["<unk>", "<s>", "</s>"]
        .iter()
        .enumerate()
        .map(|(id, token)| {
            serde_json::json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let json = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]],
        },
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::resolve(folder.path().to_str()).unwrap();
    (folder, tokenizer)
}

#[cfg(test)]
mod tests;
