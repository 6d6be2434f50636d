//! Reading PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

mod config;

use std::path::{Path, PathBuf};

use super::layout::AdapterLayout;
use crate::engine::model::{Family, ModelSpec, TensorFiles, WeightError};
use config::LoraConfig;

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
    /// A tensor of another shape: another base model, or another rank.
    #[error(transparent)]
    Shape(Box<WrongShape>),
    /// A tensor that cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightError),
}

/// An adapter's tensor whose shape is not that of its module.
#[derive(Debug, thiserror::Error)]
#[error(
    "{}: tensor {tensor} has shape {found:?}; rank {rank} on {model} makes it {expected:?}: the adapter is for \
     another base model{}", path.display(), base.as_ref().map(|b| format!(" ({b})")).unwrap_or_default()
)]
pub struct WrongShape {
    /// The adapter's folder.
    pub path: PathBuf,
    /// The tensor.
    pub tensor: String,
    /// Its shape.
    pub found: Vec<usize>,
    /// What it should be.
    pub expected: Vec<usize>,
    /// The rank that the configuration gives the module.
    pub rank: usize,
    /// The model that is served.
    pub model: String,
    /// The base that the adapter names.
    pub base: Option<String>,
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
///
/// Modules may have ranks and scales of their own (`rank_pattern`, `alpha_pattern`). A slab has one of each:
/// the largest rank, smaller matrices being filled up with zeros, and scale 1, `B` being multiplied by the
/// module's own scale as it is read.
///
/// # Errors
/// If a file is missing or broken, the adapter is of a kind that is not implemented, too large for a slot, or
/// made for another model.
pub fn read_peft(
    spec: &ModelSpec,
    max_rank: usize,
    folder: &Path,
) -> Result<(AdapterLayout, Vec<f32>), PeftError> {
    let config = LoraConfig::read(folder)?;
    let path = folder.join("adapter_model.safetensors");
    if !path.is_file() {
        return Err(PeftError::Unreadable {
            path: folder.to_owned(),
            message: "adapter_model.safetensors is missing (PyTorch pickles are not read)".into(),
        });
    }
    let files = TensorFiles::open(folder, &[path])?;
    let found = adapted(spec, folder, &config, &files)?;

    let (mut rank, mut scales) = (0, Vec::new());
    for module in found.iter().flatten() {
        if module.rank == 0 || module.rank > max_rank {
            return Err(PeftError::Rank { path: folder.to_owned(), rank: module.rank, max_rank });
        }
        rank = rank.max(module.rank);
        scales.push(module.scale);
    }
    let common = scales.first().copied().filter(|first| scales.iter().all(|s| s == first));
    let modules = spec.modules();
    let layout = AdapterLayout::new(spec, rank, common.unwrap_or(1.0), |layer, module| {
        found[layer * modules.len() + module].is_some()
    });
    let mut slab = vec![0.0; layout.elements()];
    for (index, adapted) in found.iter().enumerate() {
        let Some(adapted) = adapted else { continue };
        let Some(part) = layout.part(index / modules.len(), index % modules.len()) else { continue };
        let read = |half: usize, expected: [usize; 2]| {
            let tensor = &adapted.tensors[half];
            let found = files.shape(tensor)?;
            if found == expected {
                return Ok(files.read(tensor, &expected)?);
            }
            Err(PeftError::Shape(Box::new(WrongShape {
                path: folder.to_owned(),
                tensor: tensor.clone(),
                found,
                expected: expected.to_vec(),
                rank: adapted.rank,
                model: spec.name.clone(),
                base: config.base.clone(),
            })))
        };
        let a = read(0, [adapted.rank, part.inputs])?;
        let b = read(1, [part.outputs, adapted.rank])?;
        let factor = if common.is_some() { 1.0 } else { adapted.scale };
        let at = part.offset;
        slab[at..at + a.len()].copy_from_slice(&a);
        let begin = at + rank * part.inputs;
        let transposed = &mut slab[begin..begin + adapted.rank * part.outputs];
        for (row, values) in b.chunks_exact(adapted.rank).enumerate() {
            for (column, value) in values.iter().enumerate() {
                transposed[column * part.outputs + row] = value * factor;
            }
        }
    }
    Ok((layout, slab))
}

/// One adapted module.
struct Module {
    /// Names of its `A` and `B`.
    tensors: [String; 2],
    rank: usize,
    scale: f32,
}

/// For each `[layer, module]`, what the file has of it; checked against what the configuration says.
fn adapted(
    spec: &ModelSpec,
    folder: &Path,
    config: &LoraConfig,
    files: &TensorFiles,
) -> Result<Vec<Option<Module>>, PeftError> {
    let modules = spec.modules();
    let mut found: Vec<Option<Module>> = (0..spec.layers * modules.len()).map(|_| None).collect();
    let mut root = None;
    for tensor in files.names() {
        let wrong =
            |what: String| PeftError::Tensor { path: folder.to_owned(), tensor: tensor.to_owned(), what };
        let (stem, half, infix) = split(tensor).ok_or_else(|| wrong(why_not(tensor).into()))?;
        let [this, other] = if half == 0 { ["lora_A", "lora_B"] } else { ["lora_B", "lora_A"] };
        let partner = format!("{stem}.{other}{infix}.weight");
        if !files.has(&partner) {
            return Err(wrong(format!("its {other} is missing")));
        }
        // Names in PEFT's files begin with where its wrapper holds the model.
        let key = stem.strip_prefix("base_model.model.").unwrap_or(stem);
        let (layer, module, inner) = locate(spec, key).ok_or_else(|| {
            let known: Vec<_> = modules.iter().map(|m| m.name).collect();
            wrong(format!(
                "it belongs to none of the model's {} layers and linear modules ({})",
                spec.layers,
                known.join(", ")
            ))
        })?;
        if config.adapts(key, layer)? == Some(false) {
            return Err(wrong(
                "adapter_config.json does not name its module, so PEFT would leave it out: they belong to \
                 different adapters"
                    .into(),
            ));
        }
        root.get_or_insert_with(|| key[..key.len() - inner.len()].to_owned());
        let slot = &mut found[layer * modules.len() + module];
        let mine = format!("{stem}.{this}{infix}.weight");
        match slot {
            Some(module) if !module.tensors.contains(&mine) => {
                return Err(wrong("its module has another pair of matrices under another name".into()));
            }
            // Its other half came first.
            Some(_) => {}
            None => {
                let tensors = if half == 0 { [mine, partner] } else { [partner, mine] };
                *slot = Some(Module { tensors, rank: config.rank(key)?, scale: config.scale(key)? });
            }
        }
    }
    let Some(root) = root else {
        return Err(PeftError::Unreadable {
            path: folder.to_owned(),
            message: "adapter_model.safetensors holds no LoRA tensors".into(),
        });
    };
    for (index, _) in found.iter().enumerate().filter(|(_, module)| module.is_none()) {
        let (layer, module) = (index / modules.len(), &modules[index % modules.len()]);
        let key = format!("{root}layers.{layer}.{}", module.path);
        if config.adapts(&key, layer)? == Some(true) {
            return Err(PeftError::Tensor {
                path: folder.to_owned(),
                tensor: format!("{key}.lora_A.weight"),
                what: "it is missing, and adapter_config.json names its module: the file is not whole".into(),
            });
        }
    }
    Ok(found)
}

/// Module, half (0 is `A`) and infix of a tensor's name; files saved from a live model have the adapter's
/// name, `default`, in it.
fn split(tensor: &str) -> Option<(&str, usize, &'static str)> {
    let halves = [(0, "", ".lora_A.weight"), (1, "", ".lora_B.weight")];
    let live = [(0, ".default", ".lora_A.default.weight"), (1, ".default", ".lora_B.default.weight")];
    let mut all = halves.into_iter().chain(live);
    all.find_map(|(half, infix, end)| Some((tensor.strip_suffix(end)?, half, infix)))
}

/// Why a tensor that is no `A` or `B` of a linear module is refused.
fn why_not(tensor: &str) -> &'static str {
    let has = |part: &str| tensor.contains(part);
    if has("lora_embedding_") {
        "LoRA on embeddings is not supported: all adapters share them"
    } else if has("lora_magnitude_vector") {
        "it is DoRA's, which is not supported: it rescales the base weights, which all adapters share"
    } else if has("modules_to_save") {
        "it would replace a module of the base, which all adapters share"
    } else if tensor.ends_with("bias") {
        "biases are not supported: all adapters share the base's"
    } else if has(".lora_A.") || has(".lora_B.") {
        "its adapter is not called default: save it under that name, or with save_pretrained"
    } else {
        "only lora_A and lora_B weights are supported"
    }
}

/// Layer and module of `model.layers.3.self_attn.q_proj` and the like, and the name from `layers` on.
fn locate<'a>(spec: &ModelSpec, key: &'a str) -> Option<(usize, usize, &'a str)> {
    let inner = key.strip_prefix("model.").unwrap_or(key);
    let inner = match spec.family {
        Family::Llama => inner,
        Family::Opt => inner.strip_prefix("decoder.")?,
    };
    let (layer, path) = inner.strip_prefix("layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok().filter(|l| *l < spec.layers)?;
    let module = spec.modules().iter().position(|m| m.path == path)?;
    Some((layer, module, inner))
}

#[cfg(test)]
mod tests;
