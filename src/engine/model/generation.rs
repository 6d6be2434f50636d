//! Reading a Hugging Face `generation_config.json`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::config::token_ids;

/// Sampling that a model's makers recommend: what a request gets where it says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: Option<u32>,
}

/// What of the file matters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a sequence, besides those of `config.json`.
    pub eos: Vec<u32>,
    /// Defaults of requests.
    pub sampling: SamplingDefaults,
    /// Fields that ask for what is not implemented, with their values: `repetition_penalty 1.2`.
    pub ignored: Vec<String>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct GenerationConfigError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub message: String,
}

#[derive(Deserialize)]
struct Raw {
    eos_token_id: Option<Value>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    repetition_penalty: Option<f64>,
    min_p: Option<f64>,
}

impl GenerationConfig {
    /// Reads the file of a model's folder; nothing where there is none. As in vLLM, `do_sample` has no say:
    /// requests are sampled unless their temperature is 0.
    ///
    /// # Errors
    /// If the file is there and cannot be read, or a value is out of its range.
    pub fn read(folder: &Path) -> Result<Self, GenerationConfigError> {
        let path = folder.join("generation_config.json");
        if !path.is_file() {
            return Ok(Self::default());
        }
        let wrong = |message| GenerationConfigError { path: path.clone(), message };
        let text = std::fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let raw: Raw = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let eos = token_ids(raw.eos_token_id.as_ref())
            .ok_or("eos_token_id is neither a token id nor a list of them")?;
        let range = |field: &str, value: Option<f32>, ok: fn(f32) -> bool, range: &str| match value {
            Some(v) if !ok(v) => Err(format!("{field} must be {range}, not {v}")),
            value => Ok(value),
        };
        let sampling = SamplingDefaults {
            temperature: range("temperature", raw.temperature, |v| v >= 0.0, "at least 0")?,
            top_p: range("top_p", raw.top_p, |v| v > 0.0 && v <= 1.0, "above 0 and at most 1")?,
            top_k: match raw.top_k {
                None => None,
                Some(-1) => Some(0),
                Some(k) => Some(u32::try_from(k).map_err(|_| format!("top_k must be at least -1, not {k}"))?),
            },
        };
        let neutral = [("repetition_penalty", raw.repetition_penalty, 1.0), ("min_p", raw.min_p, 0.0)];
        let ignored = neutral
            .into_iter()
            .filter_map(|(field, value, neutral)| Some((field, value.filter(|v| *v != neutral)?)))
            .map(|(field, value)| format!("{field} {value}"))
            .collect();
        Ok(Self { eos, sampling, ignored })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eos_and_sampling_are_read_and_the_rest_is_named() {
        let config = GenerationConfig::parse(
            r#"{"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_p": 0.9,
                "top_k": 50, "repetition_penalty": 1.2, "min_p": 0, "transformers_version": "5.0"}"#,
        )
        .unwrap();
        let sampling = SamplingDefaults { temperature: Some(0.6), top_p: Some(0.9), top_k: Some(50) };
        assert_eq!((config.eos, config.sampling), (vec![2, 7], sampling));
        assert_eq!(config.ignored, ["repetition_penalty 1.2"]);
        let empty = GenerationConfig::parse(r#"{"eos_token_id": null, "top_p": null, "top_k": -1}"#).unwrap();
        assert_eq!(empty.sampling, SamplingDefaults { top_k: Some(0), ..Default::default() });
    }

    #[test]
    fn values_out_of_range_name_the_file_and_the_field() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(dir.path()).unwrap(), GenerationConfig::default());
        for (text, said) in [
            (r#"{"temperature": -1}"#, "temperature must be at least 0, not -1"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"top_k": -5}"#, "top_k must be at least -1, not -5"),
            (r#"{"eos_token_id": "</s>"}"#, "eos_token_id"),
            ("{", "EOF"),
        ] {
            std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
            let error = GenerationConfig::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("generation_config.json") && error.contains(said), "{error}");
        }
    }
}
