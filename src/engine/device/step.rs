//! A step's batch against what the device holds: input ids, and the adapters in its slots.

use lora_sched::{AdapterId, SlotId};

use crate::engine::batch::{Batch, LAST_TOKEN, Segment};
use crate::engine::executor::TokenId;

/// A step that does not fit what the device holds: a bug of the driver.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The slot holds another adapter than the plan says.
    #[error("the plan wants adapter {wanted} in slot {slot}, which holds {}", held.map_or("none".into(), |h| format!("adapter {h}")))]
    WrongAdapter {
        /// The slot.
        slot: SlotId,
        /// The plan's adapter.
        wanted: AdapterId,
        /// What is there.
        held: Option<AdapterId>,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sequence samples that was never begun.
    #[error("place {place} samples, and no sequence has begun there")]
    NotBegun {
        /// The place.
        place: u32,
    },
}

/// The batch's input ids, `[rows]`: a sequence's last token where the plan leaves it to the device.
pub(in crate::engine) fn input_ids<'a>(
    batch: &'a Batch,
    last_tokens: &'a [TokenId],
    vocab: usize,
) -> impl Iterator<Item = Result<TokenId, StepError>> + 'a {
    (0..batch.seqs()).flat_map(move |seq| {
        let last = last_tokens[batch.places[seq] as usize];
        batch.tokens[batch.seq_rows(seq)].iter().map(move |&id| {
            let token = if id == LAST_TOKEN { last } else { id };
            if (token as usize) < vocab { Ok(token) } else { Err(StepError::UnknownToken { token, vocab }) }
        })
    })
}

/// What the segment's slot holds, if it is the adapter that the plan wants there.
pub(in crate::engine) fn wanted<T>(segment: &Segment, held: Option<(AdapterId, T)>) -> Result<T, StepError> {
    match held {
        Some((adapter, held)) if adapter == segment.adapter => Ok(held),
        held => Err(StepError::WrongAdapter {
            slot: segment.slot,
            wanted: segment.adapter,
            held: held.map(|(adapter, _)| adapter),
        }),
    }
}
