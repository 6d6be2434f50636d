//! What `--model` means: a folder, a GGUF file, or the name of a preset.

use std::path::{Path, PathBuf};

use super::config::{self, ConfigError};
use super::generation::{GenerationConfig, GenerationConfigError};
use super::gguf::GgufWeights;
use super::spec::ModelSpec;
use super::weights::{TensorFiles, WeightError, Weights};
use crate::workload::gguf::{GgufError, is_gguf};

const LLAMA_2_7B: &str = include_str!("../../../configs/models/llama-2-7b.json");

/// The presets: names, and the configuration that each stands for.
const PRESETS: [(&str, &str); 4] = [
    ("tiny", include_str!("../../../configs/models/tiny.json")),
    ("facebook/opt-125m", include_str!("../../../configs/models/opt-125m.json")),
    ("meta-llama/Llama-2-7b-hf", LLAMA_2_7B),
    ("NousResearch/Llama-2-7b-hf", LLAMA_2_7B),
];

/// Names of the presets.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The shape of a preset; none if there is none of this name.
pub fn preset(name: &str) -> Option<ModelSpec> {
    let (_, text) = PRESETS.iter().find(|(known, _)| *known == name)?;
    Some(config::parse(name, text).expect("embedded presets are valid: see their tests"))
}

/// When weights are drawn from a seed instead of read: `--use-dummy-weights`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DummyWeights {
    /// Only where the model has no weights.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never: a model without weights is an error.
    Never,
}

/// A model that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Neither a folder with a `config.json`, nor a GGUF file, nor a preset.
    #[error(
        "unknown model {name:?}: it is neither a folder with a config.json, nor a .gguf file, nor one of the presets \
         ({presets})"
    )]
    Unknown {
        /// What was asked for.
        name: String,
        /// The presets' names.
        presets: String,
    },
    /// Weights were demanded and there are none.
    #[error(
        "model {name:?} has no weights here and dummy weights are switched off: give a folder with safetensors, or allow dummy weights"
    )]
    NoWeights {
        /// The model.
        name: String,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// A GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Its `generation_config.json`.
    #[error(transparent)]
    Generation(#[from] GenerationConfigError),
    /// A folder whose weights are in a format that is not read.
    #[error("{}: the weights are {found}, which are not read: convert them to model.safetensors", folder.display())]
    Format {
        /// The folder.
        folder: PathBuf,
        /// The files.
        found: String,
    },
    /// A file of the folder cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A model, ready to be loaded.
pub struct Model {
    /// Its shape.
    pub spec: ModelSpec,
    /// Its weights.
    pub weights: Weights,
    /// What a `generation_config.json` says.
    pub generation: GenerationConfig,
    /// Its folder or GGUF file, if it has one: the tokenizer may be there too.
    pub home: Option<PathBuf>,
}

/// Finds the model called `name`; `seed` draws dummy weights.
///
/// # Errors
/// If there is none of this name, its files are broken, or they ask for what the engine does not run.
pub fn resolve(name: &str, dummy: DummyWeights, seed: u64) -> Result<Model, ModelError> {
    let path = Path::new(name);
    if is_gguf(path) && path.is_file() {
        let (spec, weights) = GgufWeights::open(name, path)?;
        let drawn = dummy == DummyWeights::Always;
        let weights = if drawn { Weights::Dummy { seed } } else { Weights::Gguf(weights) };
        return Ok(Model {
            spec,
            weights,
            generation: GenerationConfig::default(),
            home: Some(path.to_owned()),
        });
    }
    if path.join("config.json").is_file() {
        return folder(name, path, dummy, seed);
    }
    let presets = || preset_names().collect::<Vec<_>>().join(", ");
    let spec =
        preset(name).ok_or_else(|| ModelError::Unknown { name: name.to_owned(), presets: presets() })?;
    let weights = dummy_weights(name, dummy, seed)?;
    Ok(Model { spec, weights, generation: GenerationConfig::default(), home: None })
}

/// A model without files.
fn dummy_weights(name: &str, dummy: DummyWeights, seed: u64) -> Result<Weights, ModelError> {
    match dummy {
        DummyWeights::Never => Err(ModelError::NoWeights { name: name.to_owned() }),
        DummyWeights::Auto | DummyWeights::Always => Ok(Weights::Dummy { seed }),
    }
}

/// The model in a Hugging Face folder.
fn folder(name: &str, folder: &Path, dummy: DummyWeights, seed: u64) -> Result<Model, ModelError> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path, source })?;
    let mut spec = config::parse(name, &text)?;
    let generation = GenerationConfig::read(folder)?;
    for id in &generation.eos {
        if !spec.eos.contains(id) {
            spec.eos.push(*id);
        }
    }
    let files = if dummy == DummyWeights::Always { Vec::new() } else { weight_files(folder)? };
    let weights = if files.is_empty() {
        dummy_weights(name, dummy, seed)?
    } else {
        Weights::Files(TensorFiles::open(folder, &files)?)
    };
    Ok(Model { spec, weights, generation, home: Some(folder.to_owned()) })
}

