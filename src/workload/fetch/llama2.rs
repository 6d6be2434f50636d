//! The Llama-2 tokenizer, made from the vocabulary and the merges that a JavaScript package carries.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::{FetchError, Outcome, Workroom, client, hash};
use crate::workload::atomic::write_atomically;
use crate::workload::tokenizer::Tokenizer;

const PACKAGE: &str = "llama-tokenizer-js@1.2.2";
const SCRIPT_SHA256: &str = "34a7b9f7579d40486444590c37cba6564ef40c3dd98ecdfc2f7c886ae72c898d";
const TOKENS: usize = 32_000;
const MERGES: usize = 61_249;

/// Texts and their ids in Llama 2, that the made tokenizer must give.
const EXAMPLES: &[(&str, &[u32])] =
    &[("Hello world", &[1, 15043, 3186]), ("🦙Ꙋ", &[1, 29871, 243, 162, 169, 156, 237, 156, 141])];

pub fn fetch(folder: &Path, say: &mut dyn FnMut(&str)) -> Result<(PathBuf, Outcome), FetchError> {
    let home = folder.join("llama-2-tokenizer");
    let path = home.join("tokenizer.json");
    if path.is_file() {
        match verify(&path) {
            Ok(()) => return Ok((path, Outcome::Present)),
            Err(message) => say(&format!("{} is not usable ({message}): making it again", path.display())),
        }
    }
    let io = |path: &Path, source| FetchError::Io { path: path.to_owned(), source };
    let unusable = |message| FetchError::Tokenizer { package: PACKAGE, message };

    let room = Workroom::new(folder)?;
    say("fetching the Llama-2 tokenizer (0.5 MB) with npm");
    let missing = |program, remedy| FetchError::NoClient {
        program,
        remedy,
        otherwise: format!("put Llama 2's tokenizer.json into {} yourself", home.display()),
    };
    if !client::run("npm", &["pack", "--silent", PACKAGE], &room.0)? {
        return Err(missing("npm", "Node.js and npm"));
    }
    let archive = "llama-tokenizer-js-1.2.2.tgz";
    if !client::run("tar", &["-xzf", archive, "package/llama-tokenizer.js"], &room.0)? {
        return Err(missing("tar", "tar"));
    }
    let script = room.0.join("package").join("llama-tokenizer.js");
    let found = hash(&script)?;
    if found != SCRIPT_SHA256 {
        return Err(FetchError::Checksum { path: script, found, expected: SCRIPT_SHA256 });
    }
    let text = std::fs::read_to_string(&script).map_err(|e| io(&script, e))?;
    let json = tokenizer_json(&text).map_err(unusable)?;

    let made = room.0.join("tokenizer.json");
    write_atomically(&made, |out| out.write_all(json.to_string().as_bytes())).map_err(|e| io(&made, e))?;
    verify(&made).map_err(unusable)?;
    std::fs::create_dir_all(&home).map_err(|e| io(&home, e))?;
    std::fs::rename(&made, &path).map_err(|e| io(&path, e))?;
    Ok((path, Outcome::Fetched))
}

fn verify(path: &Path) -> Result<(), String> {
    let tokenizer = Tokenizer::from_file(path).map_err(|e| e.to_string())?;
    for (text, expected) in EXAMPLES {
        let ids = tokenizer.encode(text).map_err(|e| e.to_string())?;
        if ids != *expected {
            return Err(format!("'{text}' is {ids:?}, not {expected:?}"));
        }
        let back = tokenizer.decode(&ids);
        if back != *text {
            return Err(format!("'{text}' comes back as '{back}'"));
        }
    }
    Ok(())
}

/// A `tokenizer.json` from the script's two base64 constants: `llama_vocab_base64`, a token a line in
/// the order of ids, and `llama_merges_binary`, pairs of ids as little-endian `u16` in order of priority.
pub fn tokenizer_json(script: &str) -> Result<Value, String> {
    let vocabulary = constant(script, "llama_vocab_base64")?;
    let vocabulary = String::from_utf8(vocabulary).map_err(|_| "the vocabulary is not UTF-8".to_owned())?;
    let tokens: Vec<&str> = vocabulary.split('\n').collect();
    if tokens.len() != TOKENS {
        return Err(format!("the vocabulary has {} tokens, not {TOKENS}", tokens.len()));
    }
    let pairs = constant(script, "llama_merges_binary")?;
    if pairs.len() != 4 * MERGES {
        return Err(format!("there are {} bytes of merges, not {}", pairs.len(), 4 * MERGES));
    }
    let token = |bytes: &[u8]| {
        let id = u16::from_le_bytes([bytes[0], bytes[1]]);
        tokens.get(usize::from(id)).copied().ok_or_else(|| format!("a merge names token {id}"))
    };
    let merges = pairs
        .chunks_exact(4)
        .map(|pair| Ok([token(&pair[..2])?, token(&pair[2..])?]))
        .collect::<Result<Vec<_>, String>>()?;
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect();
    let special: Vec<Value> = tokens[..3]
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    }))
}

/// The bytes of a base64 string constant of the script.
fn constant(script: &str, name: &str) -> Result<Vec<u8>, String> {
    let missing = || format!("the script has no constant {name}");
    let (_, rest) = script.split_once(&format!("const {name} = \"")).ok_or_else(missing)?;
    let (text, _) = rest.split_once('"').ok_or_else(missing)?;
    BASE64.decode(text).map_err(|e| format!("{name} is not base64: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(vocabulary: &str, merges: &[u8]) -> String {
        format!(
            "const llama_vocab_base64 = \"{}\"\nconst llama_merges_binary = \"{}\"\n",
            BASE64.encode(vocabulary),
            BASE64.encode(merges)
        )
    }

    #[test]
    fn a_script_of_the_right_shape_becomes_a_tokenizer() {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        tokens.extend(["▁", "a", "▁a"].map(str::to_owned));
        tokens.extend((tokens.len()..TOKENS).map(|i| format!("filler{i}")));
        let merge = [259u16.to_le_bytes(), 260u16.to_le_bytes()].concat();
        let json = tokenizer_json(&script(&tokens.join("\n"), &merge.repeat(MERGES))).unwrap();
        assert_eq!(json["model"]["vocab"]["▁a"], 261);
        assert_eq!(json["model"]["merges"][0], json!(["▁", "a"]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        assert_eq!(Tokenizer::from_file(&path).unwrap().encode("a a").unwrap(), [1, 261, 261]);
        // It is a tokenizer and not Llama 2's, which the examples tell.
        assert!(verify(&path).unwrap_err().contains("Hello world"));
    }

    #[test]
    fn another_script_is_refused() {
        for (script, expected) in [
            (String::new(), "no constant llama_vocab_base64"),
            ("const llama_vocab_base64 = \"%\"".to_owned(), "not base64"),
            (script("a\nb", &[]), "2 tokens, not 32000"),
            (script(&"\n".repeat(TOKENS - 1), &[0; 8]), "8 bytes of merges"),
            (script(&"\n".repeat(TOKENS - 1), &[0xff; 4 * MERGES]), "a merge names token 65535"),
        ] {
            let error = tokenizer_json(&script).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
