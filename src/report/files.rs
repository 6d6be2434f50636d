//! Writing files so that an interruption leaves the old one or the new one, never half of one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::workload::atomic::write_atomically;

/// A file that could not be read or written: which, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It could not be written.
    #[error("cannot write {}: {source}; choose another place for it or make its folder writable", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl FileError {
    /// A failed write of `path`.
    pub fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    /// A failed read of `path`.
    pub fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }
}

/// Replaces `path` by `bytes`: written beside it under a temporary name, made durable, renamed. The
/// folder is created where it is missing.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<(), FileError> {
    let path = path.as_ref();
    create_parent(path)
        .and_then(|()| write_atomically(path, |out| out.write_all(bytes)))
        .map_err(|e| FileError::write(path, e))
}

/// Whether `path` can be written, asked before the work whose result goes there. Leaves no trace but
/// the folder.
pub fn check_writable(path: impl AsRef<Path>) -> Result<(), FileError> {
    let path = path.as_ref();
    let try_it = || -> io::Result<()> {
        create_parent(path)?;
        if path.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory));
        }
        if path.exists() {
            return OpenOptions::new().append(true).open(path).map(drop);
        }
        File::create_new(path)?;
        fs::remove_file(path)
    };
    try_it().map_err(|e| FileError::write(path, e))
}

/// Whether there is a file with something in it.
pub fn is_begun(path: impl AsRef<Path>) -> bool {
    path.as_ref().metadata().is_ok_and(|m| m.len() > 0)
}

/// Appends `bytes` in one write, so that rows of several writers never interleave. Creates the file
/// and its folder where they are missing.
pub fn append(path: impl AsRef<Path>, bytes: &[u8]) -> Result<(), FileError> {
    let path = path.as_ref();
    create_parent(path)
        .and_then(|()| OpenOptions::new().append(true).create(true).open(path))
        .and_then(|mut file| file.write_all(bytes))
        .map_err(|e| FileError::write(path, e))
}

/// The whole text of a file.
pub fn read_text(path: impl AsRef<Path>) -> Result<String, FileError> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|e| FileError::read(path, e))
}

fn create_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => fs::create_dir_all(folder),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/result.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let below = file.join("result.csv");
        for error in [check_writable(&below).unwrap_err(), write_atomic(&below, b"x").unwrap_err()] {
            assert!(error.to_string().contains("file/result.csv"), "{error}");
        }
        assert!(check_writable(dir.path()).is_err());
    }

    #[test]
    fn checking_leaves_no_file_and_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("result.csv");
        check_writable(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "kept").unwrap();
        check_writable(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
    }
}
