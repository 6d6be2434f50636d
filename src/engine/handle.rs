//! A submitted request's stream of output, for callers with and without an async runtime.

use std::sync::Arc;
use std::task::{Context, Poll};

use lora_sched::{Nanos, RequestId};

use super::channel::Receiver;
use super::facade::Shared;
use super::output::StreamItem;
use super::request::{Delta, Finish, Generated, SubmitError};

/// A submitted request's stream of output. Dropping it cancels the request.
pub struct GenerateHandle {
    pub(super) id: RequestId,
    pub(super) received: Nanos,
    pub(super) receiver: Receiver<StreamItem>,
    pub(super) shared: Arc<Shared>,
    pub(super) admitted: bool,
    pub(super) done: bool,
}

impl std::fmt::Debug for GenerateHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GenerateHandle").field("id", &self.id).finish_non_exhaustive()
    }
}

impl GenerateHandle {
    /// The request's number, as in the decision log.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// When it was received, on the engine's clock.
    pub fn received(&self) -> Nanos {
        self.received
    }

    /// Waits until the scheduler has taken the request, or not.
    ///
    /// # Errors
    /// If the scheduler did not take it.
    pub async fn admitted(&mut self) -> Result<(), SubmitError> {
        if self.admitted {
            return Ok(());
        }
        let item = std::future::poll_fn(|cx| self.receiver.poll_recv(cx)).await;
        self.take_admission(item)
    }

    fn take_admission(&mut self, item: Option<StreamItem>) -> Result<(), SubmitError> {
        match item {
            Some(StreamItem::Refused(error)) => {
                self.done = true;
                Err(SubmitError::Refused(error))
            }
            Some(StreamItem::Accepted) => {
                self.admitted = true;
                Ok(())
            }
            // The stream begins with one of the two unless the engine stopped.
            Some(StreamItem::Delta(_)) | None => {
                self.done = true;
                Err(SubmitError::Stopped(self.shared.why_stopped()))
            }
        }
    }

    /// The next piece of output; none after the last. Call it when [`Self::admitted`] has said yes.
    pub async fn next(&mut self) -> Option<Delta> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Self::next`], for streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Delta>> {
        loop {
            if self.done {
                return Poll::Ready(None);
            }
            match self.receiver.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(StreamItem::Accepted)) => self.admitted = true,
                Poll::Ready(Some(StreamItem::Delta(delta))) => return Poll::Ready(Some(self.seen(delta))),
                Poll::Ready(Some(StreamItem::Refused(_)) | None) => self.done = true,
            }
        }
    }

    fn seen(&mut self, delta: Delta) -> Delta {
        self.done |= delta.finish.is_some();
        delta
    }

    /// Waits for the whole output, blocking the thread.
    ///
    /// # Errors
    /// If the scheduler did not take the request or the engine stopped before it began.
    pub fn wait(mut self) -> Result<Generated, SubmitError> {
        if !self.admitted {
            let item = self.receiver.recv();
            self.take_admission(item)?;
        }
        let mut out = Generated {
            text: String::new(),
            tokens: Vec::new(),
            handed: Vec::new(),
            finish: Finish::Abort,
            failure: None,
            first: None,
            received: self.received,
            ended: 0,
        };
        while let Some(StreamItem::Delta(delta)) = self.receiver.recv() {
            out.text.push_str(&delta.text);
            out.tokens.extend(delta.token);
            out.handed.extend(delta.token.map(|_| delta.handed));
            out.first = out.first.or(delta.first);
            out.failure = out.failure.or(delta.failure);
            if let Some(finish) = delta.finish {
                out.finish = finish;
                self.done = true;
                break;
            }
        }
        out.ended = self.shared.clock.now();
        Ok(out)
    }
}

impl Drop for GenerateHandle {
    fn drop(&mut self) {
        if !self.done {
            tracing::debug!("request {}: cancelled, since nobody waits for its output", self.id);
            self.shared.mailbox.cancel(self.id);
        }
    }
}
