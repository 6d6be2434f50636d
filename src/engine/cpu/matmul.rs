//! Matrix products on slices, by the `gemm` crate, which picks AVX2 or AVX-512 kernels at run time.

use gemm::Parallelism;

/// A matrix in a slice, with the distance between rows; columns are adjacent.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

/// A matrix that is written.
pub(super) struct MatMut<'a> {
    pub data: &'a mut [f32],
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl<'a> Mat<'a> {
    /// A dense matrix.
    pub fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols }
    }
}

impl<'a> MatMut<'a> {
    /// A dense matrix.
    pub fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols }
    }
}

/// Elements from the first to past the last of a strided matrix.
fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// `out = keep · out + scale · a · b`, with `keep` 1 or 0.
pub(super) fn multiply(
    out: MatMut<'_>,
    keep: bool,
    scale: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    threads: Parallelism,
) {
    product(out, keep, scale, a, (b, false), threads);
}

/// `out = scale · a · bᵀ`.
pub(super) fn multiply_transposed(out: MatMut<'_>, scale: f32, a: Mat<'_>, b: Mat<'_>, threads: Parallelism) {
    product(out, false, scale, a, (b, true), threads);
}

fn product(
    out: MatMut<'_>,
    keep: bool,
    scale: f32,
    a: Mat<'_>,
    (b, transposed): (Mat<'_>, bool),
    threads: Parallelism,
) {
    let (inner, cols) = if transposed { (b.cols, b.rows) } else { (b.rows, b.cols) };
    assert_eq!((out.rows, out.cols, a.cols), (a.rows, cols, inner), "shapes of a product");
    assert!(extent(out.rows, out.cols, out.stride) <= out.data.len(), "product: the output is too short");
    assert!(extent(a.rows, a.cols, a.stride) <= a.data.len(), "product: the left side is too short");
    assert!(extent(b.rows, b.cols, b.stride) <= b.data.len(), "product: the right side is too short");
    assert!(out.rows <= 1 || out.stride >= out.cols, "product: rows of the output overlap");
    let (b_row, b_col) = if transposed { (1, b.stride) } else { (b.stride, 1) };
    // SAFETY: the asserts above hold every index `row * stride + col` inside its slice, `out` is
    // borrowed mutably and so overlaps neither input, and its rows do not overlap each other.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            inner,
            out.data.as_mut_ptr(),
            1,
            out.stride as isize,
            keep,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b.data.as_ptr(),
            b_col as isize,
            b_row as isize,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + 11) % 19) as f32 - 9.0).collect()
    }

    #[test]
    fn strided_products_match_the_definition() {
        for (m, k, n, pad) in [(1, 7, 5, 0), (3, 16, 33, 2), (40, 9, 24, 5), (1, 64, 1, 3)] {
            let (a, b, bt) = (numbers(m * (k + pad)), numbers(k * (n + pad)), numbers(n * (k + pad)));
            let before = numbers(m * (n + pad));
            let (mut kept, mut fresh) = (before.clone(), before.clone());
            let a_mat = Mat { data: &a, rows: m, cols: k, stride: k + pad };
            let b_mat = Mat { data: &b, rows: k, cols: n, stride: n + pad };
            let bt_mat = Mat { data: &bt, rows: n, cols: k, stride: k + pad };
            let out = MatMut { data: &mut kept, rows: m, cols: n, stride: n + pad };
            multiply(out, true, 0.5, a_mat, b_mat, Parallelism::None);
            let out = MatMut { data: &mut fresh, rows: m, cols: n, stride: n + pad };
            multiply_transposed(out, 2.0, a_mat, bt_mat, Parallelism::None);
            for i in 0..m {
                for j in 0..n + pad {
                    let at = i * (n + pad) + j;
                    if j >= n {
                        assert_eq!((kept[at], fresh[at]), (before[at], before[at]), "padding was written");
                        continue;
                    }
                    let sum: f32 = (0..k).map(|l| a[i * (k + pad) + l] * b[l * (n + pad) + j]).sum();
                    let sum_t: f32 = (0..k).map(|l| a[i * (k + pad) + l] * bt[j * (k + pad) + l]).sum();
                    assert_eq!(kept[at], before[at] + 0.5 * sum);
                    assert_eq!(fresh[at], 2.0 * sum_t);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "too short")]
    fn a_short_slice_is_caught() {
        let mut out = [0.0; 3];
        let one = [1.0; 4];
        let (a, b) = (Mat::dense(&one, 2, 2), Mat::dense(&one, 2, 2));
        multiply(MatMut::dense(&mut out, 2, 2), false, 1.0, a, b, Parallelism::None);
    }
}
