//! What an engine's memory goes to, and what there is.

/// A device's memory by purpose, known before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, as the device keeps them.
    pub weights: u64,
    /// Activations and scratch.
    pub workspace: u64,
    /// One slot: an adapter of the largest rank on every linear module.
    pub slot: u64,
    /// Slots.
    pub slots: u64,
    /// One block of the KV cache, all layers.
    pub kv_block: u64,
    /// Blocks.
    pub kv_blocks: u64,
}

impl MemoryPlan {
    /// Bytes of everything.
    pub fn total(&self) -> u64 {
        self.weights + self.workspace + self.slots * self.slot + self.kv_blocks * self.kv_block
    }

    /// KV blocks that `bytes` hold.
    pub fn kv_blocks_in(&self, bytes: u64) -> u64 {
        bytes / self.kv_block
    }
}

/// What the memory goes to, by purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryTable {
    /// Purpose and bytes.
    pub rows: Vec<(String, u64)>,
}

impl MemoryTable {
    /// Bytes of everything.
    pub fn total(&self) -> u64 {
        self.rows.iter().map(|r| r.1).sum()
    }
}

impl std::fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.rows.iter().map(|r| r.0.chars().count()).max().unwrap_or(0);
        for (what, bytes) in &self.rows {
            writeln!(f, "  {what:<width$} {:>10.3} GB", gb(*bytes))?;
        }
        write!(f, "  {:<width$} {:>10.3} GB", "total", gb(self.total()))
    }
}

/// Gigabytes (10⁹).
pub(super) fn gb(bytes: u64) -> f64 {
    bytes as f64 * 1e-9
}

/// Bytes that can be allocated without swapping: what the kernel says, or what is left of the control
/// group's limit. None where neither is told.
pub(super) fn free_memory() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let info = std::fs::read_to_string("/proc/meminfo").ok();
    let line = info.as_deref().and_then(|i| i.lines().find_map(|l| l.strip_prefix("MemAvailable:")));
    let machine = line
        .and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib.saturating_mul(1024));
    // Page cache counts against the group and is given back on demand; anonymous memory is not.
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").ok();
    let anonymous =
        stat.as_deref().and_then(|s| s.lines().find_map(|l| l.strip_prefix("anon ")?.parse().ok()));
    let group = number("/sys/fs/cgroup/memory.max").map(|max| max.saturating_sub(anonymous.unwrap_or(0)));
    match (machine, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
