//! A binary min-heap over the items `0..n`, with the place of each item known.
//!
//! Insert, remove and re-key any item in O(log n), peek in O(1); no allocation after growth.
//! Equal keys leave in no particular order: callers make keys unique where order matters.

const ABSENT: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(crate) struct IndexedHeap<K> {
    heap: Vec<(K, u32)>,
    /// Item → index in `heap`, or `ABSENT`.
    place: Vec<u32>,
}

impl<K: Ord + Copy> IndexedHeap<K> {
    pub(crate) fn new(items: usize) -> Self {
        Self { heap: Vec::with_capacity(items), place: vec![ABSENT; items] }
    }

    /// Makes room for items up to `items - 1`.
    pub(crate) fn grow(&mut self, items: usize) {
        self.place.resize(items.max(self.place.len()), ABSENT);
    }

    pub(crate) fn contains(&self, item: u32) -> bool {
        self.place[item as usize] != ABSENT
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    /// The item with the least key.
    pub(crate) fn peek(&self) -> Option<(K, u32)> {
        self.heap.first().copied()
    }

    /// All items with their keys, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, u32)> + '_ {
        self.heap.iter().copied()
    }

    /// Inserts an item, or gives it another key.
    pub(crate) fn set(&mut self, item: u32, key: K) {
        let at = self.place[item as usize];
        if at == ABSENT {
            let at = self.heap.len();
            self.heap.push((key, item));
            self.place[item as usize] = at as u32;
            self.sift_up(at);
        } else {
            let before = std::mem::replace(&mut self.heap[at as usize].0, key);
            if key < before {
                self.sift_up(at as usize);
            } else if before < key {
                self.sift_down(at as usize);
            }
        }
    }

    /// Removes an item if it is there.
    pub(crate) fn remove(&mut self, item: u32) {
        let at = self.place[item as usize];
        if at == ABSENT {
            return;
        }
        self.place[item as usize] = ABSENT;
        let at = at as usize;
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            self.place[self.heap[at].1 as usize] = at as u32;
            let at = self.sift_up(at);
            self.sift_down(at);
        }
    }

    fn put(&mut self, at: usize, entry: (K, u32)) {
        self.place[entry.1 as usize] = at as u32;
        self.heap[at] = entry;
    }

    /// Moves what is at `at` up to where it belongs, and says where. The entry is put down once.
    fn sift_up(&mut self, mut at: usize) -> usize {
        let entry = self.heap[at];
        let from = at;
        while at > 0 {
            let parent = (at - 1) / 2;
            let above = self.heap[parent];
            if above.0 <= entry.0 {
                break;
            }
            self.put(at, above);
            at = parent;
        }
        if at != from {
            self.put(at, entry);
        }
        at
    }

    fn sift_down(&mut self, mut at: usize) {
        let entry = self.heap[at];
        let from = at;
        loop {
            let mut child = 2 * at + 1;
            if child >= self.heap.len() {
                break;
            }
            if child + 1 < self.heap.len() && self.heap[child + 1].0 < self.heap[child].0 {
                child += 1;
            }
            let below = self.heap[child];
            if entry.0 <= below.0 {
                break;
            }
            self.put(at, below);
            at = child;
        }
        if at != from {
            self.put(at, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::IndexedHeap;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn agrees_with_an_ordered_map(ops in prop::collection::vec((0u32..20, 0u64..50, any::<bool>()), 0..200)) {
            let mut heap = IndexedHeap::new(20);
            let mut model = BTreeMap::new();
            for (item, key, insert) in ops {
                if insert {
                    heap.set(item, (key, item));
                    model.insert(item, key);
                } else {
                    heap.remove(item);
                    model.remove(&item);
                }
                prop_assert_eq!(heap.contains(item), model.contains_key(&item));
                let least = model.iter().map(|(&i, &k)| ((k, i), i)).min();
                prop_assert_eq!(heap.peek(), least);
            }
        }
    }
}
