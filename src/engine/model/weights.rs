//! Where a model's tensors come from: safetensors files, a GGUF file, or a seed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device};

use super::gguf::GgufWeights;
use super::random::{Uniform, Values};
use super::spec::Dtype;

/// Weights that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The files cannot be opened or are not safetensors.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// A tensor that the configuration calls for is not there.
    #[error("{}: tensor {tensor} is missing; the weights are not of the model in its configuration", path.display())]
    Missing {
        /// The folder.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor has another shape than the configuration calls for.
    #[error(
        "{}: tensor {tensor} has shape {found:?}, the model's configuration calls for {expected:?}", path.display()
    )]
    Shape {
        /// The folder.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The configuration's.
        expected: Vec<usize>,
    },
    /// A number format that the engine does not read.
    #[error("{}: tensor {tensor} is {dtype}; only float32, float16 and bfloat16 are read", path.display())]
    Dtype {
        /// The folder.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its format.
        dtype: String,
    },
    /// The device could not hold them.
    #[error("the weights could not be put on the device: {0}")]
    Device(String),
}

/// Safetensors files of one folder, mapped into memory.
pub struct TensorFiles {
    path: PathBuf,
    files: MmapedSafetensors,
    names: BTreeSet<String>,
}

impl TensorFiles {
    /// Opens `paths`, which belong to the folder `folder`.
    pub fn open(folder: &Path, paths: &[PathBuf]) -> Result<Self, WeightError> {
        // SAFETY: the maps are read-only; a file that is changed while it is mapped is outside what
        // a program can guard against, and every reader of safetensors files accepts that.
        let files = unsafe { MmapedSafetensors::multi(paths) }
            .map_err(|e| WeightError::File { path: folder.to_owned(), message: e.to_string() })?;
        let names = files.tensors().into_iter().map(|(name, _)| name).collect();
        Ok(Self { path: folder.to_owned(), files, names })
    }

    /// The folder that they came from.
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A tensor's shape.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, WeightError> {
        if !self.has(name) {
            return Err(WeightError::Missing { path: self.path.clone(), tensor: name.to_owned() });
        }
        let view = self.files.get(name).map_err(|e| self.broken(name, &e))?;
        Ok(view.shape().to_vec())
    }

    /// A tensor as f32, row-major, checked to have `shape`.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightError> {
        let found = self.shape(name)?;
        if found != shape {
            return Err(WeightError::Shape {
                path: self.path.clone(),
                tensor: name.to_owned(),
                found,
                expected: shape.to_vec(),
            });
        }
        let tensor = self.files.load(name, &Device::Cpu).map_err(|e| self.broken(name, &e))?;
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(WeightError::Dtype {
                path: self.path.clone(),
                tensor: name.to_owned(),
                dtype: format!("{:?}", tensor.dtype()),
            });
        }
        tensor
            .to_dtype(DType::F32)
            .and_then(|t| t.flatten_all()?.to_vec1())
            .map_err(|e| self.broken(name, &e))
    }

    fn broken(&self, tensor: &str, error: &candle_core::Error) -> WeightError {
        WeightError::File { path: self.path.clone(), message: format!("tensor {tensor}: {error}") }
    }
}

/// A model's weights, read one tensor at a time.
pub enum Weights {
    /// From a checkpoint.
    Files(TensorFiles),
    /// From a GGUF file, dequantised as they are read.
    Gguf(GgufWeights),
    /// Drawn from a seed.
    Dummy {
        /// The seed.
        seed: u64,
    },
}

