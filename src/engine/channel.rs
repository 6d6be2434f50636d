//! A one-to-one queue whose receiver may block or be polled: the engine has no async runtime, and
//! serves callers with and without one.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

struct State<T> {
    queue: VecDeque<T>,
    waker: Option<Waker>,
    /// No more will come, or nobody will take it.
    closed: bool,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    some: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let waker = {
            let mut state = self.lock();
            state.closed = true;
            state.waker.take()
        };
        self.some.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The sending end; dropping it ends the stream.
pub(super) struct Sender<T>(Arc<Shared<T>>);

/// The receiving end.
pub(super) struct Receiver<T>(Arc<Shared<T>>);

/// A new queue.
pub(super) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State { queue: VecDeque::new(), waker: None, closed: false }),
        some: Condvar::new(),
    });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    /// Adds one; dropped if the receiver has gone.
    pub(super) fn send(&self, value: T) {
        let waker = {
            let mut state = self.0.lock();
            if state.closed {
                return;
            }
            state.queue.push_back(value);
            state.waker.take()
        };
        self.0.some.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl<T> Receiver<T> {
    /// The next value, waiting for it; none at the end.
    pub(super) fn recv(&self) -> Option<T> {
        let mut state = self.0.lock();
        loop {
            if let Some(value) = state.queue.pop_front() {
                return Some(value);
            }
            if state.closed {
                return None;
            }
            state = self.0.some.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next value, or a wake-up when there is one.
    pub(super) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.lock();
        if let Some(value) = state.queue.pop_front() {
            return Poll::Ready(Some(value));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_in_order_and_the_end_after_the_last() {
        let (tx, rx) = channel();
        let thread = std::thread::spawn(move || {
            for i in 0..100 {
                tx.send(i);
            }
        });
        let mut got = Vec::new();
        while let Some(i) = rx.recv() {
            got.push(i);
        }
        thread.join().unwrap();
        assert_eq!(got, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_waiting_task_is_woken() {
        struct Flag(std::sync::atomic::AtomicBool);
        impl std::task::Wake for Flag {
            fn wake(self: Arc<Self>) {
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let flag = Arc::new(Flag(false.into()));
        let waker = Waker::from(flag.clone());
        let mut cx = Context::from_waker(&waker);
        let (tx, rx) = channel();
        assert!(rx.poll_recv(&mut cx).is_pending());
        tx.send(1);
        assert!(flag.0.load(std::sync::atomic::Ordering::SeqCst));
        assert_eq!(rx.poll_recv(&mut cx), Poll::Ready(Some(1)));
        drop(tx);
        assert_eq!(rx.poll_recv(&mut cx), Poll::Ready(None));
    }
}
