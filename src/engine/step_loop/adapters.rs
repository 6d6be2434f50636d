//! Adapters that come, go, are pinned and are read from disk while the loop runs.
//!
//! Ids are the scheduler's: an adapter is put into the pool and the directory under the id that the
//! scheduler has just given it, by this thread, so nobody can ask for it before it is there.

use std::sync::atomic::Ordering::Relaxed;

use lora_sched::{AdapterId, Event, FetchPlan, Nanos};

use super::{LoopError, StepLoop};
use crate::engine::adapters::KeptAdapter;
use crate::engine::channel::Sender;
use crate::engine::fetcher::{Fetched, Job};
use crate::engine::life::Reply;

/// A change to the adapters, and who is told what came of it.
pub(in crate::engine) enum Change {
    /// A new one.
    Add(Box<KeptAdapter>, Sender<Reply>),
    /// No new requests for it; told when it has gone.
    Remove(AdapterId, Sender<Reply>),
    /// The user's pin.
    Pin(AdapterId, bool, Sender<Reply>),
}

/// A read that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFetch {
    plan: FetchPlan,
    decided: Nanos,
    submitted: Nanos,
}

impl StepLoop {
    pub(super) fn change(&mut self, t: Nanos, change: Change) {
        match change {
            Change::Add(adapter, to) => self.add(t, *adapter, to),
            Change::Remove(id, to) => {
                match self.scheduler.handle(t, Event::RemoveAdapter(id), &mut self.outbox) {
                    Ok(()) => {
                        self.recorder.remove_adapter(t, id);
                        // Told when it has gone, which may be in this very turn.
                        self.gauges.adapters.fetch_sub(1, Relaxed);
                        self.leaving.push((id, to));
                    }
                    Err(error) => self.replies.push((to, Reply { outcome: Err(error), memory: None })),
                }
            }
            Change::Pin(id, pinned, to) => {
                let taken = self.scheduler.handle(t, Event::PinAdapter(id, pinned), &mut self.outbox);
                if taken.is_ok() {
                    self.recorder.pin_adapter(t, id, pinned);
                    self.directory.user_pinned(id, pinned);
                }
                self.replies.push((to, Reply { outcome: taken.map(|()| id), memory: None }));
            }
        }
    }

    fn add(&mut self, t: Nanos, adapter: KeptAdapter, to: Sender<Reply>) {
        let (id, spec) = (self.scheduler.next_adapter(), adapter.spec());
        if let Err(error) = self.scheduler.handle(t, Event::AddAdapter(spec), &mut self.outbox) {
            self.replies.push((to, Reply { outcome: Err(error), memory: adapter.into_memory() }));
            return;
        }
        self.recorder.add_adapter(t, id, spec);
        self.directory.added(id, adapter.name(), adapter.root(), spec, adapter.is_held());
        if let Some(pool) = &self.pool {
            pool.insert(id, adapter);
        }
        self.gauges.adapters.fetch_add(1, Relaxed);
        self.replies.push((to, Reply { outcome: Ok(id), memory: None }));
    }

    /// A removed adapter holds nothing any more.
    pub(super) fn adapter_gone(&mut self, t: Nanos, id: AdapterId) {
        self.recorder.adapter_gone(t, id);
        self.directory.gone(id);
        let memory = self.pool.as_ref().and_then(|pool| pool.remove(id));
        if let Some(at) = self.leaving.iter().position(|l| l.0 == id) {
            let (_, to) = self.leaving.remove(at);
            self.replies.push((to, Reply { outcome: Ok(id), memory }));
        }
    }

    /// Starts the reads that the scheduler has decided on.
    pub(super) fn start_fetches(&mut self, t: Nanos) -> Result<(), LoopError> {
        for plan in self.outbox.fetches.drain(..) {
            let (Some(pool), Some(fetcher)) = (&self.pool, &self.fetcher) else {
                return Err(LoopError::Unexpected(format!(
                    "adapter {} has no disk to come from",
                    plan.adapter
                )));
            };
            if let Some(evicted) = plan.evicted {
                self.directory.in_host(evicted, false);
                if let Some(memory) = pool.evict(evicted) {
                    fetcher.send(Job::GiveBack(memory));
                }
            }
            self.gauges.fetches_open.fetch_add(1, Relaxed);
            self.fetches.push(OpenFetch { plan, decided: t, submitted: self.clock.now() });
            fetcher.send(Job::Fetch(plan.adapter));
        }
        Ok(())
    }

    pub(super) fn fetched(&mut self, t: Nanos, fetched: Fetched) -> Result<(), LoopError> {
        let Fetched { adapter, outcome, started, ended } = fetched;
        let Some(at) = self.fetches.iter().position(|f| f.plan.adapter == adapter) else {
            return Err(LoopError::Unexpected(format!("adapter {adapter} was read")));
        };
        let OpenFetch { plan, decided, submitted } = self.fetches.remove(at);
        self.gauges.fetches_open.fetch_sub(1, Relaxed);
        self.gauges.fetches.fetch_add(1, Relaxed);
        self.gauges.fetch_ns.fetch_add(t.saturating_sub(submitted), Relaxed);
        let failed = match outcome {
            Ok(()) => {
                self.directory.in_host(adapter, true);
                self.gauges.fetch_bytes.fetch_add(plan.bytes, Relaxed);
                false
            }
            Err(why) => {
                tracing::error!("{why}");
                self.directory.failed(adapter, &why);
                self.gauges.fetches_failed.fetch_add(1, Relaxed);
                true
            }
        };
        self.scheduler.handle(t, Event::FetchDone { adapter, failed }, &mut self.outbox)?;
        let (started, ended) = super::between(submitted, started, ended, t);
        self.recorder.fetch_done(t, &plan, failed, [decided, submitted, started, ended]);
        Ok(())
    }

    /// Tells callers what came of their changes: after the turn, so that they find what they were told.
    pub(super) fn reply(&mut self) {
        for (to, reply) in self.replies.drain(..) {
            to.send(reply);
        }
    }
}
