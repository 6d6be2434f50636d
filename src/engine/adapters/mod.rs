//! Adapters in host memory, each one slab in the layout of a slot, and on the disk behind it.

mod directory;
mod disk;
mod error;
mod generate;
mod kept;
mod layout;
mod peft;
mod pool;
mod slab;

pub use directory::{AdapterView, Tier};
pub(in crate::engine) use directory::{Directory, NameTaken};
pub use disk::DiskTier;
pub use error::PoolError;
pub use kept::HostAdapter;
pub(in crate::engine) use kept::KeptAdapter;
pub use layout::{AdapterLayout, Part};
pub use peft::{PeftError, adapter_folders, read_peft};
pub use pool::HostPool;
pub use slab::{HostSlabs, Slab, SlabMaker};
