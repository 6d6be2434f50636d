//! Rotary positions and the paged cache's places.

use crate::AttentionShape;

/// Rotates `rows` of `heads` heads of `head_dim` elements in place: element `i` of a head pairs with
/// `i + head_dim / 2`; `frequencies` are the pairs' rotations a position.
pub fn rotate(rows: &mut [f64], heads: usize, head_dim: usize, positions: &[u32], frequencies: &[f64]) {
    let half = head_dim / 2;
    for (row, &position) in rows.chunks_exact_mut(heads * head_dim).zip(positions) {
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (sin, cos) = (f64::from(position) * frequencies[i]).sin_cos();
                (low[i], high[i]) = (low[i] * cos - high[i] * sin, high[i] * cos + low[i] * sin);
            }
        }
    }
}

/// Where the first element of `kv_head` of the token at `kv_row` = block · block_size + offset lies in a
/// layer's keys or values.
pub fn cache_at(shape: &AttentionShape, kv_row: usize, kv_head: usize) -> usize {
    let (block, offset) = (kv_row / shape.block_size, kv_row % shape.block_size);
    ((block * shape.kv_heads + kv_head) * shape.block_size + offset) * shape.head_dim
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_moves_the_first_half_into_the_second() {
        let quarter = std::f64::consts::FRAC_PI_2;
        let mut row = vec![1.0, 2.0, 3.0, 4.0];
        rotate(&mut row, 1, 4, &[1], &[quarter, 2.0 * quarter]);
        for (got, want) in row.iter().zip([-3.0, -2.0, 1.0, -4.0]) {
            assert!((got - want).abs() < 1e-12, "{row:?}");
        }
    }

    #[test]
    fn a_token_lies_behind_the_heads_and_offsets_before_it() {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 32, block_size: 8 };
        assert_eq!(cache_at(&shape, 0, 1), 8 * 32);
        assert_eq!(cache_at(&shape, 3 * 8 + 5, 1), (3 * 2 * 8 + 8 + 5) * 32);
    }
}
