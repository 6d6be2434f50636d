//! A GGUF file: its metadata, and its tensors as f32. candle parses and dequantises.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use memmap2::Mmap;

/// A GGUF file that cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// It cannot be opened.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no GGUF file, is cut short, or holds a number format that is not read.
    #[error(
        "{} is not a GGUF file that can be read: {message} (formats read: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
         Q8_0, Q8_1, Q2_K to Q6_K and Q8_K)", path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        message: String,
    },
    /// Metadata that is needed and not there.
    #[error("{}: the metadata has no {key}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// Metadata of another type, or out of range.
    #[error("{}: the metadata's {key} is not {expected}", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Understood, and not implemented.
    #[error("{}: {what} is not supported; {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What would be.
        supported: String,
    },
}

/// Whether a path names a GGUF file: by its extension.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// An open file, mapped into memory.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    content: Content,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Gguf {
    /// Opens `path` and reads its metadata; tensors are read when they are asked for.
    ///
    /// # Errors
    /// If it cannot be opened or is not a GGUF file.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io = |source| GgufError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only; a file that is changed while it is mapped is outside what a
        // program can guard against.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let content = Content::read(&mut Cursor::new(&map[..]))
            .map_err(|e| GgufError::Unreadable { path: path.to_owned(), message: first_line(&e) })?;
        Ok(Self { path: path.to_owned(), map, content })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// The tensors' names and shapes (rows first).
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.content.tensor_infos.iter().map(|(name, info)| (name.as_str(), info.shape.dims()))
    }

    /// A tensor's shape, rows first; none if there is no such tensor.
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.content.tensor_infos.get(tensor).map(|info| info.shape.dims())
    }

    /// How many tensors there are of each number format, as `Q4_1 × 210`.
    pub fn formats(&self) -> String {
        let mut counts = BTreeMap::<String, usize>::new();
        for info in self.content.tensor_infos.values() {
            *counts.entry(format_name(info.ggml_dtype)).or_default() += 1;
        }
        counts.into_iter().map(|(format, n)| format!("{format} × {n}")).collect::<Vec<_>>().join(", ")
    }

    /// A tensor as f32, row-major.
    ///
    /// # Errors
    /// If it is not there or the file is cut short.
    pub fn dequantised(&self, tensor: &str) -> Result<Vec<f32>, GgufError> {
        let Some(info) = self.content.tensor_infos.get(tensor) else {
            return Err(self.unreadable(format!("tensor {tensor} is missing")));
        };
        let read = || {
            let mut file = Cursor::new(&self.map[..]);
            let tensor = info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
        };
        read()
            .map_err(|e: candle_core::Error| self.unreadable(format!("tensor {tensor}: {}", first_line(&e))))
    }

    /// Text; none where the key is absent.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.value(key, "text", |v| v.to_string().ok().map(String::as_str))
    }

    /// A flag; none where the key is absent.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.value(key, "true or false", |v| v.to_bool().ok())
    }

    /// A count or an id; none where the key is absent.
    pub fn count(&self, key: &str) -> Result<Option<usize>, GgufError> {
        self.value(key, "a whole number", |v| usize::try_from(integer(v)?).ok())
    }

    /// A token id; none where the key is absent.
    pub fn id(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.value(key, "a token id", |v| u32::try_from(integer(v)?).ok())
    }

    /// A real number; none where the key is absent.
    pub fn real(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.value(key, "a number", real)
    }

    /// A list of texts; none where the key is absent.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        self.value(key, "a list of texts", |v| {
            v.to_vec().ok()?.iter().map(|v| v.to_string().ok().map(String::as_str)).collect()
        })
    }

    /// A list of numbers; none where the key is absent.
    pub fn reals(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        self.value(key, "a list of numbers", |v| v.to_vec().ok()?.iter().map(real).collect())
    }

    /// What a key must have.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, GgufError> {
        value.ok_or_else(|| GgufError::Missing { path: self.path.clone(), key: key.to_owned() })
    }

    /// The error about something that is not implemented.
    pub fn unsupported(&self, what: String, supported: impl Into<String>) -> GgufError {
        GgufError::Unsupported { path: self.path.clone(), what, supported: supported.into() }
    }

    fn unreadable(&self, message: String) -> GgufError {
        GgufError::Unreadable { path: self.path.clone(), message }
    }

    fn value<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(GgufError::Type { path: self.path.clone(), key: key.to_owned(), expected }),
        }
    }
}

