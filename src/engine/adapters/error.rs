//! What can be wrong with a pool's adapters.

use std::path::PathBuf;

use super::peft::PeftError;

/// A pool that cannot be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Ranks to generate adapters with.
    #[error(
        "adapter rank {rank} is not between 1 and the largest rank, {max_rank}: change --ranks or --max-r"
    )]
    Rank {
        /// The rank.
        rank: usize,
        /// The largest.
        max_rank: usize,
    },
    /// Fewer folders than adapters.
    #[error(
        "{folder}: {found} adapter folders, {wanted} adapters wanted: lower --total-loras or add folders"
    )]
    TooFew {
        /// The folder of folders.
        folder: String,
        /// Folders in it.
        found: usize,
        /// Adapters wanted.
        wanted: usize,
    },
    /// A file of the disk tier.
    #[error("{}: {message}", path.display())]
    Disk {
        /// It.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter on disk is not what it was.
    #[error(
        "adapter {name}: {} is not what it was when it was loaded ({what}): unload it and load it again",
        path.display()
    )]
    Changed {
        /// The adapter.
        name: String,
        /// Its folder or file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A folder that cannot be used.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// No memory for a slab.
    #[error("adapter {name}: {message}")]
    Slab {
        /// The adapter.
        name: String,
        /// What failed.
        message: String,
    },
}
