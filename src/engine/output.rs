//! The output side: tokens to text, stop strings, and each request's stream. It has its own thread, so
//! that the step loop does nothing that the next step could wait for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use lora_sched::{Ended, EventError, Nanos, Parts, RequestId};

use super::channel::Sender;
use super::clock::Clock;
use super::executor::{TokenId, TokenLogprobs};
use super::request::{Delta, Finish, FirstToken};
use super::step_loop::Mailbox;
use crate::workload::tokenizer::DecodeStream;

/// What a request's stream carries.
pub(super) enum StreamItem {
    /// It is in the queue.
    Accepted,
    /// The scheduler did not take it.
    Refused(EventError),
    /// Output.
    Delta(Delta),
}

/// Requests that are not at their end, counted wherever they are.
#[derive(Debug)]
pub(super) struct OpenGuard(Arc<AtomicU64>);

impl OpenGuard {
    /// Counts one more.
    pub(super) fn new(open: &Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        Self(open.clone())
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request as the output side knows it.
pub(super) struct OutState {
    pub(super) sender: Sender<StreamItem>,
    pub(super) decode: DecodeStream,
    pub(super) stop: Arc<[String]>,
    pub(super) min_tokens: u32,
    generated: u32,
    /// Text that may be the beginning of a stop string.
    held: String,
    pending: Delta,
    touched: bool,
    /// A stop string is complete; what comes after it is nobody's.
    stop_found: bool,
    open: Option<OpenGuard>,
}

impl OutState {
    /// A request that has no output yet. Empty stop strings are no stop strings.
    pub(super) fn new(
        sender: Sender<StreamItem>,
        decode: DecodeStream,
        mut stop: Arc<[String]>,
        min_tokens: u32,
        open: OpenGuard,
    ) -> Self {
        if stop.iter().any(String::is_empty) {
            stop = stop.iter().filter(|s| !s.is_empty()).cloned().collect();
        }
        Self {
            sender,
            decode,
            stop,
            min_tokens,
            generated: 0,
            held: String::new(),
            pending: Delta::default(),
            touched: false,
            stop_found: false,
            open: Some(open),
        }
    }

    /// Takes a token's text; `true` if it completes a stop string.
    fn token(&mut self, token: TokenId, silent: bool) -> bool {
        self.generated += 1;
        self.pending.token = Some(token);
        if silent {
            return false;
        }
        let Some(text) = self.decode.push(token) else { return false };
        if self.stop.is_empty() {
            self.pending.text.push_str(&text);
            return false;
        }
        self.held.push_str(&text);
        if self.generated < self.min_tokens {
            self.release(self.held.len());
            return false;
        }
        let found = self.stop.iter().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = found {
            self.release(at);
            self.held.clear();
            return true;
        }
        self.release(certain(&self.held, &self.stop));
        false
    }

    fn release(&mut self, len: usize) {
        self.pending.text.extend(self.held.drain(..len));
    }

    /// Sends what has gathered.
    fn flush(&mut self, clock: &Clock) {
        self.touched = false;
        let mut delta = std::mem::take(&mut self.pending);
        delta.handed = clock.now();
        if let Some(first) = &mut delta.first {
            first.handed = delta.handed;
        }
        if delta.finish.is_some() {
            // Whoever sees the last piece must not find the request still counted.
            self.open = None;
        }
        self.sender.send(StreamItem::Delta(delta));
    }
}

/// Bytes of `text` that cannot be part of a stop string: up to the first place from which the rest is the
/// beginning of one.
fn certain(text: &str, stops: &[String]) -> usize {
    let longest = stops.iter().map(String::len).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    text.char_indices()
        .map(|(i, _)| i)
        .filter(|&i| i >= from)
        .find(|&i| stops.iter().any(|s| s.starts_with(&text[i..])))
        .unwrap_or(text.len())
}

/// What the step loop tells the output side, in order.
pub(super) enum OutItem {
    /// A request has been taken.
    Open(RequestId, Box<OutState>),
    /// A request has not been taken.
    Refuse(Box<OutState>, EventError),
    /// A token; silent ones (stop tokens) add no text.
    Token { id: RequestId, token: TokenId, silent: bool, logprobs: Option<Box<TokenLogprobs>> },
    /// The first token's account.
    First { id: RequestId, parts: Parts, at: Nanos },
    /// A request has ended.
    Ended { id: RequestId, why: Ended },
    /// A request's adapter could not be had.
    Failed { id: RequestId, why: String },
    /// The engine stops: every request ends here.
    AbortAll,
}

#[derive(Default)]
struct State {
    items: Vec<OutItem>,
    closed: bool,
}

/// The way from the step loop to the output thread: one lock and at most one wake-up a step.
#[derive(Default)]
pub(super) struct OutQueue {
    state: Mutex<State>,
    some: Condvar,
}

impl OutQueue {
    /// Moves `items` over; they keep their order, `items` its memory.
    pub(super) fn push(&self, items: &mut Vec<OutItem>) {
        if !items.is_empty() {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).items.append(items);
            self.some.notify_one();
        }
    }

    /// The thread ends after what is there.
    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.some.notify_one();
    }

