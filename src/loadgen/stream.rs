//! The body of a streamed `/generate`: JSON objects, each followed by one NUL byte.

use serde::Deserialize;

use super::piece::Piece;
use crate::report::record::PartsS;

/// What the client reads of one object. The text, which repeats the prompt each time, is skipped.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Message {
    /// Seconds to the first token, by the server; from the first token on.
    #[serde(default)]
    pub ttft: Option<f64>,
    /// Whether it is the last; servers that do not say just end the stream.
    #[serde(default)]
    pub finished: Option<bool>,
    /// Where the TTFT went.
    #[serde(default)]
    pub ttft_parts: Option<PartsS>,
    /// Tokens put out, where the server says.
    #[serde(default)]
    pub output_tokens: Option<u32>,
    /// A failure in the middle of the stream.
    #[serde(default)]
    pub error: Option<serde_json::Value>,
}

impl From<Message> for Piece {
    fn from(message: Message) -> Self {
        Self {
            token: message.ttft.is_some(),
            ttft: message.ttft,
            parts: message.ttft_parts,
            prompt_tokens: None,
            output_tokens: message.output_tokens,
            finished: message.finished,
            error: message.error.map(|e| e.to_string()),
        }
    }
}

/// Takes a stream apart, wherever its chunks begin and end.
#[derive(Debug, Default)]
pub struct Messages {
    rest: Vec<u8>,
}

impl Messages {
    /// Adds a chunk and hands each object that it completes to `each`.
    pub fn push(&mut self, chunk: &[u8], mut each: impl FnMut(Message)) -> Result<(), serde_json::Error> {
        let mut chunk = chunk;
        while let Some(end) = chunk.iter().position(|b| *b == 0) {
            let (object, after) = (&chunk[..end], &chunk[end + 1..]);
            if self.rest.is_empty() {
                parse(object, &mut each)?;
            } else {
                self.rest.extend_from_slice(object);
                let whole = std::mem::take(&mut self.rest);
                parse(&whole, &mut each)?;
            }
            chunk = after;
        }
        self.rest.extend_from_slice(chunk);
        Ok(())
    }

    /// The stream has ended: what is left is an object whose NUL is missing, or half of one.
    pub fn finish(self, mut each: impl FnMut(Message)) -> Result<(), serde_json::Error> {
        parse(&self.rest, &mut each)
    }
}

fn parse(object: &[u8], each: &mut impl FnMut(Message)) -> Result<(), serde_json::Error> {
    if !object.trim_ascii().is_empty() {
        each(serde_json::from_slice(object)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = b"{\"text\":[\"a \\u0000 \xc3\xb1\"],\"finished\":false}\0{\"text\":[\"b\"],\"finished\":false,\"ttft\":0.25}\0\
        {\"text\":[\"c\"],\"finished\":true,\"ttft\":0.25,\"ttft_parts\":{\"front\":0.1,\"queue\":0,\"kv\":0,\"slot\":0,\"swap\":0,\"prefill\":0.15,\"deliver\":0},\"output_tokens\":3}\0";

    fn read(chunks: impl Iterator<Item = Vec<u8>>) -> Vec<Message> {
        let (mut messages, mut seen) = (Messages::default(), Vec::new());
        for chunk in chunks {
            messages.push(&chunk, |m| seen.push(m)).unwrap();
        }
        messages.finish(|m| seen.push(m)).unwrap();
        seen
    }

    #[test]
    fn messages_are_the_same_however_the_stream_is_cut() {
        let whole = read(std::iter::once(BODY.to_vec()));
        assert_eq!(whole.len(), 3);
        assert_eq!((whole[0].ttft, whole[1].ttft), (None, Some(0.25)));
        assert_eq!((whole[2].finished, whole[2].output_tokens), (Some(true), Some(3)));
        assert!((whole[2].ttft_parts.unwrap().total() - 0.25).abs() < 1e-12);
        for size in 1..BODY.len() {
            assert_eq!(read(BODY.chunks(size).map(<[u8]>::to_vec)), whole, "chunks of {size}");
        }
    }

    #[test]
    fn a_last_message_without_its_nul_counts_and_half_a_one_is_an_error() {
        assert_eq!(read(std::iter::once(BODY[..BODY.len() - 1].to_vec())).len(), 3);
        let mut messages = Messages::default();
        messages.push(&BODY[..BODY.len() - 9], |_| {}).unwrap();
        assert!(messages.finish(|_| {}).is_err());
        assert!(Messages::default().push(b"oops\0", |_| {}).is_err());
    }
}
