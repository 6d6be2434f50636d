//! Elementwise and row-wise arithmetic. Loops are written so that the compiler turns them into
//! vector instructions: no branches, no calls, sums in independent lanes.

use super::simd::{MulAdd, vectorised};
use crate::engine::model::RopeScaling;

/// Lanes of a sum: enough for two AVX-512 or four AVX2 registers.
const LANES: usize = 32;

/// `e^x` to about two units in the last place, without a call: reduction to `±ln 2 / 2` and a
/// polynomial of degree 6. Saturates outside ±87.
#[inline(always)]
fn exp<M: MulAdd>(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to an integer, which then stands in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, so that the reduction is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 87.0);
    let shifted = M::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = M::mul_add(whole, -LN2_LOW, M::mul_add(whole, -LN2_HIGH, x));
    let p = 1.987_569_1e-4_f32;
    let p = M::mul_add(p, r, 1.398_2e-3);
    let p = M::mul_add(p, r, 8.333_452e-3);
    let p = M::mul_add(p, r, 4.166_579_6e-2);
    let p = M::mul_add(p, r, 1.666_666_5e-1);
    let p = M::mul_add(p, r, 0.5);
    let p = M::mul_add(p * r, r, r) + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32 - 127);
    p * f32::from_bits((exponent as u32) << 23)
}

/// Sum of `f(x)` over a row.
#[inline(always)]
fn sum_of(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|x| f(*x)).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The largest of a row; negative infinity if it is empty.
#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().fold(rest, |a, b| a.max(*b))
}

/// `x += y`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// RMSNorm of one row.
pub(super) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of(x, |v| v * v) / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

/// LayerNorm of one row.
pub(super) fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_of(x, |v| v) / x.len() as f32;
    let variance = sum_of(x, |v| (v - mean) * (v - mean)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = (x - mean) * scale * w + b;
    }
}

vectorised! {
    /// `out = silu(gate) · up`.
    pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_body;
}

#[inline(always)]
fn silu_mul_body<M: MulAdd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        *out = g / (1.0 + exp::<M>(-g)) * u;
    }
}

/// `x = max(x, 0)`.
pub(super) fn relu(x: &mut [f32]) {
    for x in x {
        *x = if *x > 0.0 { *x } else { 0.0 };
    }
}

vectorised! {
    /// Turns a row of scores into `e^(score − max)` and gives their sum, by which the caller divides
    /// what it computes from them.
    pub(super) fn exponentials(scores: &mut [f32]) -> f32 = exponentials_body;
}

#[inline(always)]
fn exponentials_body<M: MulAdd>(scores: &mut [f32]) -> f32 {
    let max = max_of(scores);
    for s in scores.iter_mut() {
        *s = exp::<M>(*s - max);
    }
    sum_of(scores, |s| s)
}

/// Turns one head by its position: dimension `i` pairs with `i + len / 2`; `cos` and `sin` are
/// `[len / 2]`.
pub(super) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Cosines and sines `[positions, head_dim / 2]` of the rotary embedding.
pub(super) fn rope_tables(
    positions: usize,
    head_dim: usize,
    theta: f32,
    scaling: &RopeScaling,
) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let unscaled = 1.0 / theta.powf((2 * i) as f32 / head_dim as f32);
            scaling.scale(i, f64::from(unscaled)) as f32
        })
        .collect();
    let mut cos = Vec::with_capacity(positions * half);
    let mut sin = Vec::with_capacity(positions * half);
    for position in 0..positions {
        for frequency in &frequencies {
            let angle = position as f32 * frequency;
            cos.push(angle.cos());
            sin.push(angle.sin());
        }
    }
    (cos, sin)
}

#[cfg(test)]
mod tests {
    use super::super::simd::Baseline;
    use super::*;
    use approx::assert_relative_eq;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + 3) % 13) as f32 * 0.37 - 2.0).collect()
    }

    #[test]
    fn exp_matches_the_library() {
        for i in -8600..8600 {
            let x = i as f32 * 0.01;
            assert_relative_eq!(exp::<Baseline>(x), x.exp(), max_relative = 4e-7);
        }
        for (x, want) in [(-1e9, 0.0), (f32::NEG_INFINITY, 0.0)] {
            assert_relative_eq!(exp::<Baseline>(x), want, epsilon = 1e-37);
        }
        assert!(exp::<Baseline>(1e9).is_finite());
    }

    #[test]
    fn norms_match_their_definitions() {
        for n in [1, 31, 32, 100] {
            let (x, w, b) = (row(n), row(n + 1)[1..].to_vec(), row(n + 2)[2..].to_vec());
            let mut out = vec![0.0; n];
            rms_norm_row(&x, &w, 1e-5, &mut out);
            let ms = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / n as f64;
            for i in 0..n {
                let want = f64::from(x[i]) / (ms + 1e-5).sqrt() * f64::from(w[i]);
                assert_relative_eq!(f64::from(out[i]), want, max_relative = 1e-5, epsilon = 1e-6);
            }
            layer_norm_row(&x, &w, &b, 1e-5, &mut out);
            let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
            let var = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let want = (f64::from(x[i]) - mean) / (var + 1e-5).sqrt() * f64::from(w[i]) + f64::from(b[i]);
                assert_relative_eq!(f64::from(out[i]), want, max_relative = 1e-4, epsilon = 1e-5);
            }
        }
    }

    #[test]
    fn exponentials_sum_to_a_softmax() {
        let mut s = row(45);
        let want: Vec<f32> = s.iter().map(|v| (v - 2.44f32).exp()).collect();
        let total: f32 = want.iter().sum();
        let sum = exponentials(&mut s);
        for (got, want) in s.iter().zip(&want) {
            assert_relative_eq!(got / sum, want / total, max_relative = 1e-5);
        }
    }

    #[test]
    fn activations_match_their_definitions() {
        let (g, u) = (row(20), row(21)[1..].to_vec());
        let mut out = vec![0.0; 20];
        silu_mul(&g, &u, &mut out);
        for i in 0..20 {
            assert_relative_eq!(out[i], g[i] / (1.0 + (-g[i]).exp()) * u[i], max_relative = 1e-5);
        }
        let mut r = g.clone();
        relu(&mut r);
        assert!(r.iter().zip(&g).all(|(r, g)| *r == g.max(0.0)));
        add(&mut r, &g);
        assert!(r.iter().zip(&g).all(|(r, g)| *r == g.max(0.0) + g));
    }

    #[test]
    fn rotation_keeps_length_and_turns_by_the_angle() {
        let (cos, sin) = rope_tables(4, 4, 10_000.0, &RopeScaling::None);
        let mut head = [1.0, 0.0, 0.0, 0.0];
        rotate(&mut head, &cos[3 * 2..4 * 2], &sin[3 * 2..4 * 2]);
        assert_relative_eq!(head[0], 3f32.cos());
        assert_relative_eq!(head[2], 3f32.sin());
        let mut other = [0.0, 1.0, 0.0, 0.0];
        rotate(&mut other, &cos[3 * 2..4 * 2], &sin[3 * 2..4 * 2]);
        assert_relative_eq!(other[3], 0.03f32.sin(), max_relative = 1e-5);
    }
}
