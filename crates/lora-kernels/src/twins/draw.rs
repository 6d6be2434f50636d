//! [`crate::Draw`], from the bytes of the stream.

use crate::bf16;

/// Values uniform in ± `bound` around `centre`, two bytes each: `bytes` are those of the key's ChaCha8 stream from
/// the first value on, which whoever calls this has from another implementation.
pub fn uniform(bytes: &[u8], bound: f32, centre: f32) -> Vec<bf16> {
    let scale = bound / 32_768.0;
    let value = |&pair: &[u8; 2]| (f32::from(i16::from_le_bytes(pair)) + 0.5) * scale + centre;
    bytes.as_chunks().0.iter().map(|pair| bf16::from_f32(value(pair))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_and_the_middle_of_the_range() {
        let drawn = uniform(&[0x00, 0x80, 0xff, 0x7f, 0x00, 0x00, 0x00, 0x40], 32_768.0, 0.0);
        let want = [-32_767.5f32, 32_767.5, 0.5, 16_384.5].map(bf16::from_f32);
        assert_eq!(drawn, want);
        assert_eq!(uniform(&[0x00, 0x40], 2.0, 3.0), [bf16::from_f32(4.0)]);
    }
}
