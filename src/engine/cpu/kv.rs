//! The paged KV cache.

/// Keys and values of one layer, in blocks. Keys lie `[block, kv head, head_dim, offset]` and values
/// `[block, kv head, offset, head_dim]`, so that scores and sums over a block both run along memory.
pub(super) struct KvLayer {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Shape of the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvShape {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_size: usize,
    pub blocks: usize,
}

impl KvShape {
    /// Elements of the keys, or of the values, of one head in one block.
    pub fn head_elements(&self) -> usize {
        self.block_size * self.head_dim
    }

    fn head_start(&self, block: usize, head: usize) -> usize {
        (block * self.kv_heads + head) * self.head_elements()
    }
}

impl KvLayer {
    pub fn new(shape: &KvShape) -> Self {
        let elements = shape.blocks * shape.kv_heads * shape.head_elements();
        Self { keys: super::memory::committed(elements), values: super::memory::committed(elements) }
    }

    /// Keys `[head_dim, block_size]` of one head in one block.
    pub fn keys(&self, shape: &KvShape, block: usize, head: usize) -> &[f32] {
        let start = shape.head_start(block, head);
        &self.keys[start..start + shape.head_elements()]
    }

    /// Values `[block_size, head_dim]` of one head in one block.
    pub fn values(&self, shape: &KvShape, block: usize, head: usize) -> &[f32] {
        let start = shape.head_start(block, head);
        &self.values[start..start + shape.head_elements()]
    }

    /// Writes one token's keys and values, both `[kv_heads · head_dim]`, to cache row `row`.
    pub fn write(&mut self, shape: &KvShape, row: usize, keys: &[f32], values: &[f32]) {
        let (block, offset) = (row / shape.block_size, row % shape.block_size);
        for head in 0..shape.kv_heads {
            let start = shape.head_start(block, head);
            let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
            let to = &mut self.keys[start + offset..start + shape.head_elements()];
            for (to, key) in to.iter_mut().step_by(shape.block_size).zip(&keys[columns.clone()]) {
                *to = *key;
            }
            let start = start + offset * shape.head_dim;
            self.values[start..start + shape.head_dim].copy_from_slice(&values[columns]);
        }
    }

    /// Gathers one head's keys of `context` tokens as `[head_dim, stride]` and its values as
    /// `[context, head_dim]`, rounded up to whole blocks.
    pub fn gather(
        &self,
        shape: &KvShape,
        blocks: &[u32],
        head: usize,
        stride: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        for (i, block) in blocks.iter().enumerate() {
            let first = i * shape.block_size;
            let from = self.keys(shape, *block as usize, head);
            for (d, row) in from.chunks_exact(shape.block_size).enumerate() {
                keys[d * stride + first..d * stride + first + shape.block_size].copy_from_slice(row);
            }
            values[first * shape.head_dim..(first + shape.block_size) * shape.head_dim]
                .copy_from_slice(self.values(shape, *block as usize, head));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_gathered_back() {
        let shape = KvShape { kv_heads: 2, head_dim: 4, block_size: 8, blocks: 3 };
        let mut layer = KvLayer::new(&shape);
        let blocks = [2u32, 0];
        let token = |i: usize, plus: usize| (0..8).map(|c| (i * 100 + c + plus) as f32).collect::<Vec<_>>();
        for i in 0..11 {
            let row = blocks[i / 8] as usize * 8 + i % 8;
            layer.write(&shape, row, &token(i, 0), &token(i, 5000));
        }
        let (mut keys, mut values) = (vec![0.0; 4 * 16], vec![0.0; 16 * 4]);
        layer.gather(&shape, &blocks, 1, 16, &mut keys, &mut values);
        for i in 0..11 {
            for d in 0..4 {
                assert_eq!(keys[d * 16 + i], (i * 100 + 4 + d) as f32);
                assert_eq!(values[i * 4 + d], (i * 100 + 4 + d + 5000) as f32);
            }
        }
    }
}
