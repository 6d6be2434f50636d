//! The end of a step: what it has brought, who begins to decode and who is at an end.

use crate::event::{Ended, EventError, Notice, Outbox};
use crate::requests::{Phase, Request};
use crate::scheduler::Scheduler;
use crate::types::{Nanos, PlaceId, SlotId};

impl Scheduler {
    pub(crate) fn step_done(
        &mut self,
        stopped: &[u32],
        stalled: &[(SlotId, Nanos)],
        out: &mut Outbox,
    ) -> Result<(), EventError> {
        if !self.step.active {
            return Err(EventError::NoStep);
        }
        let decodes = self.decodes.len();
        if let Some(&bad) = stopped.iter().find(|&&i| i as usize >= decodes + self.step.chunks.len()) {
            return Err(EventError::NoSuchSequence(bad));
        }
        self.step.active = false;
        self.slots.step_done(|adapter| out.notices.push(Notice::AdapterGone(adapter)));
        self.decodes.pass(1);
        if self.decodes.any_ended() || self.decodes.cancelled || !stopped.is_empty() {
            self.end_decodes(stopped, out);
        }
        if !self.step.chunks.is_empty() {
            self.chunks_done(decodes, stopped, stalled, out);
        }
        self.step.loading.clear();
        Ok(())
    }

    /// Ends the decodes whose last token the step has brought.
    fn end_decodes(&mut self, stopped: &[u32], out: &mut Outbox) {
        // Sequences are numbered as they were in the step.
        let (mut number, mut i) = (0, 0);
        while i < self.decodes.len() {
            let index = self.decodes.at(i).index;
            let cancelled = self.decodes.cancelled
                && matches!(self.requests[index].phase, Phase::Decoding { cancelled: true, .. });
            let why = if cancelled {
                Some(Ended::Cancelled)
            } else if stopped.contains(&number) {
                Some(Ended::Stop)
            } else {
                self.decodes.has_ended(i).then_some(Ended::Length)
            };
            match why {
                Some(why) => self.end(index, why, out),
                None => i += 1,
            }
            number += 1;
        }
        self.decodes.cancelled = false;
    }

    /// The step has computed its parts of prompts, which stood behind `decodes` others in it.
    fn chunks_done(
        &mut self,
        decodes: usize,
        stopped: &[u32],
        stalled: &[(SlotId, Nanos)],
        out: &mut Outbox,
    ) {
        let now = self.now();
        let mut chunks = std::mem::take(&mut self.step.chunks);
        for (i, chunk) in chunks.iter().enumerate() {
            let request = &mut self.requests[chunk.index];
            request.computed += chunk.len;
            if request.before_first_token() {
                let step = &self.step;
                let took = now.saturating_sub(step.formed);
                let waited = request.slot.get().map_or(0, |slot| {
                    if step.waits && step.loading.contains(&slot) {
                        step.swaps_done.saturating_sub(step.formed)
                    } else {
                        stalled.iter().find(|s| s.0 == slot).map_or(0, |s| s.1)
                    }
                });
                let swap = waited.min(took);
                request.parts.swap += swap;
                request.parts.prefill += took - swap;
                request.since = now;
            }
            let Phase::Prefilling { place, in_step, cancelled } = &mut request.phase else { continue };
            *in_step = false;
            let (place, cancelled) = (*place, *cancelled);
            if chunk.samples {
                request.generated += 1;
                if request.generated == 1 && !cancelled {
                    out.notices.push(Notice::FirstToken { id: request.id, parts: request.parts });
                }
            }
            let why = if cancelled {
                Some(Ended::Cancelled)
            } else if !chunk.samples {
                None
            } else if stopped.contains(&((decodes + i) as u32)) {
                Some(Ended::Stop)
            } else {
                (request.generated >= request.max_tokens).then_some(Ended::Length)
            };
            match why {
                Some(why) => self.end(chunk.index, why, out),
                None if chunk.samples => self.begin_decoding(chunk.index, place),
                None => {}
            }
        }
        chunks.clear();
        self.step.chunks = chunks;
    }

    fn begin_decoding(&mut self, index: u32, place: PlaceId) {
        let request = &mut self.requests[index];
        let rank = self.queue.group(request.group).spec.rank;
        if let Some(slot) = request.slot.get() {
            self.slots.begin_decoding(slot, rank);
        }
        self.decodes.begin(index, place, request, rank);
    }

    /// Ends a running request and gives back what it holds.
    pub(crate) fn end(&mut self, index: u32, why: Ended, out: &mut Outbox) {
        let place = self.stop_running(index);
        let Request { id, group, .. } = self.requests[index];
        self.requests.remove(index);
        self.queue.group_mut(group).live -= 1;
        self.unpin(group);
        out.notices.push(Notice::Ended { id, place, why });
        self.retire_if_drained(group, out);
    }

    /// Takes a running request's place and blocks.
    pub(crate) fn stop_running(&mut self, index: u32) -> Option<PlaceId> {
        let place = self.requests[index].phase.place()?;
        self.kv.release(place);
        self.places.push(place);
        if let Some(at) = self.running.iter().position(|&r| r == index) {
            self.running.remove(at);
            if at < self.decodes.len() {
                let request = &mut self.requests[index];
                let rank = self.queue.group(request.group).spec.rank;
                if let Some(slot) = request.slot.get() {
                    self.slots.end_decoding(slot, rank);
                }
                self.decodes.leave(at, request, rank);
            }
        }
        Some(place)
    }
}
