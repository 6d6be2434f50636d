//! Causal attention over the paged cache: prefills as tiles of matrix products over gathered keys
//! and values, single rows straight from the blocks.

use gemm::Parallelism;

use super::kv::{KvLayer, KvShape};
use super::math::exponentials;
use super::matmul::{Mat, MatMut, multiply};
use super::simd::{MulAdd, vectorised};

/// Query rows of one tile: its scores over a context of a thousand tokens stay in a second-level cache.
const TILE: usize = 64;

/// Buffers for the largest context.
pub(super) struct Scratch {
    /// `[head_dim, context]`.
    keys: Vec<f32>,
    /// `[context, head_dim]`.
    values: Vec<f32>,
    /// `[TILE, context]`.
    scores: Vec<f32>,
}

impl Scratch {
    /// Elements of all buffers for contexts of up to `max_context` tokens.
    pub fn elements(shape: &KvShape, max_context: usize) -> usize {
        let context = max_context.next_multiple_of(shape.block_size);
        (2 * shape.head_dim + TILE) * context
    }

    pub fn new(shape: &KvShape, max_context: usize) -> Self {
        let context = max_context.next_multiple_of(shape.block_size);
        Self {
            keys: super::memory::committed(shape.head_dim * context),
            values: super::memory::committed(shape.head_dim * context),
            scores: super::memory::committed(TILE * context),
        }
    }
}

/// One sequence's queries and where their results go.
pub(super) struct Rows<'a> {
    /// `[len, qkv_stride]`, queries in the first `heads · head_dim` columns.
    pub queries: &'a [f32],
    pub qkv_stride: usize,
    /// `[len, heads · head_dim]`.
    pub out: &'a mut [f32],
    pub len: usize,
    pub heads: usize,
    /// Tokens in the cache, these rows' included.
    pub context: usize,
    /// Block ids of the context.
    pub blocks: &'a [u32],
}

/// Attention of one sequence's rows.
pub(super) fn attend(
    layer: &KvLayer,
    shape: &KvShape,
    rows: Rows<'_>,
    scratch: &mut Scratch,
    threads: Parallelism,
) {
    if rows.len == 1 {
        attend_one(layer, shape, rows, scratch);
    } else {
        attend_tiles(layer, shape, rows, scratch, threads);
    }
}

fn attend_tiles(
    layer: &KvLayer,
    shape: &KvShape,
    rows: Rows<'_>,
    scratch: &mut Scratch,
    threads: Parallelism,
) {
    let dim = shape.head_dim;
    let width = rows.heads * dim;
    let group = rows.heads / shape.kv_heads;
    let start = rows.context - rows.len;
    let stride = rows.context.next_multiple_of(shape.block_size);
    let scale = 1.0 / (dim as f32).sqrt();
    for kv_head in 0..shape.kv_heads {
        layer.gather(shape, rows.blocks, kv_head, stride, &mut scratch.keys, &mut scratch.values);
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..rows.len).step_by(TILE) {
                let tile = TILE.min(rows.len - first);
                // No row of the tile sees further than its last row does.
                let span = start + first + tile;
                let queries = Mat {
                    data: &rows.queries[first * rows.qkv_stride + head * dim..],
                    rows: tile,
                    cols: dim,
                    stride: rows.qkv_stride,
                };
                let keys = Mat { data: &scratch.keys, rows: dim, cols: span, stride };
                let scores = MatMut { data: &mut scratch.scores, rows: tile, cols: span, stride };
                multiply(scores, false, scale, queries, keys, threads);

                let mut sums = [0.0f32; TILE];
                for (row, sum) in sums[..tile].iter_mut().enumerate() {
                    let scores = &mut scratch.scores[row * stride..row * stride + span];
                    let (seen, hidden) = scores.split_at_mut(start + first + row + 1);
                    *sum = exponentials(seen);
                    hidden.fill(0.0);
                }
                let scores = Mat { data: &scratch.scores, rows: tile, cols: span, stride };
                let values = Mat::dense(&scratch.values, span, dim);
                let at = first * width + head * dim;
                let out = MatMut { data: &mut rows.out[at..], rows: tile, cols: dim, stride: width };
                multiply(out, false, 1.0, scores, values, threads);
                for (row, sum) in sums[..tile].iter().enumerate() {
                    let at = (first + row) * width + head * dim;
                    rows.out[at..at + dim].iter_mut().for_each(|o| *o *= 1.0 / sum);
                }
            }
        }
    }
}

/// Positions whose scores are summed side by side; divides every block size.
const LANES: usize = 8;