/// The safetensors files of a folder: the shards that an index lists, or the one file; empty if
/// there are none. Weights in another format are an error: they would be papered over with dummies.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        let one = folder.join("model.safetensors");
        if one.is_file() {
            return Ok(vec![one]);
        }
        return match foreign_weights(folder) {
            Some(found) => Err(ModelError::Format { folder: folder.to_owned(), found }),
            None => Ok(Vec::new()),
        };
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let text =
        std::fs::read_to_string(&index).map_err(|source| ModelError::Io { path: index.clone(), source })?;
    let wrong = |message: String| WeightError::File { path: index.clone(), message };
    let parsed: Index = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let shards: std::collections::BTreeSet<String> = parsed.weight_map.into_values().collect();
    let mut files = Vec::with_capacity(shards.len());
    for shard in shards {
        let path = folder.join(&shard);
        if !path.is_file() {
            return Err(wrong(format!("it lists {shard}, which is not there")).into());
        }
        files.push(path);
    }
    Ok(files)
}

/// Weights that are there in a format that is not read: `pytorch_model.bin` and the like.
fn foreign_weights(folder: &Path) -> Option<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    let mut found: Vec<String> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(name)
        .filter(|name| {
            [".bin", ".pt", ".pth", ".h5", ".msgpack"].iter().any(|end| name.ends_with(end))
                && ["pytorch_model", "consolidated", "tf_model", "flax_model"]
                    .iter()
                    .any(|b| name.starts_with(b))
        })
        .collect();
    found.sort();
    (!found.is_empty()).then(|| found.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_parses() {
        for name in preset_names() {
            assert_eq!(preset(name).unwrap().name, name);
        }
    }

    #[test]
    fn an_unknown_model_lists_the_presets() {
        let Err(error) = resolve("no-such-model", DummyWeights::Auto, 0) else { panic!("found") };
        let message = error.to_string();
        assert!(message.contains("no-such-model") && message.contains("facebook/opt-125m"), "{message}");
    }

    #[test]
    fn dummy_weights_are_used_where_there_are_none_and_refused_on_demand() {
        assert!(resolve("tiny", DummyWeights::Auto, 0).unwrap().weights.is_dummy());
        assert!(matches!(resolve("tiny", DummyWeights::Never, 0), Err(ModelError::NoWeights { .. })));

        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("config.json"), include_str!("../../../configs/models/tiny.json"))
            .unwrap();
        assert!(resolve(name, DummyWeights::Auto, 0).unwrap().weights.is_dummy());
        assert!(matches!(resolve(name, DummyWeights::Never, 0), Err(ModelError::NoWeights { .. })));
        // A file that is there is opened, and a broken one is never papered over with dummies.
        std::fs::write(dir.path().join("model.safetensors"), b"broken").unwrap();
        assert!(matches!(resolve(name, DummyWeights::Auto, 0), Err(ModelError::Weights(_))));
        assert!(resolve(name, DummyWeights::Always, 0).unwrap().weights.is_dummy());
    }

    #[test]
    fn shards_come_from_the_index() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("model.safetensors.index.json"),
            r#"{"metadata":{},"weight_map":{"a":"two.safetensors","b":"one.safetensors","c":"one.safetensors"}}"#,
        )
        .unwrap();
        let missing = weight_files(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("index.json") && missing.contains("one.safetensors"), "{missing}");
        for shard in ["one.safetensors", "two.safetensors"] {
            std::fs::write(dir.path().join(shard), b"").unwrap();
        }
        let names: Vec<_> = weight_files(dir.path())
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["one.safetensors", "two.safetensors"]);
    }

    #[test]
    fn weights_in_another_format_are_refused_not_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("config.json"), include_str!("../../../configs/models/tiny.json"))
            .unwrap();
        std::fs::write(dir.path().join("pytorch_model.bin"), b"pickle").unwrap();
        let Err(error) = resolve(name, DummyWeights::Auto, 0) else { panic!("accepted") };
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
        assert!(resolve(name, DummyWeights::Always, 0).unwrap().weights.is_dummy());
    }

    #[test]
    fn the_generation_config_adds_ends_and_defaults() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), include_str!("../../../configs/models/tiny.json"))
            .unwrap();
        let text = r#"{"eos_token_id": [2, 9], "temperature": 0.5}"#;
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        let model = resolve(dir.path().to_str().unwrap(), DummyWeights::Auto, 0).unwrap();
        assert_eq!(model.generation.sampling.temperature, Some(0.5));
        assert!(model.spec.eos.ends_with(&[9]), "{:?}", model.spec.eos);
    }
}