    fn take(&self, into: &mut Vec<OutItem>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.items.is_empty() && !state.closed {
            state = self.some.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.items, into);
        !into.is_empty()
    }
}

/// The output thread's body.
pub(super) fn run(queue: &OutQueue, mailbox: &Mailbox, clock: Clock) {
    let mut side = OutputSide { open: HashMap::new(), touched: Vec::new(), mailbox, clock };
    let mut items = Vec::new();
    while queue.take(&mut items) {
        for item in items.drain(..) {
            side.take(item);
        }
        side.flush();
    }
    side.abort_all();
}

struct OutputSide<'a> {
    open: HashMap<RequestId, Box<OutState>>,
    /// Requests with something to send.
    touched: Vec<RequestId>,
    mailbox: &'a Mailbox,
    clock: Clock,
}

impl OutputSide<'_> {
    fn take(&mut self, item: OutItem) {
        match item {
            OutItem::Open(id, state) => {
                state.sender.send(StreamItem::Accepted);
                self.open.insert(id, state);
            }
            OutItem::Refuse(mut state, error) => {
                // Whoever sees the refusal must not find the request still counted.
                state.open = None;
                state.sender.send(StreamItem::Refused(error));
            }
            OutItem::Token { id, token, silent, logprobs } => {
                let Some(state) = self.open.get_mut(&id) else { return };
                if state.stop_found {
                    return;
                }
                if state.pending.token.is_some() {
                    // Two steps came in one go: one piece holds one token.
                    state.flush(&self.clock);
                }
                if !std::mem::replace(&mut state.touched, true) {
                    self.touched.push(id);
                }
                state.pending.logprobs = logprobs;
                if state.token(token, silent) {
                    state.stop_found = true;
                    self.mailbox.stop_found(id);
                }
            }
            OutItem::First { id, parts, at } => {
                if let Some(state) = self.open.get_mut(&id) {
                    state.pending.first = Some(FirstToken { parts, at, handed: at });
                }
            }
            OutItem::Ended { id, why: Ended::Stop } => self.finish(id, Finish::Stop),
            OutItem::Ended { id, why: Ended::Length } => self.finish(id, Finish::Length),
            // Only one whose caller still listens (its stop string was found) has anything to be told.
            OutItem::Ended { id, why: Ended::Cancelled } => {
                if self.open.get(&id).is_some_and(|s| s.stop_found) {
                    self.finish(id, Finish::Stop);
                }
                self.open.remove(&id);
            }
            OutItem::Ended { id, why: Ended::Failed } => self.finish(id, Finish::Abort),
            OutItem::Failed { id, why } => {
                if let Some(state) = self.open.get_mut(&id) {
                    state.pending.failure = Some(why);
                }
                self.finish(id, Finish::Abort);
            }
            OutItem::AbortAll => self.abort_all(),
        }
    }

    fn finish(&mut self, id: RequestId, why: Finish) {
        if let Some(mut state) = self.open.remove(&id) {
            if !state.stop_found {
                let rest = state.decode.finish();
                state.held.extend(rest);
                state.release(state.held.len());
            }
            state.pending.finish = Some(if state.stop_found { Finish::Stop } else { why });
            state.flush(&self.clock);
        }
    }

    /// Sends what one go has gathered. A step's token and the first token's account come in the same go,
    /// so a stream whose first token holds a stop string ends here, with its account.
    fn flush(&mut self) {
        while let Some(id) = self.touched.pop() {
            match self.open.get_mut(&id) {
                Some(state) if state.stop_found => self.finish(id, Finish::Stop),
                Some(state) if state.touched => state.flush(&self.clock),
                _ => {}
            }
        }
    }

    fn abort_all(&mut self) {
        for (_, mut state) in self.open.drain() {
            state.pending.finish = Some(Finish::Abort);
            state.flush(&self.clock);
        }
    }
}
