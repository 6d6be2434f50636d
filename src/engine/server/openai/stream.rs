//! Server-sent events: a piece of output each, then what was asked for beside it, then `[DONE]`.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;

use super::answer::{Answer, Usage};
use super::logprobs::Untold;
use crate::engine::server::sequences::{Piece, Sequences};

/// Ends every stream.
const DONE: &str = "data: [DONE]\n\n";

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Pieces,
    Tail,
    Done,
    Over,
}

/// The events of one answer. Dropping it cancels the sequences.
pub(super) struct Events {
    answer: Answer,
    sequences: Sequences,
    /// Sequences of which something has been told.
    begun: Vec<bool>,
    /// One for each sequence.
    untold: Vec<Untold>,
    at: At,
}

impl Events {
    pub(super) fn new(answer: Answer, sequences: Sequences) -> Self {
        let untold = (0..sequences.len()).map(|_| Untold::default()).collect();
        Self { answer, begun: vec![false; sequences.len()], untold, sequences, at: At::Pieces }
    }

    /// None for a piece that has nothing to tell: half a character, or what may be half a stop string. An
    /// event without text would be taken for a token.
    fn piece(&mut self, mut piece: Piece) -> Option<Bytes> {
        let i = piece.choice;
        self.untold[i].push(piece.logprobs.take());
        if piece.text.is_empty() && piece.finish.is_none() {
            return None;
        }
        let first = !std::mem::replace(&mut self.begun[i], true);
        let usage = self.answer.shape.continuous_usage;
        let usage = usage.then(|| Usage::new(self.sequences.prompt_tokens_of(i), piece.tokens));
        let logprobs = self.answer.logprobs(&mut self.untold[i], &self.sequences);
        Some(self.answer.piece(&piece, first, logprobs, usage))
    }
}

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let event = match this.at {
                At::Over => return Poll::Ready(None),
                At::Pieces => match this.sequences.poll_next(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(None) => {
                        let shape = this.answer.shape;
                        this.at = if shape.include_usage || shape.metrics { At::Tail } else { At::Done };
                        continue;
                    }
                    Poll::Ready(Some(Piece { broken: Some(error), .. })) => {
                        this.at = At::Over;
                        format!("data: {}\n\n{DONE}", error.body()).into()
                    }
                    Poll::Ready(Some(piece)) => match this.piece(piece) {
                        Some(event) => event,
                        None => continue,
                    },
                },
                At::Tail => {
                    this.at = At::Done;
                    this.answer.tail(&this.sequences)
                }
                At::Done => {
                    this.at = At::Over;
                    Bytes::from_static(DONE.as_bytes())
                }
            };
            return Poll::Ready(Some(Ok(event)));
        }
    }
}
