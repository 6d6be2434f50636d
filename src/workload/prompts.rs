//! Prompt texts: ShareGPT's, counted with a tokenizer, and made-up ones of an exact length.

use std::path::Path;

use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::pool::{PoolPrompt, PromptPool};
use super::regime::Regime;
use super::sharegpt::{ShareGptError, ShareGptReader, ShareGptReport};
use super::streams::stream;
use super::tokenizer::{Tokenizer, TokenizerError, TokenizerSource};

/// Prompts that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The dataset.
    #[error(transparent)]
    Dataset(#[from] ShareGptError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A length that no text made here has.
    #[error(
        "could not make a prompt of {tokens} tokens with the tokenizer {tokenizer}: its word counts never come out even"
    )]
    NoSuchLength {
        /// The length asked for.
        tokens: u32,
        /// The tokenizer.
        tokenizer: String,
    },
}

/// How many conversations are tokenised at once, in parallel.
const BATCH: usize = 512;

/// Every first human turn of a ShareGPT file with its length in `tokenizer`'s tokens, BOS included, as
/// far as `keep` wants it. `progress` is told the bytes read.
pub fn read_sharegpt(
    path: &Path,
    tokenizer: &Tokenizer,
    keep: impl Fn(u32) -> bool + Sync,
    mut progress: impl FnMut(u64),
) -> Result<(Vec<PoolPrompt>, ShareGptReport), PromptError> {
    let mut reader = ShareGptReader::open(path)?;
    let mut kept = Vec::new();
    let mut batch: Vec<String> = Vec::with_capacity(BATCH);
    loop {
        batch.clear();
        while batch.len() < BATCH {
            match reader.next() {
                Some(turn) => batch.extend(turn?),
                None => break,
            }
        }
        if batch.is_empty() {
            return Ok((kept, reader.report()));
        }
        let counted: Vec<Option<PoolPrompt>> = batch
            .par_drain(..)
            .map(|text| {
                let tokens = tokenizer.encode(&text)?.len() as u32;
                Ok(keep(tokens).then_some(PoolPrompt { tokens, text: Some(text) }))
            })
            .collect::<Result<_, TokenizerError>>()?;
        kept.extend(counted.into_iter().flatten());
        progress(reader.position());
    }
}

/// The prompts of one regime in a ShareGPT file.
pub fn sharegpt_pool(
    path: &Path,
    regime: Regime,
    tokenizer: &Tokenizer,
    progress: impl FnMut(u64),
) -> Result<(PromptPool, ShareGptReport), PromptError> {
    let range = regime.tokens();
    let (prompts, report) = read_sharegpt(path, tokenizer, |tokens| range.contains(&tokens), progress)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let source = format!("{name}, first human turns, counted with {}", tokenizer.source());
    Ok((PromptPool { source, prompts }, report))
}

/// Common words; most are a token of their own in most vocabularies.
const WORDS: &[&str] = &[
    "the", "of", "and", "to", "in", "is", "it", "that", "was", "for", "on", "are", "with", "as", "his",
    "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "not", "but", "what", "all",
    "were", "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how",
    "their", "if", "will", "up", "other", "about", "out", "many", "then", "them", "these", "so", "some",
    "her", "would", "make", "like", "him", "into", "time", "has", "look", "two", "more", "go", "see", "no",
    "way", "could", "people", "my", "than", "first", "water", "been", "call", "who", "its", "now", "find",
    "long", "down", "day", "did", "get", "come", "made", "may", "part",
];

/// A text of exactly `tokens` tokens, BOS included, made of words in an order that depends on `seed` and
/// `number`: no two requests share a prompt that a prefix cache could reuse.
pub fn synthesise(tokenizer: &Tokenizer, tokens: u32, seed: u64, number: u64) -> Result<String, PromptError> {
    let mut rng = stream(seed, &format!("prompt {number}"));
    let begin = u32::from(tokenizer.bos().is_some());
    if tokens <= begin {
        return Ok(String::new());
    }
    if *tokenizer.source() == TokenizerSource::ByteLevel {
        return Ok(exact_bytes(&mut rng, (tokens - begin) as usize));
    }
    // A text that misses by some tokens gains or loses as many words as its words' mean length says.
    // Words of one token each make the second round exact; others come out even after a few draws.
    let wanted = tokens as usize;
    let mut words: Vec<&str> = (0..tokens - begin).map(|_| word(&mut rng)).collect();
    for round in 0..MOST_ROUNDS {
        let text = words.join(" ");
        let found = tokenizer.encode(&text)?.len();
        if found == wanted {
            return Ok(text);
        }
        // Where words are several tokens each, what is left may lack less than any word has.
        if round >= PATIENT_ROUNDS
            && let Some(text) = with_another_end(tokenizer, &words, wanted)?
        {
            return Ok(text);
        }
        let per_word = (found as f64 / words.len() as f64).max(1.0);
        let miss = (found.abs_diff(wanted) as f64 / per_word).round().max(1.0) as usize;
        if found > wanted {
            words.truncate(words.len().saturating_sub(miss + usize::from(round >= PATIENT_ROUNDS)));
            if words.is_empty() {
                words.push(word(&mut rng));
            }
        } else {
            words.extend((0..miss).map(|_| word(&mut rng)));
        }
    }
    Err(PromptError::NoSuchLength { tokens, tokenizer: tokenizer.source().to_string() })
}

