//! What compares a prediction with a measurement, and a measurement with its own repeats.

use super::{mean, median, sorted};

/// The median of `|a − b|` over all pairs of `values`; none under two values.
pub fn median_pairwise_difference(values: &[f64]) -> Option<f64> {
    let mut differences = Vec::with_capacity(values.len() * values.len().saturating_sub(1) / 2);
    for (i, a) in values.iter().enumerate() {
        differences.extend(values[i + 1..].iter().map(|b| (a - b).abs()));
    }
    median(&sorted(&differences))
}

/// The repeat spread of a statistic: [`median_pairwise_difference`] of its repeats in percent of
/// their mean. None under two repeats or where the mean is zero.
pub fn repeat_spread(repeats: &[f64]) -> Option<f64> {
    let m = mean(repeats).filter(|m| *m != 0.0)?;
    Some(median_pairwise_difference(repeats)? / m.abs() * 100.0)
}

/// Kolmogorov–Smirnov distance of two samples: the greatest difference of their distribution
/// functions, 0 to 1. None where one is empty.
pub fn ks_distance(a: &[f64], b: &[f64]) -> Option<f64> {
    let mut greatest = 0.0f64;
    walk(a, b, |difference, _| greatest = greatest.max(difference))?;
    Some(greatest)
}

/// Wasserstein-1 distance of two samples, in their unit: the area between their distribution
/// functions. None where one is empty.
pub fn wasserstein(a: &[f64], b: &[f64]) -> Option<f64> {
    let mut area = 0.0;
    walk(a, b, |difference, width| area += difference * width)?;
    Some(area)
}

/// Calls `visit(|F_a − F_b|, width)` for each stretch on which both distribution functions are
/// constant, from the first value to the last.
fn walk(a: &[f64], b: &[f64], mut visit: impl FnMut(f64, f64)) -> Option<()> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let (a, b) = (sorted(a), sorted(b));
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        let here = match (a.get(i), b.get(j)) {
            (Some(x), Some(y)) => x.min(*y),
            (Some(x), None) | (None, Some(x)) => *x,
            (None, None) => break,
        };
        i += a[i..].iter().take_while(|x| **x == here).count();
        j += b[j..].iter().take_while(|x| **x == here).count();
        let next = match (a.get(i), b.get(j)) {
            (Some(x), Some(y)) => x.min(*y),
            (Some(x), None) | (None, Some(x)) => *x,
            (None, None) => here,
        };
        visit((i as f64 / a.len() as f64 - j as f64 / b.len() as f64).abs(), next - here);
    }
    Some(())
}

/// Kendall's τ between two orderings of the same things, over the pairs `(i, j)`, `i < j`, that
/// `told_apart` accepts: concordant minus discordant pairs over all those pairs. A pair that is tied
/// on one side only agrees with neither and counts in the divisor. None where no pair is told apart
/// or the lengths differ.
pub fn kendall_tau(a: &[f64], b: &[f64], told_apart: impl Fn(usize, usize) -> bool) -> Option<f64> {
    if a.len() != b.len() {
        return None;
    }
    let (mut pairs, mut score) = (0i64, 0i64);
    for i in 0..a.len() {
        for j in i + 1..a.len() {
            if !told_apart(i, j) {
                continue;
            }
            pairs += 1;
            let sign = |x: f64, y: f64| x.partial_cmp(&y).map_or(0, |o| o as i64);
            score += sign(a[i], a[j]) * sign(b[i], b[j]);
        }
    }
    (pairs > 0).then(|| score as f64 / pairs as f64)
}

/// `(predicted − measured) / measured` of each pair, as fractions; a pair whose measurement is zero
/// is left out, as are those past the shorter slice.
pub fn signed_errors(predicted: &[f64], measured: &[f64]) -> Vec<f64> {
    predicted.iter().zip(measured).filter(|(_, m)| **m != 0.0).map(|(p, m)| (p - m) / m).collect()
}

/// Mean absolute difference of two equally long samples; none where they are empty or differ in length.
pub fn mean_absolute(predicted: &[f64], measured: &[f64]) -> Option<f64> {
    if predicted.len() != measured.len() {
        return None;
    }
    mean(&predicted.iter().zip(measured).map(|(p, m)| (p - m).abs()).collect::<Vec<_>>())
}

