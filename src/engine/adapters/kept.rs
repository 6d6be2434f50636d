//! One adapter, in host memory or elsewhere.

use std::sync::Arc;

use lora_sched::AdapterSpec;

use super::disk::OnDisk;
use super::layout::AdapterLayout;
use super::slab::Slab;

/// One adapter in host memory.
#[derive(Debug)]
pub struct HostAdapter {
    /// What requests call it.
    pub name: String,
    /// Where its matrices are.
    pub layout: Arc<AdapterLayout>,
    /// Its matrices.
    pub slab: Slab,
}

impl HostAdapter {
    /// Bytes that a swap copies.
    pub fn bytes(&self) -> u64 {
        self.slab.bytes()
    }

    /// What the scheduler is told about it.
    pub fn spec(&self) -> AdapterSpec {
        AdapterSpec::new(self.layout.rank() as u32, self.bytes())
    }
}

/// An adapter as the pool keeps it: in host memory, on disk, or both.
#[derive(Clone, Debug)]
pub(in crate::engine) struct KeptAdapter {
    pub(super) name: String,
    pub(super) layout: Arc<AdapterLayout>,
    pub(super) spec: AdapterSpec,
    pub(super) held: Option<Arc<HostAdapter>>,
    /// Where it came from, if from a folder.
    pub(super) root: Option<String>,
    pub(super) disk: Option<OnDisk>,
}

impl KeptAdapter {
    pub(super) fn new(adapter: HostAdapter, root: Option<String>, disk: Option<OnDisk>, held: bool) -> Self {
        Self {
            name: adapter.name.clone(),
            layout: Arc::clone(&adapter.layout),
            spec: adapter.spec(),
            held: held.then(|| Arc::new(adapter)),
            root,
            disk,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder that it came from, or its own name if it was generated.
    pub fn root(&self) -> &str {
        self.root.as_deref().unwrap_or(&self.name)
    }

    pub fn spec(&self) -> AdapterSpec {
        self.spec
    }

    /// Its host copy, if there is one.
    pub fn into_memory(self) -> Option<Arc<HostAdapter>> {
        self.held
    }

    /// Whether it is in host memory.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }
}
