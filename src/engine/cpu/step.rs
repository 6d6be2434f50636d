//! The running step's metadata, as the CPU's operations need it.

use std::sync::Arc;

use lora_sched::SlotId;

use super::slots::{Load, Slots};
use crate::engine::adapters::AdapterLayout;
use crate::engine::batch::{Batch, BatchLimits, Segment};
use crate::engine::device::{StepError, input_ids, wanted};
use crate::engine::executor::TokenId;
use crate::engine::model::narrows;

/// A segment of the running step with its adapter's offset table.
pub(super) struct ActiveSegment {
    pub slot: SlotId,
    pub layout: Arc<AdapterLayout>,
    pub start: usize,
    pub rows: usize,
}

/// The running step's metadata, as the operations need it.
pub(super) struct Step {
    pub tokens: Vec<TokenId>,
    pub positions: Vec<u32>,
    pub kv_rows: Vec<u32>,
    pub starts: Vec<u32>,
    pub contexts: Vec<u32>,
    /// Blocks of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// `[seqs + 1]` where each sequence's begin.
    pub block_starts: Vec<u32>,
    pub sample_rows: Vec<u32>,
    pub sample_places: Vec<u32>,
    pub segments: Vec<ActiveSegment>,
    /// Of the rows that sample, where the last layer's rest is computed for them alone.
    pub sample_segments: Vec<ActiveSegment>,
    pub loads: Vec<Load>,
}

impl Step {
    pub fn new(limits: &BatchLimits) -> Self {
        let (rows, seqs) = (limits.max_num_batched_tokens, limits.max_num_seqs);
        Self {
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            kv_rows: Vec::with_capacity(rows),
            starts: Vec::with_capacity(seqs + 1),
            contexts: Vec::with_capacity(seqs),
            blocks: Vec::with_capacity(seqs * limits.blocks_per_seq()),
            block_starts: Vec::with_capacity(seqs + 1),
            sample_rows: Vec::with_capacity(seqs),
            sample_places: Vec::with_capacity(seqs),
            segments: Vec::with_capacity(seqs),
            sample_segments: Vec::with_capacity(seqs),
            loads: Vec::with_capacity(seqs),
        }
    }

    /// Takes a batch: looks up last tokens and what the slots hold.
    pub fn take(
        &mut self,
        batch: &Batch,
        last_tokens: &[TokenId],
        vocab: usize,
        slots: &Slots,
    ) -> Result<(), StepError> {
        for (to, from) in [
            (&mut self.positions, &batch.positions),
            (&mut self.kv_rows, &batch.kv_rows),
            (&mut self.starts, &batch.starts),
            (&mut self.contexts, &batch.contexts),
            (&mut self.sample_rows, &batch.sample_rows),
            (&mut self.sample_places, &batch.sample_places),
        ] {
            to.clear();
            to.extend_from_slice(from);
        }
        self.tokens.clear();
        self.blocks.clear();
        self.block_starts.clear();
        self.block_starts.push(0);
        for seq in 0..batch.seqs() {
            self.blocks.extend_from_slice(batch.seq_blocks(seq));
            self.block_starts.push(self.blocks.len() as u32);
        }
        for token in input_ids(batch, last_tokens, vocab) {
            self.tokens.push(token?);
        }
        self.loads.clear();
        self.loads.extend(batch.loading.iter().map(|slot| Load::new(*slot)));
        activate(&mut self.segments, &batch.segments, slots)?;
        self.sample_segments.clear();
        if narrows(batch.rows(), batch.sample_rows.len()) {
            activate(&mut self.sample_segments, &batch.sample_segments, slots)?;
        }
        Ok(())
    }
}

/// Looks up what the slots of `segments` hold.
fn activate(to: &mut Vec<ActiveSegment>, segments: &[Segment], slots: &Slots) -> Result<(), StepError> {
    to.clear();
    for segment in segments {
        to.push(ActiveSegment {
            slot: segment.slot,
            layout: wanted(segment, slots.held(segment.slot))?,
            start: segment.start as usize,
            rows: segment.rows as usize,
        });
    }
    Ok(())
}