const MOST_ROUNDS: usize = 64;
/// After how many rounds every last word is tried.
const PATIENT_ROUNDS: usize = 8;

/// `words` with the first of all words as the last that makes it `wanted` tokens; none if no word does.
fn with_another_end(
    tokenizer: &Tokenizer,
    words: &[&str],
    wanted: usize,
) -> Result<Option<String>, PromptError> {
    let mut words = words.to_vec();
    for &end in WORDS {
        words.pop();
        words.push(end);
        let text = words.join(" ");
        if tokenizer.encode(&text)?.len() == wanted {
            return Ok(Some(text));
        }
    }
    Ok(None)
}

fn word(rng: &mut ChaCha8Rng) -> &'static str {
    WORDS[rng.random_range(0..WORDS.len())]
}

/// Words and spaces, `bytes` bytes of ASCII.
fn exact_bytes(rng: &mut ChaCha8Rng, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 8);
    while text.len() < bytes {
        text += word(rng);
        text.push(' ');
    }
    text.truncate(bytes);
    // No white space at the end, which a server might strip.
    if text.ends_with(' ') {
        text.pop();
        text.push('.');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_prompts_have_their_length_and_differ() {
        let t = Tokenizer::byte_level();
        for tokens in [1, 2, 3, 256, 1024, 4096] {
            let text = synthesise(&t, tokens, 1, 0).unwrap();
            assert_eq!(t.encode(&text).unwrap().len(), tokens as usize);
            assert!(text.bytes().all(|b| (0x20..0x7f).contains(&b)) && text.trim_end() == text);
            assert_eq!(text, synthesise(&t, tokens, 1, 0).unwrap());
        }
        assert_ne!(synthesise(&t, 64, 1, 0).unwrap()[..16], synthesise(&t, 64, 1, 1).unwrap()[..16]);
        assert_ne!(synthesise(&t, 64, 1, 0).unwrap(), synthesise(&t, 64, 2, 0).unwrap());
    }

    #[test]
    fn prompts_of_other_tokenizers_have_their_length_too() {
        // Words of this one are several tokens each, which is the hard case.
        let (_folder, t) = crate::workload::tokenizer::llama_like();
        for (number, tokens) in [12, 40, 256, 1000, 1024].into_iter().enumerate() {
            let text = synthesise(&t, tokens, 1, number as u64).unwrap();
            assert_eq!(t.encode(&text).unwrap().len(), tokens as usize);
        }
        // Where a letter is a token, many beginnings leave a rest that no single word fills.
        for number in 0..200 {
            let tokens = 16 + 5 * number as u32;
            let text = synthesise(&t, tokens, 1, number).unwrap();
            assert_eq!(t.encode(&text).unwrap().len(), tokens as usize);
        }
        // No word is as short as one token here.
        let error = synthesise(&t, 2, 1, 0).unwrap_err().to_string();
        assert!(error.contains("a prompt of 2 tokens"), "{error}");
    }

    #[test]
    fn regimes_are_cut_out_by_token_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.json");
        // Byte-level: a text of n bytes is n + 1 tokens.
        let record =
            |n: usize| serde_json::json!({"conversations": [{"from": "human", "value": "x".repeat(n)}]});
        let records: Vec<_> = [254, 255, 1023, 1024, 2047, 4095, 4096].map(record).into();
        std::fs::write(&path, serde_json::to_string(&records).unwrap()).unwrap();
        let lengths = |regime| {
            let (pool, report) = sharegpt_pool(&path, regime, &Tokenizer::byte_level(), |_| {}).unwrap();
            assert_eq!((report.records, report.with_human_turn), (7, 7));
            assert!(pool.prompts.iter().all(|p| p.text.as_ref().unwrap().len() + 1 == p.tokens as usize));
            pool.prompts.iter().map(|p| p.tokens).collect::<Vec<_>>()
        };
        assert_eq!(lengths(Regime::Short), [256, 1024]);
        assert_eq!(lengths(Regime::Long), [2048, 4096]);
    }
}
