//! Reproducible dummy values: ChaCha8, one named substream per purpose.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// Values drawn uniformly from a named substream, 16 bits of randomness each: dummy tensors are
/// gigabytes, and their speed is the time to start. A device may draw them itself: value `i` is the
/// `i`-th little-endian 16-bit integer of the ChaCha8 stream of `key`, scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uniform {
    /// The stream's key.
    pub key: [u8; 32],
    /// Values of the stream that come before: even.
    pub skip: usize,
    /// Values lie within ± this …
    pub bound: f32,
    /// … of this.
    pub centre: f32,
}

impl Uniform {
    /// The stream of one purpose under one seed. Streams of different names are independent, so that
    /// what is drawn for one purpose never shifts another's values.
    pub fn new(seed: u64, name: &str, bound: f32, centre: f32) -> Self {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(name.as_bytes());
        Self { key: hash.finalize().into(), skip: 0, bound, centre }
    }

    /// Fills `out`.
    pub fn fill(&self, out: &mut [f32]) {
        let mut rng = ChaCha8Rng::from_seed(self.key);
        // The stream is counted in words of two values.
        rng.set_word_pos(self.skip as u128 / 2);
        let mut bytes = [0u8; 4096];
        let scale = self.bound / 32_768.0;
        for chunk in out.chunks_mut(bytes.len() / 2) {
            let drawn = &mut bytes[..chunk.len() * 2];
            rng.fill_bytes(drawn);
            for (value, pair) in chunk.iter_mut().zip(drawn.chunks_exact(2)) {
                *value = (f32::from(i16::from_le_bytes([pair[0], pair[1]])) + 0.5) * scale + self.centre;
            }
        }
    }
}

/// A tensor's values on their way to a device.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// From a checkpoint.
    Read(Vec<f32>),
    /// To be drawn, by the host or by the device itself.
    Drawn {
        /// From where.
        from: Uniform,
        /// How many.
        len: usize,
    },
}

impl Values {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Read(values) => values.len(),
            Self::Drawn { len, .. } => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values themselves, drawn here if need be.
    pub fn into_host(self) -> Vec<f32> {
        match self {
            Self::Read(values) => values,
            Self::Drawn { from, len } => {
                let mut values = vec![0.0; len];
                from.fill(&mut values);
                values
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(from: Uniform, len: usize) -> Vec<f32> {
        Values::Drawn { from, len }.into_host()
    }

    #[test]
    fn values_are_reproducible_bounded_and_centred() {
        let from = Uniform::new(7, "x", 0.5, 0.0);
        let a = drawn(from, 10_000);
        assert_eq!(a, drawn(from, 10_000));
        assert!(a.iter().all(|v| v.abs() <= 0.5 && *v != 0.0));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.02, "{mean}");
        let shifted = drawn(Uniform { centre: 1.0, ..from }, 3);
        assert_eq!(shifted, [a[0] + 1.0, a[1] + 1.0, a[2] + 1.0]);
    }

    #[test]
    fn names_and_seeds_give_other_streams() {
        let first = |seed, name| drawn(Uniform::new(seed, name, 1.0, 0.0), 4);
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_ne!(first(1, "a"), first(2, "a"));
    }

    #[test]
    fn a_stream_can_be_entered_anywhere() {
        let from = Uniform::new(3, "y", 0.5, 0.0);
        let whole = drawn(from, 9000);
        for skip in [2, 30, 32, 4096, 8990] {
            assert_eq!(drawn(Uniform { skip, ..from }, 10), whole[skip..skip + 10], "{skip}");
        }
    }
}
