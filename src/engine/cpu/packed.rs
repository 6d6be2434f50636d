//! Products with a weight that is packed once, when it is loaded.
//!
//! A step's linear layers read the same weights every time, so their layout is chosen for the
//! reading: panels of [`PANEL`] outputs, in each of which the inputs follow one another. A product
//! streams each panel once for every [`TILE`] rows, whether the batch is one decode or a long prefill.

use rayon::prelude::*;

use super::kernel::{PANEL, TILE, tile};

/// A weight `[outputs, inputs]` in panels `[outputs / PANEL, inputs, PANEL]`, the last one padded.
pub(super) struct Packed {
    panels: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Packed {
    /// Packs a row-major weight with its bias.
    pub fn new(weight: &[f32], bias: Option<&[f32]>, outputs: usize, inputs: usize) -> Self {
        assert_eq!(weight.len(), outputs * inputs, "a weight has outputs times inputs elements");
        let mut panels = vec![0.0; outputs.div_ceil(PANEL) * PANEL * inputs];
        for (panel, rows) in panels.chunks_exact_mut(PANEL * inputs).zip(weight.chunks(PANEL * inputs)) {
            for (output, row) in rows.chunks_exact(inputs).enumerate() {
                for (to, from) in panel[output..].iter_mut().step_by(PANEL).zip(row) {
                    *to = *from;
                }
            }
        }
        let mut padded = bias.map_or_else(Vec::new, <[f32]>::to_vec);
        padded.resize(outputs.div_ceil(PANEL) * PANEL, 0.0);
        Self { panels, bias: padded, inputs, outputs }
    }

    /// Width of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `out = x · weightᵀ + bias`; `x` is `[n, inputs]`, `out` `[n, outputs]`, and `scratch` has room
    /// for as much as `x`. More than one thread is used inside a pool of as many.
    pub fn multiply(&self, n: usize, x: &[f32], scratch: &mut [f32], out: &mut [f32], threads: usize) {
        let (x, out) = (&x[..n * self.inputs], &mut out[..n * self.outputs]);
        let scratch = &mut scratch[..n * self.inputs];
        // Whole tiles to each thread where there are enough rows for that.
        let share = n.div_ceil(threads.max(1));
        let share = if share > TILE { share.next_multiple_of(TILE) } else { share };
        if share >= n {
            return self.rows(x, scratch, out);
        }
        let (from, to) = (share * self.inputs, share * self.outputs);
        x.par_chunks(from)
            .zip(scratch.par_chunks_mut(from))
            .zip(out.par_chunks_mut(to))
            .for_each(|((x, scratch), out)| self.rows(x, scratch, out));
    }

    fn rows(&self, x: &[f32], scratch: &mut [f32], out: &mut [f32]) {
        interleave(x, self.inputs, scratch);
        let panels = self.panels.chunks_exact(PANEL * self.inputs).zip(self.bias.as_chunks::<PANEL>().0);
        for (i, (panel, bias)) in panels.enumerate() {
            let columns = i * PANEL..self.outputs.min((i + 1) * PANEL);
            let tiles = scratch.chunks(TILE * self.inputs).zip(out.chunks_mut(TILE * self.outputs));
            for (x, out) in tiles {
                let mut sums = [[0.0; PANEL]; TILE];
                let rows = out.len() / self.outputs;
                tile(x, panel, bias, &mut sums[..rows]);
                for (sums, out) in sums[..rows].iter().zip(out.chunks_exact_mut(self.outputs)) {
                    out[columns.clone()].copy_from_slice(&sums[..columns.len()]);
                }
            }
        }
    }
}

/// Rewrites each tile of rows `[R, inputs]` as `[inputs, R]`, so that a product walks along memory.
fn interleave(x: &[f32], inputs: usize, out: &mut [f32]) {
    for (x, out) in x.chunks(TILE * inputs).zip(out.chunks_mut(TILE * inputs)) {
        let rows = x.len() / inputs;
        for (r, row) in x.chunks_exact(inputs).enumerate() {
            for (to, from) in out[r..].iter_mut().step_by(rows).zip(row) {
                *to = *from;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn products_match_the_definition_for_every_tile_and_thread_count() {
        let noise = |n: usize, salt: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + salt) * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0).collect()
        };
        for (outputs, inputs) in [(32, 16), (96, 48), (40, 7), (5, 33)] {
            let (weight, bias) = (noise(outputs * inputs, 1), noise(outputs, 2));
            for biased in [true, false] {
                let packed = Packed::new(&weight, biased.then_some(bias.as_slice()), outputs, inputs);
                for n in [1, 2, 3, 5, 7, 8, 9, 30] {
                    let x = noise(n * inputs, 3);
                    for threads in [1, 2, 3] {
                        let mut out = vec![9.0; n * outputs + 1];
                        packed.multiply(n, &x, &mut x.clone(), &mut out, threads);
                        for i in 0..n {
                            for j in 0..outputs {
                                let sum: f64 = (0..inputs)
                                    .map(|k| f64::from(x[i * inputs + k] * weight[j * inputs + k]))
                                    .sum();
                                let want = sum + if biased { f64::from(bias[j]) } else { 0.0 };
                                let got = f64::from(out[i * outputs + j]);
                                assert_relative_eq!(got, want, epsilon = 1e-4);
                            }
                        }
                        assert_eq!(out[n * outputs], 9.0, "wrote past its rows");
                    }
                }
            }
        }
    }
}
