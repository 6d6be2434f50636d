//! [`crate::Elementwise`], row by row. What only moves values or adds two of them is exact, in the kernel's own
//! number format; the rest is f64.

use crate::bf16;

/// The table's row of each token, `[tokens, width]`; `table` is `[vocab, width]`. A token that it does not have
/// reads row 0.
pub fn embed(tokens: &[u32], table: &[bf16], width: usize) -> Vec<f32> {
    let vocab = table.len() / width;
    let row = |&token: &u32| if (token as usize) < vocab { token as usize } else { 0 };
    tokens.iter().flat_map(|t| &table[row(t) * width..][..width]).map(|v| v.to_f32()).collect()
}

/// Adds to each row of `x`, `[positions, width]`, the table's row of its position + `offset`.
pub fn add_positions(positions: &[u32], offset: usize, table: &[bf16], width: usize, x: &mut [f32]) {
    for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
        let row = &table[(position as usize + offset) * width..][..width];
        x.iter_mut().zip(row).for_each(|(x, v)| *x += v.to_f32());
    }
}

/// x / sqrt(mean(x²) + eps) · weight by row; `x` is `[n, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[bf16], eps: f32) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = (mean + f64::from(eps)).sqrt();
        out.extend(x.iter().zip(weight).map(|(&x, w)| f64::from(x) / scale * w.to_f64()));
    }
    out
}

/// (x − mean) / sqrt(variance + eps) · weight + bias by row; `x` is `[n, weight.len()]`.
pub fn layer_norm(x: &[f32], weight: &[bf16], bias: &[bf16], eps: f32) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = (variance + f64::from(eps)).sqrt();
        let values = x.iter().zip(weight).zip(bias);
        out.extend(values.map(|((&x, w), b)| (f64::from(x) - mean) / scale * w.to_f64() + b.to_f64()));
    }
    out
}

/// gate / (1 + exp(−gate)) · up, `[n, width]`; a row of `gate_up` is gate, then up.
pub fn silu_mul(gate_up: &[bf16], width: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(gate_up.len() / 2);
    for row in gate_up.chunks_exact(2 * width) {
        let (gate, up) = row.split_at(width);
        let silu = |g: f64| g / (1.0 + (-g).exp());
        out.extend(gate.iter().zip(up).map(|(g, u)| silu(g.to_f64()) * u.to_f64()));
    }
    out
}

/// max(x, 0).
pub fn relu(x: &mut [bf16]) {
    for x in x {
        *x = if *x > bf16::ZERO { *x } else { bf16::ZERO };
    }
}

/// The rows of `x` that are named, `[rows, width]`.
pub fn gather(rows: &[u32], x: &[f32], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|&row| &x[row as usize * width..][..width]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bf16s(values: &[f32]) -> Vec<bf16> {
        values.iter().map(|v| bf16::from_f32(*v)).collect()
    }

    fn near(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12), "{got:?}, expected {want:?}");
    }

    #[test]
    fn tables_are_read_by_token_and_by_position() {
        let table = bf16s(&[1., 2., 3., 4., 5., 6.]);
        assert_eq!(embed(&[2, 0, 3], &table, 2), [5., 6., 1., 2., 1., 2.]);
        let mut x = [10., 20., 30., 40.];
        add_positions(&[1, 0], 1, &table, 2, &mut x);
        assert_eq!(x, [15., 26., 33., 44.]);
        assert_eq!(gather(&[1, 1, 0], &x, 2), [33., 44., 33., 44., 15., 26.]);
    }

    #[test]
    fn a_norm_divides_by_the_root_mean_square() {
        // Mean square 8, and 1 added.
        near(&rms_norm(&[0., 4.], &bf16s(&[5., 3.]), 1.0), &[0., 4.]);
        // Mean 3, variance 4.
        let layer = layer_norm(&[1., 5.], &bf16s(&[1., 2.]), &bf16s(&[0.5, -1.]), 0.0);
        near(&layer, &[-0.5, 1.]);
    }

    #[test]
    fn activations() {
        let log3 = 3f32.ln();
        let gate = bf16::from_f32(log3);
        let want = gate.to_f64() / (1.0 + (-gate.to_f64()).exp()) * 2.0;
        // 1 + exp(−ln 3) is 4/3.
        assert!((want - 1.5 * f64::from(log3)).abs() < 1e-2);
        near(&silu_mul(&[gate, bf16::ZERO, bf16s(&[2.])[0], bf16s(&[9.])[0]], 2), &[want, 0.]);
        let mut x = bf16s(&[-1., 0., 2.]);
        relu(&mut x);
        assert_eq!(x, bf16s(&[0., 0., 2.]));
    }
}
