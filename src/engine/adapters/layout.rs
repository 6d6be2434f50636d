//! Where an adapter's matrices lie in its slab.

use std::ops::Range;

use crate::engine::model::ModelSpec;

/// One adapted module of one layer: `A` then `Bᵀ`, both row-major, so that both products read rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where `A` `[rank, inputs]` begins, in elements from the slab's start; `Bᵀ` `[rank, outputs]`
    /// follows it.
    pub offset: usize,
    /// Input width.
    pub inputs: usize,
    /// Output width.
    pub outputs: usize,
}

/// The offset table of an adapter that is packed at its own rank, in `[layer][module]` order.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    rank: usize,
    scale: f32,
    modules: usize,
    /// `[layers, modules]`; none where the adapter leaves a module alone.
    parts: Vec<Option<Part>>,
    /// `[layers + 1]` where each layer begins.
    layer_starts: Vec<usize>,
    full: bool,
}

impl AdapterLayout {
    /// The table of an adapter of `rank` that adapts the modules for which `adapts(layer, module)`
    /// holds.
    pub fn new(spec: &ModelSpec, rank: usize, scale: f32, adapts: impl Fn(usize, usize) -> bool) -> Self {
        let modules = spec.modules();
        let mut parts = Vec::with_capacity(spec.layers * modules.len());
        let mut layer_starts = vec![0];
        let mut offset = 0;
        for layer in 0..spec.layers {
            for (index, module) in modules.iter().enumerate() {
                parts.push(adapts(layer, index).then(|| {
                    let part = Part { offset, inputs: module.inputs, outputs: module.outputs };
                    offset += rank * (module.inputs + module.outputs);
                    part
                }));
            }
            layer_starts.push(offset);
        }
        let full = parts.iter().all(Option::is_some);
        Self { rank, scale, modules: modules.len(), parts, layer_starts, full }
    }

    /// Rank of every part.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What the product of the two matrices is multiplied by: `alpha / rank`, or
    /// `alpha / sqrt(rank)` for rank-stabilised adapters.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Elements of the slab.
    pub fn elements(&self) -> usize {
        self.layer_starts[self.layers()]
    }

    /// Layers of the model.
    pub fn layers(&self) -> usize {
        self.layer_starts.len() - 1
    }

    /// The elements of one layer.
    pub fn layer(&self, layer: usize) -> Range<usize> {
        self.layer_starts[layer]..self.layer_starts[layer + 1]
    }

    /// The module's part, if it is adapted.
    pub fn part(&self, layer: usize, module: usize) -> Option<Part> {
        self.parts[layer * self.modules + module]
    }

    /// Whether every module of every layer is adapted: a part then begins at the rank times the widths of
    /// the modules before it.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// `[layers, modules]` the parts.
    pub fn parts(&self) -> &[Option<Part>] {
        &self.parts
    }

    /// `A` and `Bᵀ` of a part; `memory` begins where the slab's element `base` is.
    pub fn matrices<'a>(&self, part: Part, base: usize, memory: &'a [f32]) -> (&'a [f32], &'a [f32]) {
        let a = part.offset - base;
        let b = a + self.rank * part.inputs;
        (&memory[a..b], &memory[b..b + self.rank * part.outputs])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::preset;

    #[test]
    fn a_full_adapter_has_the_specs_size() {
        let spec = preset("facebook/opt-125m").unwrap();
        let layout = AdapterLayout::new(&spec, 8, 1.0, |_, _| true);
        assert_eq!(layout.elements() as u64, spec.adapter_parameters(8));
        assert_eq!(layout.layer(11).end, layout.elements());
    }

    #[test]
    fn modules_left_alone_take_no_room() {
        let spec = preset("tiny").unwrap();
        let layout = AdapterLayout::new(&spec, 4, 2.0, |layer, module| layer == 2 && module < 2);
        assert_eq!(layout.elements(), 4 * (192 + 192 + 192 + 96));
        assert_eq!((layout.layer(0), layout.layer(1)), (0..0, 0..0));
        assert_eq!(layout.layer(2), 0..layout.elements());
        assert_eq!(layout.part(2, 1).unwrap().offset, 4 * 384);
        assert_eq!(layout.part(2, 2), None);
    }
}
