//! The disk behind the host pool.
//!
//! An adapter that was read from a PEFT folder is read from there again. A generated one is written to a
//! file when it is made: drawing it anew would take longer than reading it and would not be a read, and
//! what a disk tier costs is what one wants to see. Either way a checksum of the packed matrices is kept
//! from the first time, so that a file that has changed or rotted is never served.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::error::PoolError;
use super::slab::{Slab, SlabMaker};

/// How many adapters host memory holds, and where the others lie.
#[derive(Debug)]
pub struct DiskTier {
    host_loras: usize,
    /// Where generated adapters are written; none is a temporary folder, made when it is wanted and
    /// removed with the pool.
    folder: Option<PathBuf>,
    temporary: OnceLock<tempfile::TempDir>,
}

impl DiskTier {
    /// Room for `host_loras` adapters in host memory; generated ones are written to `folder`.
    pub fn new(host_loras: usize, folder: Option<PathBuf>) -> Self {
        Self { host_loras, folder, temporary: OnceLock::new() }
    }

    /// Adapters in host memory, at most.
    pub fn host_loras(&self) -> usize {
        self.host_loras
    }

    /// Makes the folder of generated adapters, if there is none yet.
    pub(super) fn prepare(&self) -> Result<&Path, PoolError> {
        let failed = |path: PathBuf, e: std::io::Error| PoolError::Disk { path, message: e.to_string() };
        if let Some(folder) = &self.folder {
            std::fs::create_dir_all(folder).map_err(|e| failed(folder.clone(), e))?;
            return Ok(folder);
        }
        if self.temporary.get().is_none() {
            let made = tempfile::Builder::new().prefix("lora-hbm-adapters-").tempdir();
            // Another thread's folder serves as well; this one's is removed by its drop.
            let _ = self.temporary.set(made.map_err(|e| failed(std::env::temp_dir(), e))?);
        }
        Ok(self.temporary.get().map_or(Path::new("."), tempfile::TempDir::path))
    }
}

/// Where an adapter can be read again.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// A PEFT folder.
    Folder(PathBuf),
    /// A file of its packed matrices, which is the pool's own.
    Spilled(PathBuf),
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(path) | Self::Spilled(path) => path,
        }
    }
}

/// An adapter's copy on disk.
#[derive(Clone, Debug)]
pub(super) struct OnDisk {
    pub source: Source,
    /// CRC-32 of the packed matrices.
    pub checksum: u32,
}

/// CRC-32 of a slab's bytes.
pub(super) fn checksum(slab: &Slab) -> u32 {
    crc32fast::hash(slab.as_bytes())
}

/// Writes a slab to a new file, whole or not at all.
pub(super) fn spill(slab: &Slab, path: PathBuf) -> Result<OnDisk, PoolError> {
    let write = || {
        let part = path.with_extension("part");
        let mut file = File::create(&part)?;
        file.write_all(slab.as_bytes())?;
        drop(file);
        std::fs::rename(&part, &path)
    };
    write().map_err(|e| PoolError::Disk { path: path.clone(), message: e.to_string() })?;
    Ok(OnDisk { checksum: checksum(slab), source: Source::Spilled(path) })
}

/// Reads a spilled slab of `elements`.
pub(super) fn unspill(slabs: &dyn SlabMaker, elements: usize, path: &Path) -> Result<Slab, PoolError> {
    let failed = |message: String| PoolError::Disk { path: path.to_owned(), message };
    let mut file = File::open(path).map_err(|e| failed(e.to_string()))?;
    let found = file.metadata().map_err(|e| failed(e.to_string()))?.len();
    let expected = elements as u64 * slabs.element_bytes();
    if found != expected {
        return Err(failed(format!("it has {found} bytes and was written with {expected}")));
    }
    slabs.read(elements, &mut file).map_err(failed)
}