fn attend_one(layer: &KvLayer, shape: &KvShape, rows: Rows<'_>, scratch: &mut Scratch) {
    let dim = shape.head_dim;
    let group = rows.heads / shape.kv_heads;
    let scale = 1.0 / (dim as f32).sqrt();
    for head in 0..rows.heads {
        let kv_head = head / group;
        let query = &rows.queries[head * dim..(head + 1) * dim];
        for (block, scores) in rows.blocks.iter().zip(scratch.scores.chunks_exact_mut(shape.block_size)) {
            block_scores(query, layer.keys(shape, *block as usize, kv_head), scale, scores);
        }
        let scores = &mut scratch.scores[..rows.context];
        let sum = exponentials(scores);
        let out = &mut rows.out[head * dim..(head + 1) * dim];
        out.fill(0.0);
        for (block, weights) in rows.blocks.iter().zip(scores.chunks(shape.block_size)) {
            add_weighted(weights, layer.values(shape, *block as usize, kv_head), out);
        }
        out.iter_mut().for_each(|o| *o *= 1.0 / sum);
    }
}

vectorised! {
    /// `scores[j] = scale · Σ_d query[d] · keys[d][j]`; `keys` is `[head_dim, scores.len()]`.
    fn block_scores(query: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) = block_scores_body;
}

#[inline(always)]
fn block_scores_body<M: MulAdd>(query: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    let width = scores.len();
    for (i, out) in scores.chunks_exact_mut(LANES).enumerate() {
        let mut sums = [0.0f32; LANES];
        for (q, row) in query.iter().zip(keys.chunks_exact(width)) {
            for (sum, key) in sums.iter_mut().zip(&row[i * LANES..(i + 1) * LANES]) {
                *sum = M::mul_add(*q, *key, *sum);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = scale * sum;
        }
    }
}

vectorised! {
    /// `out += Σ_j weights[j] · values[j]`; `values` is `[_, out.len()]`.
    fn add_weighted(weights: &[f32], values: &[f32], out: &mut [f32]) = add_weighted_body;
}

#[inline(always)]
fn add_weighted_body<M: MulAdd>(weights: &[f32], values: &[f32], out: &mut [f32]) {
    for (weight, row) in weights.iter().zip(values.chunks_exact(out.len())) {
        for (out, value) in out.iter_mut().zip(row) {
            *out = M::mul_add(*weight, *value, *out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    fn noise(n: usize, salt: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + salt) * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Softmax of scores over earlier positions, in f64, straight from the definition.
    fn reference(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f64> {
        let scale = 1.0 / (q.len() as f64).sqrt();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let weights: Vec<f64> = keys.iter().map(|k| (dot(q, k) * scale).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..q.len())
            .map(|d| weights.iter().zip(values).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / total)
            .collect()
    }

    #[test]
    fn tiles_and_single_rows_match_the_definition() {
        let shape = KvShape { kv_heads: 2, head_dim: 8, block_size: 8, blocks: 40 };
        let (heads, context) = (4, 150);
        let blocks: Vec<u32> = (0..19).map(|i| (i * 7 + 3) % 40).collect();
        let kv_width = 16;
        let (keys, values) = (noise(context * kv_width, 1), noise(context * kv_width, 99));
        let mut layer = KvLayer::new(&shape);
        for i in 0..context {
            let row = blocks[i / 8] as usize * 8 + i % 8;
            let columns = i * kv_width..(i + 1) * kv_width;
            layer.write(&shape, row, &keys[columns.clone()], &values[columns]);
        }
        let stride = heads * 8 + 2 * kv_width;
        let mut scratch = Scratch::new(&shape, 160);
        for len in [1, 2, 64, 149, 150] {
            let queries = noise(len * stride, 5);
            let mut out = vec![9.0; len * heads * 8];
            let rows = Rows {
                queries: &queries,
                qkv_stride: stride,
                out: &mut out,
                len,
                heads,
                context,
                blocks: &blocks,
            };
            attend(&layer, &shape, rows, &mut scratch, Parallelism::None);
            for row in 0..len {
                for head in 0..heads {
                    let seen = context - len + row + 1;
                    let columns = (head / 2) * 8..(head / 2 + 1) * 8;
                    let take = |all: &[f32]| -> Vec<Vec<f32>> {
                        all.chunks(kv_width).take(seen).map(|t| t[columns.clone()].to_vec()).collect()
                    };
                    let q = &queries[row * stride + head * 8..row * stride + head * 8 + 8];
                    let want = reference(q, &take(&keys), &take(&values));
                    for d in 0..8 {
                        let got = out[row * heads * 8 + head * 8 + d];
                        assert_relative_eq!(f64::from(got), want[d], epsilon = 1e-5);
                    }
                }
            }
        }
    }
}
