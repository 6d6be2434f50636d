//! Paged causal attention, one row at a time.

use super::rope_kv::cache_at;
use crate::{AttentionShape, bf16};

/// One layer's cache, `[blocks, kv_heads, block_size, head_dim]` each.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// Keys.
    pub keys: &'a [bf16],
    /// Values.
    pub values: &'a [bf16],
}

/// Attention of one row's queries, `[heads, head_dim]`, over the first `seen` tokens of a sequence whose blocks
/// are `table`: softmax(q · K / sqrt(head_dim)) · V for each head, `[heads, head_dim]`.
pub fn attend(
    shape: &AttentionShape,
    queries: &[bf16],
    cache: Cache<'_>,
    table: &[u32],
    seen: usize,
) -> Vec<f64> {
    let &AttentionShape { heads, kv_heads, head_dim, block_size } = shape;
    let mut out = vec![0.0; heads * head_dim];
    for head in 0..heads {
        let query = &queries[head * head_dim..][..head_dim];
        let kv_head = head / (heads / kv_heads);
        let at = |token: usize| {
            cache_at(shape, table[token / block_size] as usize * block_size + token % block_size, kv_head)
        };
        let dot = |key: &[bf16]| query.iter().zip(key).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>();
        let scores: Vec<f64> = (0..seen)
            .map(|token| dot(&cache.keys[at(token)..][..head_dim]) / (head_dim as f64).sqrt())
            .collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        let to = &mut out[head * head_dim..][..head_dim];
        for (token, score) in scores.iter().enumerate() {
            let weight = (score - top).exp() / total;
            for (to, value) in to.iter_mut().zip(&cache.values[at(token)..][..head_dim]) {
                *to += weight * value.to_f64();
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_tokens_in_two_blocks_are_weighted_by_their_scores() {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 2, block_size: 1 };
        let b = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        // Block 0 is nobody's; the sequence's tokens lie in blocks 2 and 1.
        let keys = b(&[9.0, 9.0, 0.0, 1.0, 1.0, 0.0]);
        let values = b(&[9.0, 9.0, 0.0, 4.0, 8.0, 0.0]);
        let cache = Cache { keys: &keys, values: &values };
        let queries = b(&[2.0, 0.0, 0.0, 0.0]);
        let out = attend(&shape, &queries, cache, &[2, 1], 2);
        // Head 0 scores sqrt(2) and 0, head 1 zero twice.
        let w = 1.0 / (1.0 + (-2f64.sqrt()).exp());
        for (got, want) in out.iter().zip([8.0 * w, 4.0 * (1.0 - w), 4.0, 2.0]) {
            assert!((got - want).abs() < 1e-12, "{out:?}");
        }
        let first = attend(&shape, &queries, cache, &[2, 1], 1);
        assert_eq!(first, [8.0, 0.0, 8.0, 0.0]);
    }
}
