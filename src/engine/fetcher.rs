//! The disk's thread: reads adapters into host memory, in the order in which they were asked for, and
//! gives back the memory of those whose places they take, before they are read.

use std::sync::Arc;
use std::sync::mpsc;

use lora_sched::{AdapterId, Nanos};

use super::adapters::{HostAdapter, HostPool};
use super::clock::Clock;
use super::step_loop::Mailbox;

/// What the thread is asked for.
pub(super) enum Job {
    /// Read this adapter.
    Fetch(AdapterId),
    /// Give back this one's memory.
    GiveBack(Arc<HostAdapter>),
}

/// A read that has ended.
pub(super) struct Fetched {
    pub(super) adapter: AdapterId,
    /// Why it could not be read, if so.
    pub(super) outcome: Result<(), String>,
    pub(super) started: Nanos,
    pub(super) ended: Nanos,
}

/// The way to the thread, which ends when this is dropped.
pub(super) struct Fetcher(mpsc::Sender<Job>);

impl Fetcher {
    /// The way in, and the thread's life.
    pub(super) fn new(
        pool: Arc<HostPool>,
        mailbox: Arc<Mailbox>,
        clock: Clock,
    ) -> (Self, impl FnOnce() + Send + 'static) {
        let (jobs, inbox) = mpsc::channel();
        let life = move || {
            while let Ok(job) = inbox.recv() {
                match job {
                    Job::GiveBack(memory) => drop(memory),
                    Job::Fetch(adapter) => {
                        let started = clock.now();
                        let outcome = pool.fetch(adapter).map_err(|e| e.to_string());
                        mailbox.fetched(Fetched { adapter, outcome, started, ended: clock.now() });
                    }
                }
            }
        };
        (Self(jobs), life)
    }

    pub(super) fn send(&self, job: Job) {
        // The thread outlives this; were it to die, a fetch that never ends would show it.
        let _ = self.0.send(job);
    }
}
