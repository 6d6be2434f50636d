//! The step loop's one mailbox: requests, cancels, and the executor's wake-ups.

use std::sync::{Mutex, MutexGuard, PoisonError};

use lora_sched::RequestId;

use super::{Change, Submission};
use crate::engine::fetcher::Fetched;
use crate::engine::watch::Signal;

/// What the loop is told by other threads.
pub(in crate::engine) enum Message {
    /// Requests that the queue takes together or not at all, numbered upwards from the first's.
    Submit(RequestId, Vec<Submission>),
    /// A request is not wanted any more: its client has gone.
    Cancel(RequestId),
    /// A request's stop string was found: it ends as a cancelled one does, but was answered.
    StopFound(RequestId),
    /// A change to the adapters.
    Change(Change),
    /// An adapter has been read from disk, or not.
    Fetched(Fetched),
}

/// Requests put in together, each with its number.
pub(super) fn numbered(
    first: RequestId,
    together: Vec<Submission>,
) -> impl Iterator<Item = (RequestId, Submission)> {
    (first.0..).map(RequestId).zip(together)
}

#[derive(Default)]
struct State {
    messages: Vec<Message>,
    /// The executor has a completion.
    woken: bool,
    /// The loop is to end.
    stop: bool,
    /// The loop has ended, so nothing will be taken any more.
    closed: bool,
    next_id: u64,
}

/// Numbers requests in the order in which the loop will see them, which the scheduler asks for.
#[derive(Default)]
pub(in crate::engine) struct Mailbox {
    state: Mutex<State>,
    some: Signal,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts requests in together and numbers them; the first one's number. Gives them back if the loop has ended.
    pub(in crate::engine) fn submit(&self, together: Vec<Submission>) -> Result<RequestId, Vec<Submission>> {
        let mut state = self.lock();
        if state.closed {
            return Err(together);
        }
        let first = RequestId(state.next_id);
        state.next_id += together.len() as u64;
        state.messages.push(Message::Submit(first, together));
        self.some.tell(state);
        Ok(first)
    }

    /// Tells that a request is not wanted any more.
    pub(in crate::engine) fn cancel(&self, id: RequestId) {
        self.tell(Message::Cancel(id));
    }

    /// Tells that a request has come to its stop string.
    pub(in crate::engine) fn stop_found(&self, id: RequestId) {
        self.tell(Message::StopFound(id));
    }

    /// Puts a change to the adapters in; dropped if the loop has ended.
    pub(in crate::engine) fn change(&self, change: Change) {
        self.tell(Message::Change(change));
    }

    /// Tells that a read has ended.
    pub(in crate::engine) fn fetched(&self, fetched: Fetched) {
        self.tell(Message::Fetched(fetched));
    }

    fn tell(&self, message: Message) {
        let mut state = self.lock();
        if !state.closed {
            state.messages.push(message);
            self.some.tell(state);
        }
    }

    /// Tells that the executor has a completion.
    pub(in crate::engine) fn wake(&self) {
        let mut state = self.lock();
        state.woken = true;
        self.some.tell(state);
    }

    /// Tells the loop to end.
    pub(in crate::engine) fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.some.tell(state);
    }

    /// Waits for something, looking for it or asleep, then takes the messages; `false` when the loop is to end.
    pub(super) fn wait(&self, into: &mut Vec<Message>, looking: bool) -> bool {
        let mut state = self.lock();
        while state.messages.is_empty() && !state.woken && !state.stop {
            state = self.some.wait(&self.state, state, looking);
        }
        state.woken = false;
        into.append(&mut state.messages);
        !state.stop
    }

    /// Takes the messages that are there.
    pub(super) fn take(&self, into: &mut Vec<Message>) {
        into.append(&mut self.lock().messages);
    }

    /// Takes nothing in from now on, and gives what is there.
    pub(in crate::engine) fn close(&self) -> Vec<Message> {
        let mut state = self.lock();
        state.closed = true;
        std::mem::take(&mut state.messages)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn whatever_is_put_in_ends_the_wait_looked_for_or_asleep() {
        for looking in [false, true] {
            let mailbox = Arc::new(Mailbox::default());
            let (seen, turns) = std::sync::mpsc::channel();
            let waiter = thread::spawn({
                let mailbox = mailbox.clone();
                move || {
                    let mut inbox = Vec::new();
                    while mailbox.wait(&mut inbox, looking) {
                        seen.send(inbox.drain(..).count()).unwrap();
                    }
                }
            });
            let turn = || turns.recv_timeout(Duration::from_secs(60)).expect("the wait ends");
            mailbox.wake();
            assert_eq!(turn(), 0, "looking: {looking}");
            mailbox.cancel(RequestId(1));
            mailbox.cancel(RequestId(2));
            let mut messages = turn();
            if messages < 2 {
                messages += turn();
            }
            assert_eq!(messages, 2, "looking: {looking}");
            mailbox.wake();
            assert_eq!(turn(), 0, "looking: {looking}");
            mailbox.stop();
            waiter.join().unwrap();
        }
    }
}
