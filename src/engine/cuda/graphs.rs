//! The shapes that steps are rounded up to, and the graphs of decode steps.

use std::collections::HashMap;

use lora_kernels::Graph;

use crate::engine::batch::BatchLimits;
pub(super) use crate::profile::rounded_rows as rounded;

/// Longest contexts for which decode graphs are recorded, besides the longest that there is: how a step's
/// attention is split among blocks depends on it.
const CONTEXTS: [usize; 4] = [256, 512, 1024, 2048];

/// Every shape up to `rows`.
pub(super) fn shapes(rows: usize) -> Vec<usize> {
    let last = rounded(rows);
    let mut shapes = vec![1];
    while let Some(&shape) = shapes.last().filter(|s| **s < last) {
        shapes.push(rounded(shape + 1));
    }
    shapes
}

/// Limits with rows and sequences rounded up: what buffers are made for.
pub(super) fn padded(limits: &BatchLimits) -> BatchLimits {
    let seqs = rounded(limits.max_num_seqs);
    BatchLimits {
        max_num_seqs: seqs,
        max_num_batched_tokens: rounded(limits.max_num_batched_tokens).max(seqs),
        ..*limits
    }
}

/// What one recorded graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// Rows, rounded up.
    pub rows: usize,
    /// The longest context, rounded up.
    pub context: usize,
    /// Whether some row has an adapter.
    pub adapters: bool,
}

/// Recorded decode steps.
pub(super) struct Graphs {
    contexts: Vec<usize>,
    recorded: HashMap<GraphKey, Graph>,
}

impl Graphs {
    pub fn new(max_model_len: usize) -> Self {
        let mut contexts: Vec<usize> = CONTEXTS.into_iter().filter(|c| *c < max_model_len).collect();
        contexts.push(max_model_len);
        Self { contexts, recorded: HashMap::new() }
    }

    /// The key for a decode of `rows` sequences.
    pub fn key(&self, rows: usize, longest: usize, adapters: bool) -> GraphKey {
        let fits = self.contexts.iter().find(|c| **c >= longest);
        let context = fits.copied().unwrap_or(longest);
        GraphKey { rows: rounded(rows), context, adapters }
    }

    /// Every key for up to `seqs` sequences.
    pub fn keys(&self, seqs: usize) -> Vec<GraphKey> {
        let mut keys = Vec::new();
        for rows in shapes(seqs) {
            for &context in &self.contexts {
                keys.extend([false, true].map(|adapters| GraphKey { rows, context, adapters }));
            }
        }
        keys
    }

    pub fn get(&mut self, key: &GraphKey) -> Option<&mut Graph> {
        self.recorded.get_mut(key)
    }

    pub fn insert(&mut self, key: GraphKey, graph: Graph) {
        self.recorded.insert(key, graph);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_a_shape_and_every_shape_is_listed() {
        let shapes = shapes(4096);
        for rows in 1..=4096 {
            let shape = rounded(rows);
            assert!(shape >= rows && shapes.contains(&shape), "{rows} rows as {shape}");
            assert_eq!(rounded(shape), shape);
        }
        assert_eq!(shapes[..6], [1, 2, 4, 8, 16, 24]);
        assert_eq!(super::shapes(16), [1, 2, 4, 8, 16]);
    }

    #[test]
    fn a_key_covers_the_longest_context() {
        let graphs = Graphs::new(4352);
        assert_eq!(graphs.key(3, 512, true), GraphKey { rows: 4, context: 512, adapters: true });
        assert_eq!(graphs.key(16, 513, false).context, 1024);
        assert_eq!(graphs.key(16, 4352, false).context, 4352);
        assert_eq!(graphs.keys(16).len(), 5 * 5 * 2);
        assert!(graphs.keys(16).contains(&graphs.key(9, 4000, true)));
    }
}
