//! Arrivals and popularities against their laws, by goodness of fit.

use lora_hbm::workload::arrivals::{ArrivalTimes, Arrivals};
use lora_hbm::workload::popularity::{AdapterDraw, Popularity};
use statrs::distribution::{ChiSquared, ContinuousCDF, Exp, Gamma};

use super::{CHECKS, LEVEL};

const DRAWS: usize = 400_000;

fn gaps(arrivals: Arrivals, rate: f64) -> Vec<f64> {
    let times: Vec<f64> = ArrivalTimes::new(arrivals, rate, 17).unwrap().take(DRAWS + 1).collect();
    times.windows(2).map(|w| w[1] - w[0]).collect()
}

/// Kolmogorov's test of a sample against a distribution function, at the family's level. The sample is
/// off by up to a nanosecond, since arrivals are at whole ones: of bursty gaps, many are shorter.
fn kolmogorov(sample: &[f64], law: &impl ContinuousCDF<f64, f64>) -> Result<(), String> {
    let mut sample = sample.to_vec();
    sample.sort_by(f64::total_cmp);
    let n = sample.len() as f64;
    let distances = sample.iter().enumerate().map(|(i, &x)| {
        let (low, high) = (law.cdf((x - 1e-9).max(0.0)), law.cdf(x + 1e-9));
        (low - i as f64 / n).max((i + 1) as f64 / n - high)
    });
    let distance = distances.fold(0.0, f64::max);
    // P(√n D > c) ≈ 2 exp(−2c²), in the tail exact to far more digits than matter.
    let critical = (-(LEVEL / CHECKS / 2.0).ln() / 2.0).sqrt() / n.sqrt();
    if distance < critical { Ok(()) } else { Err(format!("distance {distance:.5}, critical {critical:.5}")) }
}

#[test]
fn gaps_follow_their_laws() {
    let rate = 4.0;
    let poisson = gaps(Arrivals::Poisson, rate);
    kolmogorov(&poisson, &Exp::new(rate).unwrap()).unwrap();
    for flawed in [Exp::new(rate * 1.02).unwrap(), Exp::new(rate / 1.02).unwrap()] {
        assert!(kolmogorov(&poisson, &flawed).is_err(), "a wrong mean went unnoticed");
    }
    for cv in [0.5, 2.0] {
        let shape = 1.0 / (cv * cv);
        let bursty = gaps(Arrivals::Gamma { cv }, rate);
        kolmogorov(&bursty, &Gamma::new(shape, rate * shape).unwrap())
            .unwrap_or_else(|e| panic!("{cv}: {e}"));
        let other_mean = Gamma::new(shape, rate * shape * 1.03).unwrap();
        assert!(kolmogorov(&bursty, &other_mean).is_err(), "a wrong mean went unnoticed at {cv}");
        let other_shape = Gamma::new(shape * 1.05, rate * shape * 1.05).unwrap();
        assert!(kolmogorov(&bursty, &other_shape).is_err(), "a wrong variation went unnoticed at {cv}");
    }
}

/// Pearson's test of drawn adapters against probabilities, at the family's level.
fn pearson(counts: &[u64], probabilities: &[f64]) -> Result<(), String> {
    let n: u64 = counts.iter().sum();
    let statistic: f64 = counts
        .iter()
        .zip(probabilities)
        .map(|(&seen, p)| (seen as f64 - p * n as f64).powi(2) / (p * n as f64))
        .sum();
    let critical = ChiSquared::new((counts.len() - 1) as f64).unwrap().inverse_cdf(1.0 - LEVEL / CHECKS);
    if statistic < critical {
        Ok(())
    } else {
        Err(format!("statistic {statistic:.1}, critical {critical:.1}"))
    }
}

/// Zipf's law of exponent `s` over `n` ranks.
fn zipf(n: u32, s: f64) -> Vec<f64> {
    let weights: Vec<f64> = (1..=n).map(|k| f64::from(k).powf(-s)).collect();
    let whole: f64 = weights.iter().sum();
    weights.iter().map(|w| w / whole).collect()
}

#[test]
fn adapters_follow_their_laws() {
    for (popularity, s) in [(Popularity::Uniform, 0.0), (Popularity::Zipf { s: 1.0 }, 1.0)] {
        let mut draw = AdapterDraw::new(popularity, 128, 23);
        // The law over ranks of popularity, whichever adapters have them.
        let mut by_rank: Vec<(f64, usize)> = draw.probabilities().into_iter().zip(0..).collect();
        by_rank.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut drawn = vec![0u64; 128];
        for _ in 0..DRAWS {
            drawn[draw.draw().unwrap() as usize] += 1;
        }
        let counts: Vec<u64> = by_rank.iter().map(|r| drawn[r.1]).collect();
        pearson(&counts, &zipf(128, s)).unwrap_or_else(|e| panic!("{popularity}: {e}"));
        assert!(pearson(&counts, &zipf(128, s + 0.03)).is_err(), "a wrong exponent went unnoticed");
    }
}

/// Arrivals and adapters come from streams of their own: one tells nothing of the other.
#[test]
fn a_gap_tells_nothing_of_the_adapter() {
    let mut draw = AdapterDraw::new(Popularity::Uniform, 4, 17);
    let long = |gap: f64| gap * 4.0 > std::f64::consts::LN_2;
    let mut counts = [0u64; 8];
    for gap in gaps(Arrivals::Poisson, 4.0) {
        counts[draw.draw().unwrap() as usize * 2 + usize::from(long(gap))] += 1;
    }
    pearson(&counts, &[0.125; 8]).unwrap();
    let mut skewed = counts;
    skewed[0] += counts[0] / 30;
    skewed[1] -= counts[0] / 30;
    assert!(pearson(&skewed, &[0.125; 8]).is_err(), "dependence went unnoticed");
}
