//! Decoding one id at a time, without ever showing half a character.

use super::{Kind, Tokenizer, byte_level};

/// Ids of the text before that decide how the next one is shown; more changes nothing.
const CONTEXT: usize = 5;
/// A character is at most four bytes, hence at most four byte tokens: after twice as many ids
/// that do not complete one, the text is not going to be valid and is shown as it is.
const MOST_HELD: usize = 8;

/// An incremental decoder: the pieces that it gives make up the text of all ids pushed.
///
/// Each push decodes a bounded window, so a whole text costs time linear in its length.
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// Byte-level: bytes of a character begun.
    bytes: Vec<u8>,
    /// Other tokenizers: shown ids that are context, then ids not shown yet.
    window: Vec<u32>,
    /// How many of the window's ids have been shown.
    shown: usize,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Tokenizer, before: &[u32]) -> Self {
        let window = before[before.len().saturating_sub(CONTEXT)..].to_vec();
        let shown = window.len();
        Self { tokenizer, bytes: Vec::new(), window, shown }
    }

    /// Adds an id; gives the text that it completes, if it completes any. Never an empty text.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.tokenizer.is_special(id) {
            return None;
        }
        match self.tokenizer.inner.kind {
            Kind::Bytes => {
                self.bytes.push(byte_level::byte_of(id)?);
                self.complete_bytes()
            }
            Kind::Hf(_) => {
                self.window.push(id);
                self.complete_window(false)
            }
        }
    }

    /// What is held back, with U+FFFD for a character that never became whole.
    pub fn finish(&mut self) -> Option<String> {
        match self.tokenizer.inner.kind {
            Kind::Bytes => {
                let text = String::from_utf8_lossy(&self.bytes).into_owned();
                self.bytes.clear();
                (!text.is_empty()).then_some(text)
            }
            Kind::Hf(_) => self.complete_window(true),
        }
    }

    /// Shows whole characters, and U+FFFD for bytes that can begin none.
    fn complete_bytes(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(valid) => {
                    text += valid;
                    self.bytes.clear();
                    break;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    text += &String::from_utf8_lossy(&self.bytes[..valid]);
                    let bad = e.error_len().unwrap_or(0);
                    self.bytes.drain(..valid + bad);
                    if bad == 0 {
                        break;
                    }
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        (!text.is_empty()).then_some(text)
    }

    fn complete_window(&mut self, at_any_cost: bool) -> Option<String> {
        let held = self.window.len() - self.shown;
        if held == 0 {
            return None;
        }
        let whole = self.tokenizer.decode(&self.window);
        if whole.ends_with(char::REPLACEMENT_CHARACTER) && held < MOST_HELD && !at_any_cost {
            return None;
        }
        // The context is decoded with and without the new ids: what an id looks like depends on its
        // neighbours (leading spaces, joined bytes).
        let context = self.tokenizer.decode(&self.window[..self.shown]);
        let new = whole.strip_prefix(context.as_str()).map(str::to_owned);
        let new = new.unwrap_or_else(|| self.tokenizer.decode(&self.window[self.shown..]));
        self.shown = self.window.len();
        let drop = self.shown.saturating_sub(CONTEXT);
        self.window.drain(..drop);
        self.shown -= drop;
        (!new.is_empty()).then_some(new)
    }
}
