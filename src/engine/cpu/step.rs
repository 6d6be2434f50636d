//! The running step's metadata, as the CPU's operations need it.

use std::sync::Arc;

use lora_sched::SlotId;

use super::backend::CpuError;
use super::slots::{Load, Slots};
use crate::engine::adapters::AdapterLayout;
use crate::engine::batch::{Batch, BatchLimits, LAST_TOKEN};
use crate::engine::executor::TokenId;

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
            blocks: Vec::with_capacity(seqs * limits.max_model_len.div_ceil(limits.block_size)),
            block_starts: Vec::with_capacity(seqs + 1),
            sample_rows: Vec::with_capacity(seqs),
            sample_places: Vec::with_capacity(seqs),
            segments: Vec::with_capacity(seqs),
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
    ) -> Result<(), CpuError> {
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
            let last = last_tokens[batch.places[seq] as usize];
            let ids = &batch.tokens[batch.seq_rows(seq)];
            self.tokens.extend(ids.iter().map(|id| if *id == LAST_TOKEN { last } else { *id }));
        }
        if let Some(&token) = self.tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(CpuError::UnknownToken { token, vocab });
        }
        self.loads.clear();
        self.loads.extend(batch.loading.iter().map(|slot| Load::new(*slot)));
        self.segments.clear();
        for segment in &batch.segments {
            let held = slots.held(segment.slot);
            match held {
                Some((adapter, layout)) if adapter == segment.adapter => {
                    self.segments.push(ActiveSegment {
                        slot: segment.slot,
                        layout,
                        start: segment.start as usize,
                        rows: segment.rows as usize,
                    });
                }
                held => {
                    return Err(CpuError::WrongAdapter {
                        slot: segment.slot,
                        wanted: segment.adapter,
                        held: held.map(|(adapter, _)| adapter),
                    });
                }
            }
        }
        Ok(())
    }
}
