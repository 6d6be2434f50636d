//! [`crate::Lora`], row by row.

use half::bf16;

use crate::lora::Target;

/// Consecutive rows that use one adapter.
#[derive(Clone, Copy, Debug)]
pub struct HostSegment<'a> {
    /// The adapter's matrices, laid out as [`crate::Segment`] says.
    pub matrices: &'a [bf16],
    /// Where each module's part begins, in units of 8 elements, or -1; none where all are adapted.
    pub offsets: Option<&'a [i32]>,
    /// Its first row in the batch.
    pub start: usize,
    /// Rows.
    pub rows: usize,
    /// The adapter's rank.
    pub rank: usize,
    /// What the product is multiplied by.
    pub scale: f32,
}

/// `out[row, column..column + outputs] += scale · (x[row] · Aᵀ) · Bᵀᵀ` for every segment's rows and each target;
/// `x` is `[rows, inputs]`, `out` `[rows, width]`.
pub fn apply(
    segments: &[HostSegment<'_>],
    targets: &[Target],
    inputs: usize,
    x: &[bf16],
    width: usize,
    out: &mut [f64],
) {
    for segment in segments {
        for target in targets {
            let Some(at) = part(segment, target) else { continue };
            let (a, bt) = segment.matrices[at..].split_at(segment.rank * inputs);
            for row in segment.start..segment.start + segment.rows {
                let x = &x[row * inputs..][..inputs];
                let out = &mut out[row * width + target.column..][..target.outputs];
                for rank in 0..segment.rank {
                    let h = dot(x, &a[rank * inputs..][..inputs]) * f64::from(segment.scale);
                    for (out, b) in out.iter_mut().zip(&bt[rank * target.outputs..][..target.outputs]) {
                        *out += h * b.to_f64();
                    }
                }
            }
        }
    }
}

/// Where the target's part begins in the adapter's matrices.
fn part(segment: &HostSegment<'_>, target: &Target) -> Option<usize> {
    match segment.offsets {
        None => Some(segment.rank * target.elements_before),
        Some(offsets) => usize::try_from(offsets[target.index]).ok().map(|at| at * 8),
    }
}

fn dot(a: &[bf16], b: &[bf16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One input row `[1, 2]`, rank 2: A = [[3, 4], [5, 6]], Bᵀ = [[1, -1], [0.5, 2]]. h = [11, 17], twice
    /// h · Bᵀ = [39, 46].
    #[test]
    fn a_hand_made_adapter_adds_its_product() {
        let bf16s = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
        // Eight elements of another module come first.
        let matrices = bf16s(&[9., 9., 9., 9., 9., 9., 9., 9., 3., 4., 5., 6., 1., -1., 0.5, 2.]);
        let target = Target { layer: 0, index: 1, elements_before: 4, column: 1, outputs: 2 };
        let x = bf16s(&[7., 7., 1., 2.]);
        let added = |offsets| {
            let segment =
                HostSegment { matrices: &matrices, offsets, start: 1, rows: 1, rank: 2, scale: 2.0 };
            let mut out = [100.0; 6];
            apply(&[segment], &[target], 2, &x, 3, &mut out);
            out
        };
        let expected = [100., 100., 100., 100., 139., 146.];
        assert_eq!(added(None), expected);
        assert_eq!(added(Some(&[0, 1])), expected);
        assert_eq!(added(Some(&[0, -1])), [100.0; 6]);
    }
}
