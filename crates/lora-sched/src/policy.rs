//! Who is admitted next: one policy a type.
//!
//! A policy sees only the oldest waiting request of each kind, so admission costs O(log adapters)
//! whatever the queue's length.

use crate::config::Policy;
use crate::types::RequestId;

/// The oldest waiting requests, by what they lack.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueView {
    /// The oldest that lacks neither slot nor swap; base-model requests included.
    pub ready: Option<RequestId>,
    /// The oldest of the base model, which needs no slot.
    pub base: Option<RequestId>,
    /// The oldest whose adapter has no slot.
    pub needs_slot: Option<NeedsSlot>,
    /// The oldest whose adapter is still being copied, or has to come from disk first.
    pub loading: Option<RequestId>,
}

/// A request whose adapter has no slot.
#[derive(Clone, Copy, Debug)]
pub struct NeedsSlot {
    /// The request.
    pub id: RequestId,
    /// Whether none can be had at the moment.
    pub blocked: bool,
    /// Whether it has waited longer than `max_skip_age`.
    pub aged: bool,
}

/// A policy's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Admit [`QueueView::ready`].
    Ready,
    /// Admit [`QueueView::base`].
    Base,
    /// Give [`QueueView::needs_slot`] a slot.
    Load,
    /// Admit nobody further.
    Stop,
}

/// An admission policy.
pub trait AdmissionPolicy {
    /// Who is next.
    fn pick(&self, queue: &QueueView) -> Pick;
}

/// First come, first served: nobody passes the head of the queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fcfs;

impl AdmissionPolicy for Fcfs {
    fn pick(&self, queue: &QueueView) -> Pick {
        let first =
            |id: RequestId, others: [Option<RequestId>; 2]| others.into_iter().flatten().all(|o| id < o);
        let needs = queue.needs_slot.map(|n| n.id);
        match (queue.ready, queue.needs_slot) {
            (Some(ready), _) if first(ready, [needs, queue.loading]) => Pick::Ready,
            (_, Some(n)) if !n.blocked && first(n.id, [queue.ready, queue.loading]) => Pick::Load,
            _ => Pick::Stop,
        }
    }
}

/// Who lacks only a slot is passed, until the age bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct Skip;

impl AdmissionPolicy for Skip {
    fn pick(&self, queue: &QueueView) -> Pick {
        match (queue.ready, queue.needs_slot) {
            (None, None) => Pick::Stop,
            (Some(_), None) => Pick::Ready,
            (Some(ready), Some(needs)) if ready < needs.id => Pick::Ready,
            (_, Some(needs)) if !needs.blocked => Pick::Load,
            (_, Some(needs)) if needs.aged => past_the_aged(queue),
            (Some(_), Some(_)) => Pick::Ready,
            (None, Some(_)) => Pick::Stop,
        }
    }
}

/// Requests of resident adapters first, until the age bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct Affinity;

impl AdmissionPolicy for Affinity {
    fn pick(&self, queue: &QueueView) -> Pick {
        match (queue.ready, queue.needs_slot) {
            (Some(ready), Some(needs)) if needs.aged && needs.id < ready => {
                if needs.blocked {
                    past_the_aged(queue)
                } else {
                    Pick::Load
                }
            }
            (Some(_), _) => Pick::Ready,
            (None, Some(needs)) if !needs.blocked => Pick::Load,
            _ => Pick::Stop,
        }
    }
}

/// Only what needs no slot goes past a request that has waited too long for one.
fn past_the_aged(queue: &QueueView) -> Pick {
    if queue.base.is_some() { Pick::Base } else { Pick::Stop }
}

impl AdmissionPolicy for Policy {
    fn pick(&self, queue: &QueueView) -> Pick {
        match self {
            Policy::Skip => Skip.pick(queue),
            Policy::Fcfs => Fcfs.pick(queue),
            Policy::Affinity => Affinity.pick(queue),
        }
    }
}
