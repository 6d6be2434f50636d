//! Reading PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::layout::AdapterLayout;
use crate::engine::model::{Family, ModelSpec, TensorFiles, WeightError};

/// An adapter folder that cannot be used. Every message names the folder.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// A file or folder that cannot be read.
    #[error("{}: {message}", path.display())]
    Unreadable {
        /// It.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A kind of adapter that is not implemented.
    #[error("{}: {what} is not supported; plain LoRA on linear layers is", path.display())]
    Unsupported {
        /// The adapter's folder.
        path: PathBuf,
        /// What it asks for.
        what: String,
    },
    /// Its rank does not fit a slot.
    #[error("{}: rank {rank} is not between 1 and the engine's largest, {max_rank}: raise --max-r", path.display())]
    Rank {
        /// The adapter's folder.
        path: PathBuf,
        /// Its rank.
        rank: usize,
        /// The largest.
        max_rank: usize,
    },
    /// A tensor that belongs to no module of the model, or half a pair.
    #[error("{}: tensor {tensor}: {what}", path.display())]
    Tensor {
        /// The adapter's folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor that is missing or has another shape: another base model, most likely.
    #[error(transparent)]
    Weights(#[from] WeightError),
}

#[derive(Deserialize)]
struct Config {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    bias: Option<String>,
    modules_to_save: Option<Value>,
    rank_pattern: Option<Value>,
    alpha_pattern: Option<Value>,
    #[serde(default)]
    fan_in_fan_out: bool,
}

/// The adapter folders inside `folder`, in name order.
pub fn adapter_folders(folder: &Path) -> Result<Vec<PathBuf>, PeftError> {
    let unreadable =
        |e: std::io::Error| PeftError::Unreadable { path: folder.to_owned(), message: e.to_string() };
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.join("adapter_config.json").is_file() {
            folders.push(path);
        }
    }
    folders.sort();
    if folders.is_empty() {
        return Err(PeftError::Unreadable {
            path: folder.to_owned(),
            message: "no folder with an adapter_config.json in it".into(),
        });
    }
    Ok(folders)
}

/// Reads one adapter: its layout and its matrices in that; `max_rank` is what a slot holds.
pub fn read_peft(
    spec: &ModelSpec,
    max_rank: usize,
    folder: &Path,
) -> Result<(AdapterLayout, Vec<f32>), PeftError> {
    let config = read_config(folder)?;
    if config.r == 0 || config.r > max_rank {
        return Err(PeftError::Rank { path: folder.to_owned(), rank: config.r, max_rank });
    }
    let path = folder.join("adapter_model.safetensors");
    if !path.is_file() {
        return Err(PeftError::Unreadable {
            path: folder.to_owned(),
            message: "adapter_model.safetensors is missing (PyTorch pickles are not read)".into(),
        });
    }
    let files = TensorFiles::open(folder, &[path])?;
    let present = pairs(spec, folder, &files)?;

    let rank = config.r;
    let divisor = if config.use_rslora { (rank as f32).sqrt() } else { rank as f32 };
    let modules = spec.modules();
    let layout = AdapterLayout::new(spec, rank, config.lora_alpha / divisor, |layer, module| {
        present[layer * modules.len() + module].is_some()
    });
    let mut slab = vec![0.0; layout.elements()];
    for (index, stem) in present.iter().enumerate() {
        let Some(stem) = stem else { continue };
        let (layer, module) = (index / modules.len(), index % modules.len());
        let Some(part) = layout.part(layer, module) else { continue };
        let a = files.read(&format!("{stem}.lora_A.weight"), &[rank, part.inputs])?;
        let b = files.read(&format!("{stem}.lora_B.weight"), &[part.outputs, rank])?;
        let at = part.offset;
        slab[at..at + a.len()].copy_from_slice(&a);
        let transposed = &mut slab[at + a.len()..at + a.len() + b.len()];
        for (row, values) in b.chunks_exact(rank).enumerate() {
            for (column, value) in values.iter().enumerate() {
                transposed[column * part.outputs + row] = *value;
            }
        }
    }
    Ok((layout, slab))
}

fn read_config(folder: &Path) -> Result<Config, PeftError> {
    let path = folder.join("adapter_config.json");
    let text = std::fs::read_to_string(&path)
        .map_err(|e| PeftError::Unreadable { path: path.clone(), message: e.to_string() })?;
    let config: Config =
        serde_json::from_str(&text).map_err(|e| PeftError::Unreadable { path, message: e.to_string() })?;

    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    let lists = [
        ("modules_to_save", &config.modules_to_save),
        ("rank_pattern", &config.rank_pattern),
        ("alpha_pattern", &config.alpha_pattern),
    ];
    let unsupported = if let Some(kind) = config.peft_type.as_deref().filter(|k| *k != "LORA") {
        Some(format!("peft_type {kind}"))
    } else if config.use_dora {
        Some("use_dora".into())
    } else if config.fan_in_fan_out {
        Some("fan_in_fan_out".into())
    } else if let Some(bias) = config.bias.as_deref().filter(|b| *b != "none") {
        Some(format!("bias {bias:?}"))
    } else {
        lists.iter().find_map(|(field, v)| v.as_ref().filter(|v| !empty(v)).map(|v| format!("{field} {v}")))
    };
    match unsupported {
        Some(what) => Err(PeftError::Unsupported { path: folder.to_owned(), what }),
        None => Ok(config),
    }
}

/// For each `[layer, module]`, the common part of its two tensors' names, if the file has them.
fn pairs(spec: &ModelSpec, folder: &Path, files: &TensorFiles) -> Result<Vec<Option<String>>, PeftError> {
    let modules = spec.modules();
    let mut present: Vec<Option<String>> = vec![None; spec.layers * modules.len()];
    for tensor in files.names() {
        let wrong =
            |what: String| PeftError::Tensor { path: folder.to_owned(), tensor: tensor.to_owned(), what };
        let Some((stem, other)) = tensor
            .strip_suffix(".lora_A.weight")
            .map(|stem| (stem, "lora_B"))
            .or_else(|| tensor.strip_suffix(".lora_B.weight").map(|stem| (stem, "lora_A")))
        else {
            return Err(wrong("only lora_A and lora_B weights are supported".into()));
        };
        if !files.has(&format!("{stem}.{other}.weight")) {
            return Err(wrong(format!("its {other} is missing")));
        }
        let (layer, module) = locate(spec, stem).ok_or_else(|| {
            let known: Vec<_> = modules.iter().map(|m| m.name).collect();
            wrong(format!(
                "it belongs to none of the model's {} layers and linear modules ({})",
                spec.layers,
                known.join(", ")
            ))
        })?;
        present[layer * modules.len() + module] = Some(stem.to_owned());
    }
    if present.iter().all(Option::is_none) {
        return Err(PeftError::Unreadable {
            path: folder.to_owned(),
            message: "adapter_model.safetensors holds no LoRA tensors".into(),
        });
    }
    Ok(present)
}

/// Layer and module of `base_model.model.model.layers.3.self_attn.q_proj` and the like.
fn locate(spec: &ModelSpec, stem: &str) -> Option<(usize, usize)> {
    let inner = stem.strip_prefix("base_model.model.").unwrap_or(stem);
    let inner = inner.strip_prefix("model.").unwrap_or(inner);
    let inner = match spec.family {
        Family::Llama => inner.strip_prefix("layers.")?,
        Family::Opt => inner.strip_prefix("decoder.layers.")?,
    };
    let (layer, path) = inner.split_once('.')?;
    let layer: usize = layer.parse().ok().filter(|l| *l < spec.layers)?;
    let module = spec.modules().iter().position(|m| m.path == path)?;
    Some((layer, module))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;
    use candle_core::{Device, Tensor};
    use std::collections::HashMap;

    fn folder(config: &str, tensors: &[(&str, [usize; 2])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
        let tensors: HashMap<String, Tensor> = tensors
            .iter()
            .map(|(name, [rows, cols])| {
                let t = Tensor::arange(0f32, (rows * cols) as f32, &Device::Cpu).unwrap();
                ((*name).to_owned(), t.reshape((*rows, *cols)).unwrap())
            })
            .collect();
        candle_core::safetensors::save(&tensors, dir.path().join("adapter_model.safetensors")).unwrap();
        dir
    }

    const Q: &str = "base_model.model.model.layers.1.self_attn.q_proj";

    fn read(config: &str, tensors: &[(&str, [usize; 2])]) -> Result<(AdapterLayout, Vec<f32>), String> {
        let dir = folder(config, tensors);
        read_peft(&preset("tiny").unwrap(), 4, dir.path()).map_err(|e| {
            let message = e.to_string();
            assert!(message.contains(dir.path().to_str().unwrap()), "no folder in: {message}");
            message
        })
    }

    #[test]
    fn matrices_and_scale_are_read_and_b_is_transposed() {
        let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
        let (layout, slab) = read(r#"{"r":2,"lora_alpha":8}"#, &[(&a, [2, 256]), (&b, [128, 2])]).unwrap();
        assert_eq!((layout.scale(), slab.len()), (4.0, 2 * 384));
        let part = layout.part(1, 0).unwrap();
        let (a, b) = layout.matrices(part, 0, &slab);
        assert_eq!((a[1], b[0], b[1], b[128]), (1.0, 0.0, 2.0, 1.0));
        let tensors = [("decoy", [1, 1])];
        assert!(read(r#"{"r":2,"lora_alpha":8}"#, &tensors).unwrap_err().contains("decoy"));
    }

    #[test]
    fn rank_stabilised_adapters_scale_by_the_root() {
        let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
        let config = r#"{"r":4,"lora_alpha":8,"use_rslora":true,"peft_type":"LORA","bias":"none"}"#;
        assert_eq!(read(config, &[(&a, [4, 256]), (&b, [128, 4])]).unwrap().0.scale(), 4.0);
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
        let pair = [(a.as_str(), [2, 256]), (b.as_str(), [128, 2])];
        for (config, said) in [
            (r#"{"r":8,"lora_alpha":8}"#, "rank 8"),
            (r#"{"r":2,"lora_alpha":8,"use_dora":true}"#, "use_dora"),
            (r#"{"r":2,"lora_alpha":8,"bias":"all"}"#, "bias"),
            (r#"{"r":2,"lora_alpha":8,"modules_to_save":["lm_head"]}"#, "modules_to_save"),
            (r#"{"r":2,"lora_alpha":8,"rank_pattern":{"q_proj":4}}"#, "rank_pattern"),
            (r#"{"r":2,"lora_alpha":8,"peft_type":"IA3"}"#, "IA3"),
            (r#"{"r":2}"#, "lora_alpha"),
            (r#"{"r":3,"lora_alpha":8}"#, "shape"),
        ] {
            let message = read(config, &pair).unwrap_err();
            assert!(message.contains(said), "{config}: {message}");
        }
        let good = r#"{"r":2,"lora_alpha":8}"#;
        assert!(read(good, &pair[..1]).unwrap_err().contains("lora_B is missing"));
        let stray = "base_model.model.model.layers.9.self_attn.q_proj";
        let (a, b) = (format!("{stray}.lora_A.weight"), format!("{stray}.lora_B.weight"));
        let message = read(good, &[(&a, [2, 256]), (&b, [128, 2])]).unwrap_err();
        assert!(message.contains("layers.9") && message.contains("3 layers"), "{message}");
        assert!(read(good, &[("x.lora_C.weight", [1, 1])]).unwrap_err().contains("lora_C"));
    }
}
