//! The graphs of steps: what each is for, and which one a step takes.

use std::collections::HashMap;

use lora_kernels::{Graph, SMALL_ROWS};

use super::shape::{Composition, Part, StepShape, rounded, shapes};
use crate::engine::batch::BatchLimits;

/// Longest contexts for which decode graphs are recorded, besides the longest that there is: how a step's
/// attention is split among blocks depends on it.
const CONTEXTS: [usize; 4] = [256, 512, 1024, 2048];
/// The same for the single rows of steps with chunks, where they are a smaller part of the time.
const MIXED_CONTEXTS: [usize; 1] = [1024];
/// Steps with chunks are graphs up to this many rows: beyond, launches take less time than the arithmetic that
/// they run ahead of.
const MIXED_ROWS: usize = 1024;
/// Their rows up to one multiple of 64 are rounded up further: all such products are bound by their weights.
const FEW_ROWS: [usize; 4] = [8, 16, 32, 64];
/// Sequences of several rows of a step that is a graph, at most. A graph's grids have room for the tiles of as
/// many, and blocks without one cost time. Steps of more are launched kernel by kernel.
const MOST_CHUNKS: usize = 4;
/// Single rows beside chunks for which graphs are recorded, besides as many as there can be.
const SINGLES: [usize; 1] = [32];
/// Up to this many rows, a step whose chunks are short enough takes the kernels for small segments alone.
const SMALL_ALONE_ROWS: usize = 32;

/// The kernels that a step's adapters take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Adapters {
    /// No row has one.
    None,
    /// Those for segments of few rows.
    Small,
    /// Those for segments of many rows, whatever theirs have.
    Large,
    /// Single rows and short chunks those for few, others those for many.
    Both,
}

impl Adapters {
    pub const fn small(self) -> bool {
        matches!(self, Self::Small | Self::Both)
    }

    pub const fn large(self) -> bool {
        matches!(self, Self::Large | Self::Both)
    }

    /// Whether a part of a segment goes to the kernels for many rows.
    pub const fn is_large(self, part: &Part) -> bool {
        part.chunks && (part.rows as usize > SMALL_ROWS || !self.small())
    }
}

/// What one recorded graph is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// Rows, rounded up.
    pub rows: usize,
    /// Whether there are sequences of several rows: a step without is a decode.
    pub chunks: bool,
    /// Sequences of one row, rounded up.
    pub singles: usize,
    /// The longest context of those, rounded up; zero without any.
    pub context: usize,
    /// What adapters there are.
    pub adapters: Adapters,
}

impl GraphKey {
    /// What the graph's launches are made for, where there are up to `seqs` sequences.
    pub fn shape(&self, seqs: usize) -> StepShape {
        // A chunk has two rows at least.
        let chunks = if self.chunks { MOST_CHUNKS.min(self.rows / 2).min(seqs) } else { 0 };
        let segments = (self.adapters.small(), self.adapters.large());
        StepShape::bounds(self.rows, self.singles, self.context, chunks, seqs, segments)
    }
}

/// Which steps are graphs, for an executor's limits.
#[derive(Clone, Debug)]
pub(super) struct GraphKeys {
    seqs: usize,
    contexts: Vec<usize>,
    mixed_rows: Vec<usize>,
    mixed_singles: Vec<usize>,
    mixed_contexts: Vec<usize>,
}

impl GraphKeys {
    /// `limits` are rounded up.
    pub fn new(limits: &BatchLimits) -> Self {
        let BatchLimits { max_num_seqs: seqs, max_num_batched_tokens: rows, max_model_len: longest, .. } =
            *limits;
        let and_last = |below: &[usize], last: usize| {
            let mut all: Vec<usize> = below.iter().copied().filter(|b| *b < last).collect();
            all.push(last);
            all
        };
        let large = shapes(MIXED_ROWS).into_iter().filter(|r| r.is_multiple_of(64));
        let mut mixed_rows: Vec<usize> = FEW_ROWS.into_iter().chain(large).collect();
        mixed_rows.dedup();
        if rows <= MIXED_ROWS {
            mixed_rows = and_last(&mixed_rows, rows);
        }
        Self {
            seqs,
            contexts: and_last(&CONTEXTS, longest),
            mixed_rows,
            mixed_singles: and_last(&SINGLES, seqs),
            mixed_contexts: and_last(&MIXED_CONTEXTS, longest),
        }
    }

