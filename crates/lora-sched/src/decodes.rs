//! The requests that decode.
//!
//! Every step brings all of them a token further, so where one stands follows from how many steps there were since it
//! began. Nobody is looked at in a step but to see who ends and who needs a block, and only in steps in which somebody
//! does: a step costs O(1), and O(decoding requests) where one of them changes, over entries of 40 bytes side by side.

use crate::plan::Outline;
use crate::requests::{Phase, PinnedSlot, Request};
use crate::types::PlaceId;

/// A request that decodes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decode {
    /// Its index among the requests.
    pub(crate) index: u32,
    pub(crate) place: PlaceId,
    pub(crate) slot: PinnedSlot,
    /// Steps that there had been when it began.
    since: u64,
    /// After so many it has its last token.
    end: u64,
    /// After so many the next one needs a block.
    full: u64,
}

/// All of them, in order of admission. They are the first of the running requests: prompts are computed in that
/// order, so nobody decodes before one who was admitted earlier.
#[derive(Clone, Debug)]
pub(crate) struct Decodes {
    decodes: Vec<Decode>,
    /// Steps that there have been.
    steps: u64,
    /// The least `end` and the least `full`.
    first_end: u64,
    first_full: u64,
    /// Σ of positions that the next step's decodes attend to.
    context: u64,
    /// Those with an adapter, and the sum of their ranks.
    lora: (u64, u64),
    /// Whether one was cancelled during the step in flight.
    pub(crate) cancelled: bool,
}

impl Decodes {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            decodes: Vec::with_capacity(most),
            steps: 0,
            first_end: u64::MAX,
            first_full: u64::MAX,
            context: 0,
            lora: (0, 0),
            cancelled: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.decodes.len()
    }

    pub(crate) fn at(&self, i: usize) -> Decode {
        self.decodes[i]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Decode> + '_ {
        self.decodes.iter()
    }

    /// A request that runs at a place has its prompt in the cache, its first token, and more to come.
    pub(crate) fn begin(&mut self, index: u32, place: PlaceId, request: &mut Request, rank: u32) {
        request.phase = Phase::Decoding { place, cancelled: false };
        let since = self.steps;
        let end = since + u64::from(request.max_tokens - request.generated);
        let full = since + u64::from(request.capacity - request.computed);
        self.decodes.push(Decode { index, place, slot: request.slot, since, end, full });
        self.first_end = self.first_end.min(end);
        self.first_full = self.first_full.min(full);
        self.context += u64::from(request.computed) + 1;
        if request.slot.get().is_some() {
            self.lora = (self.lora.0 + 1, self.lora.1 + u64::from(rank));
        }
    }

    /// The `i`-th leaves; its request is told where it stands.
    pub(crate) fn leave(&mut self, i: usize, request: &mut Request, rank: u32) {
        let decode = self.decodes.remove(i);
        let steps = self.steps_of(&decode);
        request.computed += steps;
        request.generated += steps;
        self.context -= u64::from(request.computed) + 1;
        if request.slot.get().is_some() {
            self.lora = (self.lora.0 - 1, self.lora.1 - u64::from(rank));
        }
        if decode.end == self.first_end {
            self.first_end = self.decodes.iter().map(|d| d.end).min().unwrap_or(u64::MAX);
        }
        if decode.full == self.first_full {
            self.find_full();
        }
    }

    /// Steps that one has been through: tokens computed and sampled since it began.
    pub(crate) fn steps_of(&self, decode: &Decode) -> u32 {
        (self.steps - decode.since) as u32
    }

    /// So many steps have ended.
    pub(crate) fn pass(&mut self, steps: u64) {
        self.steps += steps;
        self.context += steps * self.decodes.len() as u64;
    }

    /// Whether anybody has its last token.
    pub(crate) fn any_ended(&self) -> bool {
        self.first_end <= self.steps
    }

    /// Whether the `i`-th has its last token.
    pub(crate) fn has_ended(&self, i: usize) -> bool {
        self.decodes[i].end <= self.steps
    }

    /// Whether anybody needs a block for its next token.
    pub(crate) fn any_full(&self) -> bool {
        self.first_full <= self.steps
    }

    /// Steps until somebody has its last token, the one in flight included.
    pub(crate) fn until_end(&self) -> u64 {
        self.first_end - self.steps
    }

    /// Plans until somebody needs a block: the next one is 1, the present one 0.
    pub(crate) fn until_full(&self) -> u64 {
        self.first_full - self.steps
    }

    /// [`Self::until_full`] of the `i`-th.
    pub(crate) fn until_full_of(&self, i: usize) -> u64 {
        self.decodes[i].full - self.steps
    }

    /// The `i`-th has got a block of `size` tokens. [`Self::find_full`] once all are served.
    pub(crate) fn grow(&mut self, i: usize, size: usize) {
        self.decodes[i].full += size as u64;
    }

    /// Finds who needs a block next.
    pub(crate) fn find_full(&mut self) {
        self.first_full = self.decodes.iter().map(|d| d.full).min().unwrap_or(u64::MAX);
    }

    /// What an outline says of them.
    pub(crate) fn outline(&self, outline: &mut Outline) {
        outline.decodes = self.decodes.len() as u64;
        outline.decode_context = self.context;
        (outline.lora_decodes, outline.lora_decode_ranks) = self.lora;
    }

    /// Everything from scratch. `of` tells of a decode the tokens in its cache, its adapter's rank, and after how
    /// many steps from its begin it ends and needs a block.
    pub(crate) fn audit(&self, of: impl Fn(&Decode) -> (u64, Option<u32>, u64, u64)) -> Result<(), String> {
        let mut fresh = Self::new(0);
        for decode in &self.decodes {
            let (computed, rank, end, full) = of(decode);
            let expected = (decode.since + end, decode.since + full);
            if expected != (decode.end, decode.full) {
                return Err(format!("{decode:?} should have end and full {expected:?}"));
            }
            fresh.first_end = fresh.first_end.min(decode.end);
            fresh.first_full = fresh.first_full.min(decode.full);
            fresh.context += computed + 1;
            fresh.lora.0 += u64::from(rank.is_some());
            fresh.lora.1 += u64::from(rank.unwrap_or(0));
        }
        let sums = |d: &Self| (d.first_end, d.first_full, d.context, d.lora);
        if sums(self) != sums(&fresh) {
            return Err(format!("the decodes sum up to {:?}, not {:?}", sums(self), sums(&fresh)));
        }
        Ok(())
    }
}
