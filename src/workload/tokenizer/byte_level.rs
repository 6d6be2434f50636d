//! The embedded tokenizer: an id a byte, so that any text has one encoding and a known length.

/// Never made by encoding.
pub const UNK: u32 = 0;
/// Begins every text.
pub const BOS: u32 = 1;
/// Ends a sequence.
pub const EOS: u32 = 2;
/// The id of byte 0.
pub const FIRST_BYTE: u32 = 3;
/// Three special ids and 256 bytes.
pub const VOCAB_SIZE: usize = 259;

pub fn encode(text: &str) -> Vec<u32> {
    std::iter::once(BOS).chain(text.bytes().map(|b| FIRST_BYTE + u32::from(b))).collect()
}

/// The byte of an id, if it has one.
pub fn byte_of(id: u32) -> Option<u8> {
    id.checked_sub(FIRST_BYTE).and_then(|b| u8::try_from(b).ok())
}

pub fn decode(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().filter_map(|&id| byte_of(id)).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
