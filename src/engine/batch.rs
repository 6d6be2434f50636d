//! The metadata of one step: flat arrays that a device can hold.

use lora_sched::{AdapterId, SlotId, StepPlan};

use super::executor::{StepFeed, TokenId};

/// In [`Batch::tokens`]: the input is the last token sampled at the row's place, which the device has.
pub const LAST_TOKEN: TokenId = TokenId::MAX;

/// Consecutive rows of the batch that use one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The slot that holds the adapter.
    pub slot: SlotId,
    /// The adapter that should be in it.
    pub adapter: AdapterId,
    /// First row.
    pub start: u32,
    /// Number of rows.
    pub rows: u32,
}

impl Segment {
    /// Whether `next` goes on behind it in the same slot.
    fn reaches(&self, next: &Self) -> bool {
        self.slot == next.slot && self.start + self.rows == next.start
    }
}

/// Adds `next` to the last of `segments` if that reaches it.
fn append(segments: &mut Vec<Segment>, next: Segment) {
    match segments.last_mut() {
        Some(last) if last.reaches(&next) => last.rows += next.rows,
        _ => segments.push(next),
    }
}

/// One step's rows. A row is one token; the rows of a sequence are consecutive and in order.
/// Sequences of one row come first, and within both parts they are ordered by slot, so that an
/// adapter's rows form at most two [`Segment`]s and need no gathering.
///
/// Every array is made once, for the largest batch; [`Batch::build`] allocates nothing.
#[derive(Debug)]
pub struct Batch {
    block_size: usize,
    blocks_per_seq: usize,
    kv_blocks: usize,
    /// `[rows]` input ids, or [`LAST_TOKEN`].
    pub tokens: Vec<TokenId>,
    /// `[rows]` position of each row in its sequence.
    pub positions: Vec<u32>,
    /// `[rows]` where the row's keys and values go: block id × block size + offset.
    pub kv_rows: Vec<u32>,
    /// `[seqs]` each sequence's place.
    pub places: Vec<u32>,
    /// `[seqs + 1]` first row of each sequence.
    pub starts: Vec<u32>,
    /// `[seqs]` tokens of each sequence in the KV cache once its rows are in.
    pub contexts: Vec<u32>,
    /// `[places, blocks_per_seq]` block ids; a place's row is valid up to its context.
    pub block_tables: Vec<u32>,
    /// `[places]` blocks in each place's row.
    block_counts: Vec<u32>,
    /// `[sampling seqs]` the last row of each sequence that samples.
    pub sample_rows: Vec<u32>,
    /// `[sampling seqs]` the place of each.
    pub sample_places: Vec<u32>,
    /// `[sampling seqs]` the index of each in the plan.
    pub sample_plan: Vec<u32>,
    /// Rows by adapter; rows of the base model are in none.
    pub segments: Vec<Segment>,
    /// The same of the rows that sample: row `j` is that of `sample_rows[j]`.
    pub sample_segments: Vec<Segment>,
    /// Slots that may still be loading: layer `k` waits for layer `k` of each.
    pub loading: Vec<SlotId>,
    /// Scratch: plan indices in batch order.
    order: Vec<u32>,
    /// Scratch: where each plan sequence's ids begin in the feed.
    feed_starts: Vec<u32>,
}

/// The largest batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Running sequences.
    pub max_num_seqs: usize,
    /// Rows.
    pub max_num_batched_tokens: usize,
    /// Tokens of one sequence.
    pub max_model_len: usize,
    /// Tokens of one KV block.
    pub block_size: usize,
    /// KV blocks of the pool.
    pub kv_blocks: usize,
}

impl BatchLimits {
    /// KV blocks of one sequence, at most.
    pub fn blocks_per_seq(&self) -> usize {
        self.max_model_len.div_ceil(self.block_size)
    }
}

/// A plan that does not fit the executor that it was given to: a bug of the driver.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("step {step}: {what}")]
pub struct PlanError {
    /// The plan's number.
    pub step: u64,
    /// What is wrong.
    pub what: String,
}

