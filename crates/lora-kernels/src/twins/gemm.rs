//! [`crate::Gemm`], one dot product at a time.

use crate::bf16;

/// x · weightᵀ + bias, `[n, outputs]`; `x` is `[n, inputs]`, `weight` `[outputs, inputs]`.
pub fn product(x: &[bf16], weight: &[bf16], bias: Option<&[bf16]>, inputs: usize) -> Vec<f64> {
    let outputs = weight.len() / inputs;
    let wide = |values: &[bf16]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
    let (x, weight) = (wide(x), wide(weight));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let mut out = Vec::with_capacity(x.len() / inputs * outputs);
    for x in x.chunks_exact(inputs) {
        for (i, weight) in weight.chunks_exact(inputs).enumerate() {
            out.push(dot(x, weight) + bias.map_or(0.0, |b| b[i].to_f64()));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rows_of_three_inputs_and_two_outputs() {
        let bf16s = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
        let (x, weight) = (bf16s(&[1., 2., 3., 0., -1., 4.]), bf16s(&[1., 0., 2., -1., 5., 0.5]));
        assert_eq!(product(&x, &weight, None, 3), [7., 10.5, 8., -3.]);
        assert_eq!(product(&x, &weight, Some(&bf16s(&[10., 0.5])), 3), [17., 11., 18., -2.5]);
    }
}
