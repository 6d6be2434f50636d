//! Adapters in host memory, each one slab in the layout of a slot, and on the disk behind it.

mod directory;
mod disk;
mod generate;
mod layout;
mod peft;
mod pool;
mod slab;

pub use directory::{AdapterView, Tier};
pub(in crate::engine) use directory::{Directory, NameTaken};
pub use disk::DiskTier;
pub use layout::{AdapterLayout, Part};
pub use peft::{PeftError, adapter_folders, read_peft};
pub(in crate::engine) use pool::KeptAdapter;
pub use pool::{HostAdapter, HostPool, PoolError};
pub use slab::{HostSlabs, Slab, SlabMaker};