impl Weights {
    /// Where they come from, to be shown at start; `loaded` is what they take on the device, in bytes, and
    /// `dtype` what they are kept as there.
    pub fn said(&self, dtype: Dtype, loaded: u64) -> String {
        let mb = |bytes: u64| bytes as f64 * 1e-6;
        match self {
            Self::Dummy { seed } => format!("dummy weights drawn from seed {seed}"),
            Self::Files(files) => format!("weights of {}", files.folder().display()),
            Self::Gguf(weights) => {
                let file = weights.file();
                format!(
                    "weights of {} ({}; {:.1} MB), dequantised to {dtype} ({:.1} MB)",
                    file.path().display(),
                    file.formats(),
                    mb(file.bytes()),
                    mb(loaded)
                )
            }
        }
    }

    /// Whether they are drawn from a seed.
    pub fn is_dummy(&self) -> bool {
        matches!(self, Self::Dummy { .. })
    }

    /// Whether the checkpoint has a tensor of this name; a dummy one has every tensor.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Files(files) => files.has(name),
            Self::Gguf(file) => file.has(name),
            Self::Dummy { .. } => true,
        }
    }

    /// A matrix `[rows, cols]`. Dummy values have variance `1 / cols`, which keeps what flows
    /// through a linear layer at the size that it came with.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Values, WeightError> {
        self.draw(name, &[rows, cols], (3.0 / cols as f32).sqrt(), 0.0)
    }

    /// A bias or a norm's bias `[len]`. Dummy values are small.
    pub fn bias(&self, name: &str, len: usize) -> Result<Values, WeightError> {
        self.draw(name, &[len], 0.02, 0.0)
    }

    /// A norm's weight `[len]`. Dummy values are near 1.
    pub fn norm(&self, name: &str, len: usize) -> Result<Values, WeightError> {
        self.draw(name, &[len], 0.1, 1.0)
    }

    fn draw(&self, name: &str, shape: &[usize], bound: f32, centre: f32) -> Result<Values, WeightError> {
        match self {
            Self::Files(files) => Ok(Values::Read(files.read(name, shape)?)),
            Self::Gguf(file) => Ok(Values::Read(file.read(name, shape)?)),
            Self::Dummy { seed } => Ok(Values::Drawn {
                from: Uniform::new(*seed, &format!("weights/{name}"), bound, centre),
                len: shape.iter().product(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use std::collections::HashMap;

    fn write(folder: &Path, tensors: &[(&str, Tensor)]) -> PathBuf {
        let path = folder.join("model.safetensors");
        let tensors: HashMap<_, _> = tensors.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        candle_core::safetensors::save(&tensors, &path).unwrap();
        path
    }

    #[test]
    fn half_precision_is_widened() {
        let dir = tempfile::tempdir().unwrap();
        let t = Tensor::new(&[[1.5f32, -2.0], [0.25, 8.0]], &Device::Cpu).unwrap();
        let path = write(
            dir.path(),
            &[("h", t.to_dtype(DType::F16).unwrap()), ("b", t.to_dtype(DType::BF16).unwrap())],
        );
        let files = TensorFiles::open(dir.path(), &[path]).unwrap();
        for name in ["h", "b"] {
            assert_eq!(files.read(name, &[2, 2]).unwrap(), [1.5, -2.0, 0.25, 8.0]);
        }
    }

    #[test]
    fn errors_name_the_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let t = Tensor::new(&[[1u32, 2]], &Device::Cpu).unwrap();
        let path = write(dir.path(), &[("ints", t)]);
        let files = TensorFiles::open(dir.path(), &[path]).unwrap();
        let said = |r: Result<Vec<f32>, WeightError>| r.unwrap_err().to_string();
        assert!(said(files.read("gone", &[1])).contains("tensor gone is missing"));
        assert!(said(files.read("ints", &[2, 1])).contains("shape [1, 2]"));
        assert!(said(files.read("ints", &[1, 2])).contains("ints is U32"));
    }

    #[test]
    fn a_file_cut_short_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let t = Tensor::new(&[1f32; 64], &Device::Cpu).unwrap();
        let path = write(dir.path(), &[("t", t)]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(TensorFiles::open(dir.path(), &[path]), Err(WeightError::File { .. })));
    }
}
