//! From what a user typed to a tokenizer.

use std::path::{Path, PathBuf};

use super::{Tokenizer, TokenizerError, TokenizerSource};
use crate::workload::data_folder::{LLAMA2_TOKENIZER_NAMES, llama2_tokenizer_file};
use crate::workload::gguf::is_gguf;

/// What models call the end of a sequence, where no configuration says.
pub const EOS_NAMES: &[&str] = &["</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"];

impl Tokenizer {
    /// The tokenizer that a user named: a `tokenizer.json`, a folder that holds one, a GGUF file (the
    /// `tokenizer.json` beside it goes before its own), or a name that `fetch-data` provides for. No name is the embedded byte-level one.
    pub fn resolve(name: Option<&str>) -> Result<Self, TokenizerError> {
        match name {
            None => Ok(Self::byte_level()),
            Some(name) => Self::from_file(&file(name)?),
        }
    }

    /// Where a tokenizer of this name, as a server tells it, is on this machine; none where it is not.
    pub fn source_of(name: &str) -> Option<TokenizerSource> {
        if name == TokenizerSource::ByteLevel.to_string() {
            return Some(TokenizerSource::ByteLevel);
        }
        file(name).ok().map(TokenizerSource::File)
    }

    /// As [`Self::resolve`], except that a hub name or a model folder without a tokenizer here gives
    /// the byte-level one. The text says which it is, to be shown at
    /// start. A path that is missing,
    /// or a file that is no tokenizer, is an error all the same.
    pub fn resolve_or_byte_level(name: Option<&str>) -> Result<(Self, String), TokenizerError> {
        let Some(name) = name else {
            return Ok((Self::byte_level(), "byte-level (embedded)".to_owned()));
        };
        let why = match Self::resolve(Some(name)) {
            Ok(tokenizer) => {
                let said = tokenizer.source().to_string();
                return Ok((tokenizer, said));
            }
            Err(TokenizerError::NotFetched { .. }) => {
                format!("'{name}' is not in the data folder; `lora-hbm fetch-data` gets it")
            }
            Err(TokenizerError::NoTokenizerJson { folder }) => {
                format!("{} has no tokenizer.json", folder.display())
            }
            Err(TokenizerError::Unknown { .. }) if is_hub_name(name) => {
                format!("there is no tokenizer for '{name}' on this machine")
            }
            Err(e) => return Err(e),
        };
        Ok((Self::byte_level(), format!("byte-level (embedded), since {why}")))
    }
}

/// The `tokenizer.json` or GGUF file that `name` means.
fn file(name: &str) -> Result<PathBuf, TokenizerError> {
    if let Some(path) = existing(name)? {
        return Ok(path);
    }
    if !LLAMA2_TOKENIZER_NAMES.contains(&name) {
        return Err(TokenizerError::Unknown { name: name.to_owned() });
    }
    let path = llama2_tokenizer_file();
    if !path.is_file() {
        return Err(TokenizerError::NotFetched { name: name.to_owned(), path });
    }
    Ok(path)
}

/// The `tokenizer.json` that `name` means as a path, if there is anything at that path.
fn existing(name: &str) -> Result<Option<PathBuf>, TokenizerError> {
    let path = Path::new(name);
    if path.is_dir() {
        let file = path.join("tokenizer.json");
        return if file.is_file() {
            Ok(Some(file))
        } else {
            Err(TokenizerError::NoTokenizerJson { folder: path.to_owned() })
        };
    }
    let beside = path.with_file_name("tokenizer.json");
    if is_gguf(path) && path.is_file() && beside.is_file() {
        return Ok(Some(beside));
    }
    Ok(path.exists().then(|| path.to_owned()))
}

/// Whether `name` reads as a model's name (`tiny`, `facebook/opt-125m`) rather than as a path.
fn is_hub_name(name: &str) -> bool {
    let file = name.ends_with(".json") || is_gguf(Path::new(name));
    !name.starts_with(['.', '/', '~']) && !file && name.matches('/').count() <= 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tokenizer_by_another_name_is_the_same_source() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        std::fs::write(&file, "{}").unwrap();
        let by_folder = Tokenizer::source_of(folder.path().to_str().unwrap());
        assert_eq!(by_folder, Some(TokenizerSource::File(file.clone())));
        assert_eq!(by_folder, Tokenizer::source_of(file.to_str().unwrap()));
        assert_eq!(Tokenizer::source_of("byte-level"), Some(TokenizerSource::ByteLevel));
        assert_eq!(Tokenizer::source_of("nobody/nothing"), None);
    }

    #[test]
    fn no_name_is_byte_level() {
        assert_eq!(*Tokenizer::resolve(None).unwrap().source(), TokenizerSource::ByteLevel);
    }

    #[test]
    fn an_unknown_name_is_an_error_that_says_what_to_do() {
        let error = Tokenizer::resolve(Some("nobody/nothing")).unwrap_err().to_string();
        assert!(error.contains("nobody/nothing") && error.contains("fetch-data"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_an_error_for_clients_and_servers() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["not JSON at all", "{}", r#"{"model": 1}"#] {
            let file = folder.path().join("tokenizer.json");
            std::fs::write(&file, text).unwrap();
            for name in [file.to_str(), folder.path().to_str()] {
                let error = Tokenizer::resolve(name).unwrap_err().to_string();
                assert!(error.contains("tokenizer.json that can be used"), "{error}");
                assert!(Tokenizer::resolve_or_byte_level(name).is_err());
            }
        }
    }

    #[test]
    fn servers_fall_back_for_names_and_model_folders_and_say_so() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::resolve(folder.path().to_str()).is_err());
        for name in ["facebook/opt-125m", "tiny", folder.path().to_str().unwrap()] {
            let (tokenizer, said) = Tokenizer::resolve_or_byte_level(Some(name)).unwrap();
            assert_eq!(*tokenizer.source(), TokenizerSource::ByteLevel);
            assert!(said.contains("byte-level") && said.contains(name), "{said}");
        }
        assert!(Tokenizer::resolve_or_byte_level(Some("./missing/tokenizer.json")).is_err());
    }
}
