//! Adapters in host memory: each one slab, in the layout of a slot.

mod generate;
mod layout;
mod peft;
mod pool;
mod slab;

pub use layout::{AdapterLayout, Part};
pub use peft::{PeftError, adapter_folders, read_peft};
pub use pool::{HostAdapter, HostPool, PoolError};
pub use slab::{HostSlabs, Slab, SlabMaker};