impl Batch {
    /// Makes the arrays.
    pub fn new(limits: BatchLimits) -> Self {
        let BatchLimits { max_num_seqs: seqs, max_num_batched_tokens: rows, .. } = limits;
        let blocks_per_seq = limits.blocks_per_seq();
        Self {
            block_size: limits.block_size,
            blocks_per_seq,
            kv_blocks: limits.kv_blocks,
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            kv_rows: Vec::with_capacity(rows),
            places: Vec::with_capacity(seqs),
            starts: Vec::with_capacity(seqs + 1),
            contexts: Vec::with_capacity(seqs),
            block_tables: vec![0; seqs * blocks_per_seq],
            block_counts: vec![0; seqs],
            sample_rows: Vec::with_capacity(seqs),
            sample_places: Vec::with_capacity(seqs),
            sample_plan: Vec::with_capacity(seqs),
            segments: Vec::with_capacity(seqs),
            sample_segments: Vec::with_capacity(seqs),
            loading: Vec::with_capacity(seqs),
            order: Vec::with_capacity(seqs),
            feed_starts: Vec::with_capacity(seqs),
        }
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Sequences of the batch.
    pub fn seqs(&self) -> usize {
        self.places.len()
    }

    /// The rows of sequence `i`.
    pub fn seq_rows(&self, i: usize) -> std::ops::Range<usize> {
        self.starts[i] as usize..self.starts[i + 1] as usize
    }

    /// The blocks of sequence `i`, enough for its context.
    pub fn seq_blocks(&self, i: usize) -> &[u32] {
        let row = self.places[i] as usize * self.blocks_per_seq;
        &self.block_tables[row..row + (self.contexts[i] as usize).div_ceil(self.block_size)]
    }

    /// Fills the arrays from a plan. The block tables carry over from step to step.
    pub fn build(&mut self, plan: &StepPlan, feed: &StepFeed) -> Result<(), PlanError> {
        let fail = |what: String| Err(PlanError { step: plan.step, what });
        if plan.seqs.len() > self.block_counts.len() || plan.tokens() > self.tokens.capacity() {
            return fail(format!(
                "{} sequences of {} tokens exceed the executor's {} and {}",
                plan.seqs.len(),
                plan.tokens(),
                self.block_counts.len(),
                self.tokens.capacity()
            ));
        }
        self.clear();
        self.append_blocks(plan)?;

        let mut fed = 0;
        for seq in &plan.seqs {
            self.feed_starts.push(fed);
            if !seq.decode {
                fed += seq.len;
            }
        }
        if fed as usize != feed.tokens.len() {
            return fail(format!("{} input ids for {fed} tokens", feed.tokens.len()));
        }

        self.order.extend(0..plan.seqs.len() as u32);
        // The index makes keys distinct: an unstable sort allocates nothing and keeps plan order.
        self.order.sort_unstable_by_key(|&i| {
            let seq = &plan.seqs[i as usize];
            (seq.len > 1, seq.adapter.map(|(_, slot)| slot), i)
        });
        for at in 0..self.order.len() {
            let index = self.order[at];
            self.push_seq(plan, feed, index as usize)?;
        }
        self.starts.push(self.tokens.len() as u32);
        self.loading.extend_from_slice(&plan.loading);
        Ok(())
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.kv_rows.clear();
        self.places.clear();
        self.starts.clear();
        self.contexts.clear();
        self.sample_rows.clear();
        self.sample_places.clear();
        self.sample_plan.clear();
        self.segments.clear();
        self.sample_segments.clear();
        self.loading.clear();
        self.order.clear();
        self.feed_starts.clear();
    }

    fn append_blocks(&mut self, plan: &StepPlan) -> Result<(), PlanError> {
        for seq in &plan.seqs {
            let fail = |what: String| {
                Err(PlanError { step: plan.step, what: format!("request {}: {what}", seq.id) })
            };
            let place = seq.place.0 as usize;
            if place >= self.block_counts.len() {
                return fail(format!("place {place} of {}", self.block_counts.len()));
            }
            if seq.len == 0 || (seq.decode && seq.len != 1) {
                return fail(format!("a share of {} tokens (decode: {})", seq.len, seq.decode));
            }
            if seq.start == 0 {
                self.block_counts[place] = 0;
            }
            let held = self.block_counts[place] as usize;
            let new = plan.new_blocks(seq);
            if let Some(block) = new.iter().find(|b| **b as usize >= self.kv_blocks) {
                return fail(format!("block {block} of {}", self.kv_blocks));
            }
            if held + new.len() > self.blocks_per_seq {
                return fail(format!(
                    "{} blocks, {} at most for one sequence",
                    held + new.len(),
                    self.blocks_per_seq
                ));
            }
            if ((held + new.len()) * self.block_size) < (seq.start + seq.len) as usize {
                return fail(format!(
                    "{} blocks do not hold {} tokens",
                    held + new.len(),
                    seq.start + seq.len
                ));
            }
            let row = place * self.blocks_per_seq + held;
            self.block_tables[row..row + new.len()].copy_from_slice(new);
            self.block_counts[place] += new.len() as u32;
        }
        Ok(())
    }

    fn push_seq(&mut self, plan: &StepPlan, feed: &StepFeed, index: usize) -> Result<(), PlanError> {
        let seq = &plan.seqs[index];
        let first = self.tokens.len() as u32;
        let table = seq.place.0 as usize * self.blocks_per_seq;
        self.places.push(seq.place.0);
        self.starts.push(first);
        self.contexts.push(seq.start + seq.len);
        if seq.decode {
            self.tokens.push(LAST_TOKEN);
        } else {
            let from = self.feed_starts[index] as usize;
            self.tokens.extend_from_slice(&feed.tokens[from..from + seq.len as usize]);
        }
        for position in seq.start..seq.start + seq.len {
            let block = self.block_tables[table + position as usize / self.block_size];
            self.positions.push(position);
            self.kv_rows
                .push((block as usize * self.block_size + position as usize % self.block_size) as u32);
        }
        if seq.samples {
            self.sample_rows.push(first + seq.len - 1);
            self.sample_places.push(seq.place.0);
            self.sample_plan.push(index as u32);
        }
        if let Some((adapter, slot)) = seq.adapter {
            let rows = Segment { slot, adapter, start: first, rows: seq.len };
            if let Some(last) = self.segments.last().filter(|l| l.reaches(&rows) && l.adapter != adapter) {
                return Err(PlanError {
                    step: plan.step,
                    what: format!("adapters {} and {adapter} both in slot {slot}", last.adapter),
                });
            }
            append(&mut self.segments, rows);
            if seq.samples {
                let row = self.sample_rows.len() as u32 - 1;
                append(&mut self.sample_segments, Segment { start: row, rows: 1, ..rows });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_sched::{PlaceId, RequestId, SeqStep};

    fn limits() -> BatchLimits {
        BatchLimits {
            max_num_seqs: 4,
            max_num_batched_tokens: 32,
            max_model_len: 64,
            block_size: 8,
            kv_blocks: 100,
        }
    }

    fn seq(place: u32, slot: Option<u32>, start: u32, len: u32, blocks: std::ops::Range<u32>) -> SeqStep {
        SeqStep {
            id: RequestId(u64::from(place)),
            place: PlaceId(place),
            adapter: slot.map(|s| (AdapterId(s + 10), SlotId(s))),
            start,
            len,
            decode: false,
            samples: true,
            new_blocks: blocks,
        }
    }

    #[test]
    fn rows_are_grouped_by_length_and_slot() {
        let mut batch = Batch::new(limits());
        let plan = StepPlan {
            seqs: vec![
                seq(0, Some(1), 0, 3, 0..1),
                seq(1, None, 0, 1, 1..2),
                seq(2, Some(0), 0, 1, 2..3),
                seq(3, Some(1), 0, 10, 3..5),
            ],
            blocks: vec![90, 91, 92, 7, 3],
            ..StepPlan::default()
        };
        let feed = StepFeed { tokens: (0..15).collect(), begins: vec![] };
        batch.build(&plan, &feed).unwrap();
        assert_eq!(batch.places, [1, 2, 0, 3]);
        assert_eq!(batch.starts, [0, 1, 2, 5, 15]);
        assert_eq!(batch.tokens, [3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(batch.sample_plan, [1, 2, 0, 3]);
        assert_eq!(batch.sample_rows, [0, 1, 4, 14]);
        let segments: Vec<_> = batch.segments.iter().map(|s| (s.slot.0, s.start, s.rows)).collect();
        assert_eq!(segments, [(0, 1, 1), (1, 2, 13)]);
        let sampling: Vec<_> = batch.sample_segments.iter().map(|s| (s.slot.0, s.start, s.rows)).collect();
        assert_eq!(sampling, [(0, 1, 1), (1, 2, 2)]);
        assert_eq!(batch.kv_rows[5..], [56, 57, 58, 59, 60, 61, 62, 63, 24, 25]);
        assert_eq!(batch.seq_blocks(3), [7, 3]);
    }

    #[test]
    fn block_tables_carry_over_until_a_place_begins_anew() {
        let mut batch = Batch::new(limits());
        let mut plan =
            StepPlan { seqs: vec![seq(0, None, 0, 8, 0..1)], blocks: vec![5], ..StepPlan::default() };
        batch.build(&plan, &StepFeed { tokens: vec![1; 8], begins: vec![] }).unwrap();
        plan.seqs = vec![SeqStep { decode: true, ..seq(0, None, 8, 1, 0..1) }];
        plan.blocks = vec![2];
        batch.build(&plan, &StepFeed::default()).unwrap();
        assert_eq!((batch.tokens[0], batch.kv_rows[0]), (LAST_TOKEN, 16));
        assert_eq!(batch.seq_blocks(0), [5, 2]);
        plan.seqs = vec![seq(0, None, 0, 1, 0..1)];
        plan.blocks = vec![9];
        batch.build(&plan, &StepFeed { tokens: vec![1], begins: vec![] }).unwrap();
        assert_eq!(batch.seq_blocks(0), [9]);
    }

    #[test]
    fn impossible_plans_are_refused() {
        let mut batch = Batch::new(limits());
        let mut refuse = |seqs: Vec<SeqStep>, blocks: Vec<u32>, ids: usize, said: &str| {
            let plan = StepPlan { seqs, blocks, ..StepPlan::default() };
            let feed = StepFeed { tokens: vec![1; ids], begins: vec![] };
            let message = batch.build(&plan, &feed).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        };
        refuse(vec![seq(0, None, 0, 9, 0..1)], vec![1], 9, "1 blocks do not hold 9 tokens");
        refuse(vec![seq(0, None, 0, 1, 0..1)], vec![100], 1, "block 100 of 100");
        refuse(vec![seq(7, None, 0, 1, 0..1)], vec![1], 1, "place 7 of 4");
        refuse(vec![seq(0, None, 0, 2, 0..1)], vec![1], 1, "1 input ids for 2 tokens");
        refuse(vec![seq(0, None, 0, 33, 0..1)], vec![1], 33, "exceed");
    }
}
