//! What `--model` means: a folder, or the name of a preset.

use std::path::{Path, PathBuf};

use super::config::{self, ConfigError};
use super::spec::ModelSpec;
use super::weights::{TensorFiles, WeightError, Weights};

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
    /// Neither a folder with a `config.json` nor a preset.
    #[error(
        "unknown model {name:?}: it is neither a folder with a config.json nor one of the presets ({presets})"
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
    /// Its folder, if it has one: the tokenizer may be there too.
    pub folder: Option<PathBuf>,
}

/// Finds the model called `name`; `seed` draws dummy weights.
pub fn resolve(name: &str, dummy: DummyWeights, seed: u64) -> Result<Model, ModelError> {
    let folder = Path::new(name);
    let (spec, folder) = if folder.join("config.json").is_file() {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path, source })?;
        (config::parse(name, &text)?, Some(folder.to_owned()))
    } else {
        let presets = || preset_names().collect::<Vec<_>>().join(", ");
        let spec =
            preset(name).ok_or_else(|| ModelError::Unknown { name: name.to_owned(), presets: presets() })?;
        (spec, None)
    };
    let files = match (&folder, dummy) {
        (Some(folder), DummyWeights::Auto | DummyWeights::Never) => weight_files(folder)?,
        _ => Vec::new(),
    };
    let weights = match &folder {
        Some(folder) if !files.is_empty() => Weights::Files(TensorFiles::open(folder, &files)?),
        _ if dummy == DummyWeights::Never => return Err(ModelError::NoWeights { name: name.to_owned() }),
        _ => Weights::Dummy { seed },
    };
    Ok(Model { spec, weights, folder })
}

/// The safetensors files of a folder: the shards that an index lists, or the one file; empty if
/// there are none.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        let one = folder.join("model.safetensors");
        return Ok(if one.is_file() { vec![one] } else { Vec::new() });
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let text =
        std::fs::read_to_string(&index).map_err(|source| ModelError::Io { path: index.clone(), source })?;
    let parsed: Index =
        serde_json::from_str(&text).map_err(|e| WeightError::File { path: index, message: e.to_string() })?;
    let shards: std::collections::BTreeSet<String> = parsed.weight_map.into_values().collect();
    Ok(shards.into_iter().map(|shard| folder.join(shard)).collect())
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
        let names: Vec<_> = weight_files(dir.path())
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["one.safetensors", "two.safetensors"]);
    }
}