/// `1 − MAE / MAE(constant)` against the constant that fits `measured` best, its median: 1 is
/// perfect, 0 no better than the constant. None where all measurements are equal, so that the
/// constant cannot be beaten, or lengths differ.
pub fn skill(predicted: &[f64], measured: &[f64]) -> Option<f64> {
    let constant = median(&sorted(measured))?;
    let naive = mean_absolute(&vec![constant; measured.len()], measured)?;
    (naive > 0.0).then_some(1.0 - mean_absolute(predicted, measured)? / naive)
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use proptest::prelude::*;
    use statrs::stats_tests::NaNPolicy;
    use statrs::stats_tests::ks_test::{KSTwoSampleAlternativeMethod, ks_twosample};

    use super::*;

    #[test]
    fn spread_of_three_repeats() {
        // Differences 1, 3, 2: median 2, mean of the repeats 10.
        assert_relative_eq!(repeat_spread(&[9.0, 10.0, 12.0]).unwrap(), 2.0 / (31.0 / 3.0) * 100.0);
        assert_eq!(repeat_spread(&[1.0]), None);
        assert_eq!(repeat_spread(&[0.0, 0.0]), None);
    }

    #[test]
    fn distances_of_two_small_samples() {
        // F_a steps at 1, 2, 3, 4 and F_b at 3, 4, 5, 6: half of the mass is 2 further.
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]);
        assert_relative_eq!(ks_distance(&a, &b).unwrap(), 0.5);
        assert_relative_eq!(wasserstein(&a, &b).unwrap(), 2.0);
        // Unequal sizes: all mass at 0 against half of it at 1.
        assert_relative_eq!(wasserstein(&[0.0], &[0.0, 1.0]).unwrap(), 0.5);
        assert_eq!(ks_distance(&[], &[1.0]), None);
    }

    #[test]
    fn tau_counts_only_pairs_told_apart() {
        let (a, b) = ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]);
        assert_relative_eq!(kendall_tau(&a, &b, |_, _| true).unwrap(), 1.0 / 3.0);
        assert_relative_eq!(kendall_tau(&a, &b, |i, j| (i, j) != (1, 2)).unwrap(), 1.0);
        assert_eq!(kendall_tau(&a, &b, |_, _| false), None);
        assert_relative_eq!(kendall_tau(&a, &[5.0, 5.0, 5.0], |_, _| true).unwrap(), 0.0);
    }

    #[test]
    fn skill_against_the_best_constant() {
        // The median, 2, is off by 1, 0 and 2: MAE 1; the prediction by 0, 0 and 1: MAE 1/3.
        assert_relative_eq!(skill(&[1.0, 2.0, 3.0], &[1.0, 2.0, 4.0]).unwrap(), 1.0 - (1.0 / 3.0) / 1.0);
        assert_relative_eq!(skill(&[2.0; 3], &[1.0, 2.0, 4.0]).unwrap(), 0.0);
        assert_eq!(skill(&[1.0, 1.0], &[3.0, 3.0]), None);
    }

    #[test]
    fn errors_keep_their_sign() {
        assert_eq!(signed_errors(&[1.1, 0.5, 9.0], &[1.0, 1.0, 0.0]), vec![1.1 - 1.0, -0.5]);
    }

    proptest! {
        #[test]
        fn ks_is_that_of_statrs(a in prop::collection::vec(0u8..20, 2..30), b in prop::collection::vec(0u8..20, 2..30)) {
            let float = |v: &[u8]| v.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let (a, b) = (float(&a), float(&b));
            let theirs = ks_twosample(a.clone(), b.clone(), KSTwoSampleAlternativeMethod::TwoSidedAsymptotic, NaNPolicy::Error).unwrap().0;
            prop_assert!((ks_distance(&a, &b).unwrap() - theirs).abs() < 1e-12);
        }

        #[test]
        fn wasserstein_of_equal_sizes_is_the_mean_difference_of_order_statistics(
            pairs in prop::collection::vec((0f64..100.0, 0f64..100.0), 1..40)
        ) {
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let expected = mean_absolute(&sorted(&a), &sorted(&b)).unwrap();
            prop_assert!((wasserstein(&a, &b).unwrap() - expected).abs() < 1e-9);
        }

        #[test]
        fn an_ordering_agrees_with_itself(a in prop::collection::vec(0i32..1000, 2..20)) {
            let a: Vec<f64> = a.into_iter().map(f64::from).collect();
            let reversed: Vec<f64> = a.iter().map(|x| -x).collect();
            if let Some(tau) = kendall_tau(&a, &a, |i, j| a[i] != a[j]) {
                prop_assert_eq!(tau, 1.0);
                prop_assert_eq!(kendall_tau(&a, &reversed, |i, j| a[i] != a[j]), Some(-1.0));
            }
        }
    }
}