/// Writers choose any of the integer types.
fn integer(value: &Value) -> Option<i128> {
    Some(match *value {
        Value::U8(v) => v.into(),
        Value::I8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::U32(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::U64(v) => v.into(),
        Value::I64(v) => v.into(),
        _ => return None,
    })
}

fn real(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(v) => Some(f64::from(v)),
        Value::F64(v) => Some(v),
        _ => integer(value).map(|v| v as f64),
    }
}

/// The name as llama.cpp writes it.
fn format_name(format: GgmlDType) -> String {
    let name = format!("{format:?}");
    match name.strip_suffix('K') {
        Some(number) => format!("{number}_K"),
        None => name,
    }
}

/// candle's errors go on with a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::quantized::{QTensor, gguf_file};
    use candle_core::{Shape, Tensor};

    use super::*;

    /// Writes a file of these metadata and tensors (values, shape, format).
    pub(crate) fn write(
        path: &Path,
        metadata: &[(&str, Value)],
        tensors: &[(String, Vec<f32>, Vec<usize>, GgmlDType)],
    ) {
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, values, shape, format)| {
                let t = Tensor::from_vec(values.clone(), Shape::from(shape.clone()), &Device::Cpu).unwrap();
                (name.as_str(), QTensor::quantize(&t, *format).unwrap())
            })
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    #[test]
    fn metadata_of_any_integer_type_is_read_and_wrong_types_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let tensor = ("t".to_owned(), vec![1.5; 64], vec![2, 32], GgmlDType::Q8_0);
        let metadata = [
            ("a", Value::U64(7)),
            ("b", Value::I32(-1)),
            ("c", Value::String("text".into())),
            ("d", Value::Array(vec![Value::F32(0.5), Value::F32(2.0)])),
        ];
        write(&path, &metadata, &[tensor]);
        let file = Gguf::open(&path).unwrap();
        assert_eq!((file.count("a").unwrap(), file.count("none").unwrap()), (Some(7), None));
        assert_eq!(file.reals("d").unwrap(), Some(vec![0.5, 2.0]));
        assert_eq!((file.shape("t"), file.formats()), (Some(&[2, 32][..]), "Q8_0 × 1".to_owned()));
        assert!(file.dequantised("t").unwrap().iter().all(|v| (v - 1.5).abs() < 0.01));
        for error in [file.count("b").unwrap_err(), file.flag("c").unwrap_err(), file.id("d").unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("m.gguf") && error.contains("is not"), "{error}");
        }
        assert!(file.dequantised("u").unwrap_err().to_string().contains("tensor u is missing"));
    }

    #[test]
    fn a_file_that_is_none_or_is_cut_short_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        assert!(matches!(Gguf::open(&path), Err(GgufError::Io { .. })));
        for bytes in
            [&b""[..], b"PK\x03\x04 something else", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f"]
        {
            std::fs::write(&path, bytes).unwrap();
            let error = Gguf::open(&path).unwrap_err().to_string();
            assert!(error.contains("m.gguf"), "{error}");
        }
        write(&path, &[], &[("t".to_owned(), vec![1.0; 4096], vec![64, 64], GgmlDType::F32)]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1000]).unwrap();
        let error = Gguf::open(&path).unwrap().dequantised("t").unwrap_err().to_string();
        assert!(error.contains("tensor t"), "{error}");
    }
}
