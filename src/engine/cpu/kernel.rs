//! The innermost product, by instruction set: the compiler does not keep a tile of sums in registers
//! by itself, so AVX-512 and AVX2 are written out.

/// Outputs of a panel: two AVX-512 registers.
pub(super) const PANEL: usize = 32;

/// Rows of a tile: their sums, `TILE · PANEL`, fill half of the AVX-512 registers.
pub(super) const TILE: usize = 8;

/// `sums[r] = bias + Σ_k x[k][r] · panel[k]` for up to [`TILE`] rows. `x` is `[inputs, rows]`, `panel`
/// `[inputs, PANEL]`, and there is a `sums` for each row.
pub(super) fn tile(x: &[f32], panel: &[f32], bias: &[f32; PANEL], sums: &mut [[f32; PANEL]]) {
    let panel = panel.as_chunks::<PANEL>().0;
    assert_eq!(x.len(), sums.len() * panel.len(), "a tile has as many inputs as its panel");
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has what the function is compiled for.
            return unsafe { x86::tile_avx512(x, panel, bias, sums) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { x86::tile_avx2(x, panel, bias, sums) };
        }
    }
    tile_plain(x, panel, bias, sums);
}

/// Row by row, which any compiler vectorises.
fn tile_plain(x: &[f32], panel: &[[f32; PANEL]], bias: &[f32; PANEL], sums: &mut [[f32; PANEL]]) {
    let rows = sums.len();
    for (r, sums) in sums.iter_mut().enumerate() {
        let mut acc = *bias;
        for (weights, value) in panel.iter().zip(x[r..].iter().step_by(rows)) {
            for (acc, weight) in acc.iter_mut().zip(weights) {
                *acc += value * weight;
            }
        }
        *sums = acc;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    use super::PANEL;

    #[target_feature(enable = "avx512f")]
    pub fn tile_avx512(x: &[f32], panel: &[[f32; PANEL]], bias: &[f32; PANEL], sums: &mut [[f32; PANEL]]) {
        match sums.len() {
            0 => {}
            1 => block_avx512::<1>(x, panel, bias, sums),
            2 => block_avx512::<2>(x, panel, bias, sums),
            3 => block_avx512::<3>(x, panel, bias, sums),
            4 => block_avx512::<4>(x, panel, bias, sums),
            5 => block_avx512::<5>(x, panel, bias, sums),
            6 => block_avx512::<6>(x, panel, bias, sums),
            7 => block_avx512::<7>(x, panel, bias, sums),
            _ => block_avx512::<8>(x, panel, bias, sums),
        }
    }

    /// `R` rows by two registers of outputs.
    #[target_feature(enable = "avx512f")]
    fn block_avx512<const R: usize>(
        x: &[f32],
        panel: &[[f32; PANEL]],
        bias: &[f32; PANEL],
        sums: &mut [[f32; PANEL]],
    ) {
        let mut low = [load_512(bias, 0); R];
        let mut high = [load_512(bias, 1); R];
        for (weights, values) in panel.iter().zip(x.as_chunks::<R>().0) {
            let (w_low, w_high) = (load_512(weights, 0), load_512(weights, 1));
            for r in 0..R {
                let value = _mm512_set1_ps(values[r]);
                low[r] = _mm512_fmadd_ps(value, w_low, low[r]);
                high[r] = _mm512_fmadd_ps(value, w_high, high[r]);
            }
        }
        for (r, sums) in sums.iter_mut().enumerate().take(R) {
            let (to_low, to_high) = sums.split_at_mut(PANEL / 2);
            // SAFETY: each half of a row of sums is sixteen floats, as many as a register.
            unsafe {
                _mm512_storeu_ps(to_low.as_mut_ptr(), low[r]);
                _mm512_storeu_ps(to_high.as_mut_ptr(), high[r]);
            }
        }
    }

    /// The `half`th sixteen of a panel's row.
    #[target_feature(enable = "avx512f")]
    fn load_512(row: &[f32; PANEL], half: usize) -> __m512 {
        let from = &row[half * 16..half * 16 + 16];
        // SAFETY: the slice is sixteen floats, as many as a register.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn tile_avx2(x: &[f32], panel: &[[f32; PANEL]], bias: &[f32; PANEL], sums: &mut [[f32; PANEL]]) {
        let stride = sums.len();
        for (i, sums) in sums.chunks_mut(4).enumerate() {
            match sums.len() {
                1 => block_avx2::<1>(x, stride, 4 * i, panel, bias, sums),
                2 => block_avx2::<2>(x, stride, 4 * i, panel, bias, sums),
                3 => block_avx2::<3>(x, stride, 4 * i, panel, bias, sums),
                _ => block_avx2::<4>(x, stride, 4 * i, panel, bias, sums),
            }
        }
    }

    /// Rows `first..first + R` of `x` `[inputs, stride]`, sixteen outputs at a time: eight sums.
    #[target_feature(enable = "avx2,fma")]
    fn block_avx2<const R: usize>(
        x: &[f32],
        stride: usize,
        first: usize,
        panel: &[[f32; PANEL]],
        bias: &[f32; PANEL],
        sums: &mut [[f32; PANEL]],
    ) {
        for half in 0..2 {
            let mut low = [load_256(bias, 2 * half); R];
            let mut high = [load_256(bias, 2 * half + 1); R];
            for (weights, values) in panel.iter().zip(x.chunks_exact(stride)) {
                let (w_low, w_high) = (load_256(weights, 2 * half), load_256(weights, 2 * half + 1));
                let values = &values[first..first + R];
                for r in 0..R {
                    let value = _mm256_set1_ps(values[r]);
                    low[r] = _mm256_fmadd_ps(value, w_low, low[r]);
                    high[r] = _mm256_fmadd_ps(value, w_high, high[r]);
                }
            }
            for (r, sums) in sums.iter_mut().enumerate().take(R) {
                let (to_low, to_high) = sums[16 * half..16 * half + 16].split_at_mut(8);
                // SAFETY: each part is eight floats, as many as a register.
                unsafe {
                    _mm256_storeu_ps(to_low.as_mut_ptr(), low[r]);
                    _mm256_storeu_ps(to_high.as_mut_ptr(), high[r]);
                }
            }
        }
    }

    /// The `quarter`th eight of a panel's row.
    #[target_feature(enable = "avx2,fma")]
    fn load_256(row: &[f32; PANEL], quarter: usize) -> __m256 {
        let from = &row[quarter * 8..quarter * 8 + 8];
        // SAFETY: the slice is eight floats, as many as a register.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_gives_the_plain_result() {
        let number = |i: usize| ((i * 37 + 11) % 19) as f32 - 9.0;
        for inputs in [1, 5, 32] {
            let panel: Vec<[f32; PANEL]> =
                (0..inputs).map(|k| std::array::from_fn(|j| number(k * PANEL + j))).collect();
            let bias: [f32; PANEL] = std::array::from_fn(number);
            for rows in 1..=TILE {
                let x: Vec<f32> = (0..rows * inputs).map(|i| number(3 * i)).collect();
                let mut want = vec![[0.0; PANEL]; rows];
                tile_plain(&x, &panel, &bias, &mut want);
                for (r, want) in want.iter().enumerate() {
                    let sum: f32 = (0..inputs).map(|k| x[k * rows + r] * panel[k][7]).sum();
                    assert_eq!(want[7], bias[7] + sum);
                }
                let mut got = vec![[0.0; PANEL]; rows];
                tile(&x, panel.as_flattened(), &bias, &mut got);
                assert_eq!(got, want, "{rows} rows of {inputs}");
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the machine has what the function is compiled for.
                    unsafe { x86::tile_avx2(&x, &panel, &bias, &mut got) };
                    assert_eq!(got, want, "{rows} rows of {inputs}, AVX2");
                }
            }
        }
    }
}
