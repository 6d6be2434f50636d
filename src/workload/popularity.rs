//! Which adapter a request asks for. No public trace of adapter popularity is known: both laws are synthetic.

use std::fmt;
use std::str::FromStr;

use rand::RngExt as _;
use rand::seq::SliceRandom as _;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::streams::stream;

/// How adapters are drawn. As text: `uniform`, `zipf:S`.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Popularity {
    /// All alike.
    #[default]
    Uniform,
    /// The adapter of rank *k* in proportion to *k*^−s.
    Zipf {
        /// The exponent; 0 is uniform.
        s: f64,
    },
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf { s } => write!(f, "zipf:{s}"),
        }
    }
}

impl FromStr for Popularity {
    type Err = UnknownPopularity;

    fn from_str(text: &str) -> Result<Self, UnknownPopularity> {
        if text == "uniform" {
            return Ok(Self::Uniform);
        }
        match text.strip_prefix("zipf:").map(str::parse::<f64>) {
            Some(Ok(s)) if (0.0..=10.0).contains(&s) => Ok(Self::Zipf { s }),
            _ => Err(UnknownPopularity(text.to_owned())),
        }
    }
}

impl From<Popularity> for String {
    fn from(popularity: Popularity) -> Self {
        popularity.to_string()
    }
}

impl TryFrom<String> for Popularity {
    type Error = UnknownPopularity;

    fn try_from(text: String) -> Result<Self, UnknownPopularity> {
        text.parse()
    }
}

/// Text that names no popularity law.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown popularity '{0}': use uniform or zipf:S (S, the exponent, from 0 to 10)")]
pub struct UnknownPopularity(String);

/// Draws adapters.
///
/// Draws invert the cumulative distribution, one uniform number each, so that two laws with the same
/// seed are coupled (common random numbers). A table says where to begin to look: O(1) on average.
#[derive(Clone, Debug)]
pub struct AdapterDraw {
    /// The adapter of each popularity rank.
    by_rank: Vec<u32>,
    /// Cumulative probability by rank.
    cumulative: Vec<f64>,
    /// The rank of `i / guide.len()`. A power of two, so that a draw's place in it is exact.
    guide: Vec<u32>,
    rng: ChaCha8Rng,
}

impl AdapterDraw {
    /// Adapters `0..total`. Which adapter has which rank is a permutation from the seed: servers
    /// preload the lowest ids, which must not be the popular ones.
    pub fn new(popularity: Popularity, total: u32, seed: u64) -> Self {
        let mut by_rank: Vec<u32> = (0..total).collect();
        let exponent = match popularity {
            Popularity::Uniform => 0.0,
            Popularity::Zipf { s } => {
                by_rank.shuffle(&mut stream(seed, "popularity"));
                s
            }
        };
        let weights = (1..=total).map(|k| f64::from(k).powf(-exponent));
        let mut cumulative: Vec<f64> = weights
            .scan(0.0, |sum, w| {
                *sum += w;
                Some(*sum)
            })
            .collect();
        let whole = cumulative.last().copied().unwrap_or(1.0);
        cumulative.iter_mut().for_each(|c| *c /= whole);
        let guides = (total as usize).next_power_of_two();
        let rank_of = |u: f64| cumulative.partition_point(|c| *c <= u) as u32;
        let guide = (0..guides).map(|i| rank_of(i as f64 / guides as f64)).collect();
        Self { by_rank, cumulative, guide, rng: stream(seed, "adapters") }
    }

    /// The next request's adapter; none if there are no adapters.
    pub fn draw(&mut self) -> Option<u32> {
        let u: f64 = self.rng.random();
        let mut rank = self.guide[(u * self.guide.len() as f64) as usize] as usize;
        while self.cumulative.get(rank).is_some_and(|c| *c <= u) {
            rank += 1;
        }
        self.by_rank.get(rank).or(self.by_rank.last()).copied()
    }

    /// Probability of each adapter, by id.
    pub fn probabilities(&self) -> Vec<f64> {
        let mut p = vec![0.0; self.by_rank.len()];
        let mut before = 0.0;
        for (&adapter, &cumulative) in self.by_rank.iter().zip(&self.cumulative) {
            p[adapter as usize] = cumulative - before;
            before = cumulative;
        }
        p
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: usize = 100_000;

    /// Pearson's statistic of drawn counts against `probabilities`.
    fn chi_square(popularity: Popularity, seed: u64) -> f64 {
        let mut draw = AdapterDraw::new(popularity, 64, seed);
        let mut counts = [0u32; 64];
        for _ in 0..DRAWS {
            counts[draw.draw().unwrap() as usize] += 1;
        }
        counts
            .iter()
            .zip(draw.probabilities())
            .map(|(&n, p)| (f64::from(n) - p * DRAWS as f64).powi(2) / (p * DRAWS as f64))
            .sum()
    }

    #[test]
    fn draws_follow_the_law() {
        // 63 degrees of freedom: 120 is beyond the 1 - 1e-5 quantile.
        for popularity in [Popularity::Uniform, Popularity::Zipf { s: 1.0 }, Popularity::Zipf { s: 0.5 }] {
            let seen = chi_square(popularity, 5);
            assert!(seen < 120.0, "{popularity}: {seen}");
        }
    }

    #[test]
    fn zipf_probabilities_are_the_formula_over_a_permutation_of_the_seed() {
        let p = AdapterDraw::new(Popularity::Zipf { s: 1.0 }, 4, 1).probabilities();
        let mut sorted = p.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let whole = 1.0 + 1.0 / 2.0 + 1.0 / 3.0 + 1.0 / 4.0;
        for (k, p) in sorted.iter().enumerate() {
            assert!((p - 1.0 / (k + 1) as f64 / whole).abs() < 1e-12);
        }
        let most_popular = |seed| {
            let p = AdapterDraw::new(Popularity::Zipf { s: 1.0 }, 128, seed).probabilities();
            p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(id, _)| id)
        };
        assert!((0..8).any(|seed| most_popular(seed) != most_popular(100)));
    }

    #[test]
    fn without_adapters_requests_are_for_the_base_model() {
        assert_eq!(AdapterDraw::new(Popularity::Uniform, 0, 1).draw(), None);
    }

    #[test]
    fn names_are_read_back_and_others_refused() {
        for text in ["uniform", "zipf:1", "zipf:0.9"] {
            assert_eq!(text.parse::<Popularity>().unwrap().to_string(), text);
        }
        for text in ["", "zipf", "zipf:", "zipf:-1", "zipf:nan", "zipf:11", "pareto:1"] {
            let error = text.parse::<Popularity>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("zipf:S"), "{error}");
        }
    }
}