    /// The graph of a step; none if it is to be launched kernel by kernel.
    pub fn key(&self, of: &Composition) -> Option<GraphKey> {
        let Composition { rows, singles, longest, chunks, adapted, largest } = *of;
        let up = |to: &[usize], from: usize| to.iter().copied().find(|b| *b >= from);
        if chunks == 0 {
            let (rows, context) = (rounded(rows), up(&self.contexts, longest)?);
            let adapters = if adapted { Adapters::Small } else { Adapters::None };
            return Some(GraphKey { rows, chunks: false, singles: rows, context, adapters });
        }
        if chunks > MOST_CHUNKS {
            return None;
        }
        let rows = up(&self.mixed_rows, rows)?;
        let adapters = match (adapted, singles) {
            (false, _) => Adapters::None,
            (true, _) if largest <= SMALL_ROWS && rows <= SMALL_ALONE_ROWS => Adapters::Small,
            (true, 0) => Adapters::Large,
            (true, _) => Adapters::Both,
        };
        let (singles, context) = match singles {
            0 => (0, 0),
            _ => (up(&self.mixed_singles, singles)?.min(rows), up(&self.mixed_contexts, longest)?),
        };
        Some(GraphKey { rows, chunks: true, singles, context, adapters })
    }

    /// Every key that [`GraphKeys::key`] gives.
    pub fn all(&self) -> Vec<GraphKey> {
        let mut keys = Vec::new();
        for rows in shapes(self.seqs) {
            for &context in &self.contexts {
                let of = |adapters| GraphKey { rows, chunks: false, singles: rows, context, adapters };
                keys.extend([Adapters::None, Adapters::Small].map(of));
            }
        }
        for &rows in &self.mixed_rows {
            let mut singles: Vec<usize> = self.mixed_singles.iter().map(|s| *s.min(&rows)).collect();
            singles.dedup();
            // A single row beside a chunk is another sequence's.
            singles.retain(|_| self.seqs > 1 && rows > 2);
            let with = singles.iter().flat_map(|s| self.mixed_contexts.iter().map(|c| (*s, *c)));
            for (singles, context) in std::iter::once((0, 0)).chain(with) {
                let mut kinds = vec![Adapters::None];
                // More rows than a small segment takes are several sequences'.
                let alone = if self.seqs > 1 { SMALL_ALONE_ROWS } else { SMALL_ROWS };
                if rows <= alone {
                    kinds.push(Adapters::Small);
                }
                if rows > SMALL_ROWS {
                    kinds.push(if singles == 0 { Adapters::Large } else { Adapters::Both });
                }
                let of = |adapters| GraphKey { rows, chunks: true, singles, context, adapters };
                keys.extend(kinds.into_iter().map(of));
            }
        }
        keys
    }

    /// Kernels of all graphs together, roughly: what their memory follows.
    pub fn kernels(&self, layers: usize) -> usize {
        // Norms, products, positions and the activation; attention; two kernels for each product's adapters.
        let in_layer = |key: &GraphKey| {
            let attention = usize::from(key.chunks) + usize::from(key.singles > 0);
            8 + attention + 8 * (usize::from(key.adapters.small()) + usize::from(key.adapters.large()))
        };
        self.all().iter().map(|key| layers * in_layer(key)).sum()
    }
}

/// Recorded steps.
#[derive(Default)]
pub(super) struct Graphs(HashMap<GraphKey, Graph>);

impl Graphs {
    pub fn get(&mut self, key: &GraphKey) -> Option<&mut Graph> {
        self.0.get_mut(key)
    }

