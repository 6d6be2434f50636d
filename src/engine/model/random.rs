//! Reproducible dummy values: ChaCha8, one named substream per purpose.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The random stream of one purpose under one seed. Streams of different names are independent, so
/// that what is drawn for one purpose never shifts another's values.
pub fn substream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// Fills `out` with values uniform in `±bound`, 16 bits of randomness each: dummy tensors are
/// gigabytes, and their speed is the time to start.
pub fn fill_uniform(rng: &mut ChaCha8Rng, bound: f32, out: &mut [f32]) {
    let mut bytes = [0u8; 4096];
    let scale = bound / 32_768.0;
    for chunk in out.chunks_mut(bytes.len() / 2) {
        let drawn = &mut bytes[..chunk.len() * 2];
        rng.fill_bytes(drawn);
        for (value, pair) in chunk.iter_mut().zip(drawn.chunks_exact(2)) {
            *value = (f32::from(i16::from_le_bytes([pair[0], pair[1]])) + 0.5) * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_reproducible_bounded_and_centred() {
        let mut a = vec![0.0; 10_000];
        let mut b = a.clone();
        fill_uniform(&mut substream(7, "x"), 0.5, &mut a);
        fill_uniform(&mut substream(7, "x"), 0.5, &mut b);
        assert_eq!(a, b);
        assert!(a.iter().all(|v| v.abs() <= 0.5 && *v != 0.0));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.02, "{mean}");
    }

    #[test]
    fn names_and_seeds_give_other_streams() {
        let first = |seed, name| substream(seed, name).next_u64();
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_ne!(first(1, "a"), first(2, "a"));
    }
}