    pub fn insert(&mut self, key: GraphKey, graph: Graph) {
        self.0.insert(key, graph);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use lora_kernels::{PREFILL_ROWS, Segment, TILE_ROWS, covers};

    use super::super::shape::{padded, parts};
    use super::*;
    use crate::engine::model::narrows;

    fn limits(seqs: usize, rows: usize, longest: usize) -> BatchLimits {
        BatchLimits {
            max_num_seqs: seqs,
            max_num_batched_tokens: rows,
            max_model_len: longest,
            block_size: 16,
            kv_blocks: 0,
        }
    }

    #[test]
    fn a_decodes_key_covers_the_longest_context() {
        let keys = GraphKeys::new(&limits(16, 4096, 4352));
        let decode = |rows, longest, adapted| Composition {
            rows,
            singles: rows,
            longest,
            adapted,
            ..Composition::default()
        };
        let expected =
            GraphKey { rows: 4, chunks: false, singles: 4, context: 512, adapters: Adapters::Small };
        assert_eq!(keys.key(&decode(3, 512, true)), Some(expected));
        assert_eq!(keys.key(&decode(16, 513, false)).unwrap().context, 1024);
        assert_eq!(keys.key(&decode(16, 4352, false)).unwrap().context, 4352);
        assert_eq!(keys.all().iter().filter(|k| !k.chunks).count(), 5 * 5 * 2);
    }

    #[test]
    fn a_servers_graphs_are_few() {
        let count = |seqs, rows, longest| GraphKeys::new(&limits(seqs, rows, longest)).all().len();
        // 19 shapes of rows, each with no single rows or some in two contexts, and two kinds of adapters; three at 32.
        assert_eq!(count(16, 4096, 4352), 50 + 19 * 3 * 2 + 3);
        assert!(count(256, 8192, 4352) < 350, "{}", count(256, 8192, 4352));
        assert!(count(6, 256, 96) < 100);
    }

    /// A sequence's rows, its context and its adapter.
    type Seq = (usize, usize, Option<u32>);

    /// What [`Composition::of`] makes of a batch, and its parts: sequences are ordered as the batch orders them.
    fn compose(seqs: &mut [Seq]) -> (Composition, Vec<Part>) {
        seqs.sort_by_key(|s| (s.0 > 1, s.2));
        compose_in_order(seqs)
    }

    /// The same of sequences in the order that they have.
    fn compose_in_order(seqs: &[Seq]) -> (Composition, Vec<Part>) {
        let mut segments: Vec<(u32, u32, u32)> = Vec::new();
        let mut at = 0;
        for (rows, _, adapter) in seqs {
            let rows = *rows as u32;
            if let Some(adapter) = *adapter {
                match segments.last_mut() {
                    Some((a, start, len)) if *a == adapter && *start + *len == at => *len += rows,
                    _ => segments.push((adapter, at, rows)),
                }
            }
            at += rows;
        }
        let singles: Vec<_> = seqs.iter().filter(|s| s.0 == 1).collect();
        let parts: Vec<_> =
            segments.iter().flat_map(|(_, start, rows)| parts(*start, *rows, singles.len() as u32)).collect();
        let of = Composition {
            rows: at as usize,
            singles: singles.len(),
            longest: singles.iter().map(|s| s.1).max().unwrap_or(0),
            chunks: seqs.len() - singles.len(),
            adapted: !segments.is_empty(),
            largest: parts.iter().filter(|p| p.chunks).map(|p| p.rows as usize).max().unwrap_or(0),
        };
        (of, parts)
    }

    #[test]
    fn every_batch_of_few_rows_and_chunks_has_a_recorded_key_that_holds_it() {
        let mut state = 1u64;
        let mut below = |end: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % end
        };
        for (seqs, rows, longest) in [
            (16, 4096, 4352),
            (256, 8192, 4352),
            (6, 256, 96),
            (1, 512, 512),
            (3, 20, 64),
            (40, 40, 900),
            (2, 2, 9),
        ] {
            let limits = padded(&limits(seqs, rows, longest));
            let keys = GraphKeys::new(&limits);
            let all: HashSet<_> = keys.all().into_iter().collect();
            assert_eq!(all.len(), keys.all().len(), "a key twice");
            let row_shapes = shapes(limits.max_num_batched_tokens);
            let mut used = HashSet::new();
            for _ in 0..30_000 {
                let chunks = below(seqs.min(MOST_CHUNKS) + 1);
                // On every scale, so that small buckets are met as well.
                let singles = (below(seqs + 1) >> below(7)).min(seqs - chunks);
                let longest_single = longest >> below(6);
                let scale = below(7);
                let longest_chunk = 1 + below((rows >> scale).clamp(1, 1000));
                let adapters = below(4);
                let mut batch: Vec<Seq> = Vec::new();
                let mut left = rows;
                for i in 0..chunks + singles {
                    let len = if i < chunks { 2 + below(longest_chunk) } else { 1 };
                    if len > left {
                        break;
                    }
                    left -= len;
                    let adapter = below(adapters + 1);
                    let context = 1 + below(longest_single.max(1));
                    batch.push((len, context, (adapter > 0).then_some(adapter as u32)));
                }
                if batch.is_empty() {
                    continue;
                }
                let (of, parts) = compose(&mut batch);
                let Some(key) = keys.key(&of) else {
                    assert!(of.rows > MIXED_ROWS, "{of:?} has no key");
                    continue;
                };
                assert!(all.contains(&key), "{of:?}: {key:?} is not listed");
                used.insert(key);
                let shape = key.shape(limits.max_num_seqs);
                assert!(row_shapes.contains(&shape.rows), "{key:?}: no product was chosen for its rows");
                assert!(shape.seqs <= limits.max_num_seqs && shape.samples <= limits.max_num_seqs);
                let tiles = |lens: &mut dyn Iterator<Item = usize>, tile| {
                    lens.map(|l| l.div_ceil(tile)).sum::<usize>()
                };
                let large: Vec<_> = parts.iter().filter(|p| key.adapters.is_large(p)).collect();
                let mut covered = Vec::new();
                if shape.large > 0 {
                    let of = |p: &Part| Segment { start: p.start, rows: p.rows, ..Segment::NONE };
                    let segments: Vec<_> = large.iter().map(|p| of(p)).collect();
                    covers(&segments, shape.rows as u32, &mut covered);
                }
                // All sequences may sample: each is a row then, beside those of its adapter.
                let each: Vec<Seq> = batch.iter().map(|s| (1, s.1, s.2)).collect();
                let sampled = if shape.sampled > 0 { compose_in_order(&each).1.len() } else { 0 };
                let adapted = key.adapters != Adapters::None;
                assert_eq!(shape.sampled > 0, adapted && narrows(shape.rows, shape.samples));
                let chunk_lens = || batch.iter().filter(|s| s.0 > 1).map(|s| s.0);
                for (what, is, bound) in [
                    ("rows", of.rows, shape.rows),
                    ("sequences", batch.len(), shape.seqs),
                    ("singles", of.singles, shape.singles),
                    ("longest", of.longest, shape.longest),
                    ("attention tiles", tiles(&mut chunk_lens(), PREFILL_ROWS), shape.attention_tiles),
                    ("small", parts.len() - large.len(), shape.small),
                    ("sampled", sampled, shape.sampled),
                    ("covers", covered.len(), shape.covers),
                    ("large", large.len(), shape.large),
                    ("tiles", tiles(&mut large.iter().map(|p| p.rows as usize), TILE_ROWS), shape.lora_tiles),
                ] {
                    assert!(is <= bound, "{what}: {is} in {batch:?}, {bound} of {key:?}");
                }
            }
            assert_eq!(used.len(), all.len(), "{seqs} sequences of {rows} rows: keys that no batch has");
        }
    }

    #[test]
    fn steps_beyond_the_bounds_have_no_graph() {
        let keys = GraphKeys::new(&limits(16, 4096, 4352));
        let step = |rows, chunks| Composition { rows, chunks, ..Composition::default() };
        assert!(keys.key(&step(1024, 4)).is_some());
        assert_eq!(keys.key(&step(1025, 1)), None);
        assert_eq!(keys.key(&step(100, 5)), None);
    }
}
