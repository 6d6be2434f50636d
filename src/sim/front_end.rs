//! The way from receipt to the queue: requests put in order of the time at which they reach it.

use std::collections::VecDeque;

use lora_sched::Nanos;

use super::clock::{Input, SimRequest};

/// A short prompt can pass a long one on its way through the front end. Takes requests in order of
/// receipt and gives them in order of queueing, equal times in order of receipt; holds only those
/// that are on the way.
#[derive(Debug)]
pub struct FrontEnd<I> {
    requests: I,
    on_the_way: VecDeque<SimRequest>,
    /// Nothing that is received from now on is queued before this.
    received: Nanos,
    ended: bool,
}

impl<I: Iterator<Item = SimRequest>> FrontEnd<I> {
    /// Of requests in order of `received`.
    pub fn new(requests: I) -> Self {
        Self { requests, on_the_way: VecDeque::new(), received: 0, ended: false }
    }
}

impl<I: Iterator<Item = SimRequest>> Iterator for FrontEnd<I> {
    type Item = Input;

    fn next(&mut self) -> Option<Input> {
        while !self.ended && self.on_the_way.front().is_none_or(|first| first.queued > self.received) {
            match self.requests.next() {
                Some(request) => {
                    self.received = request.received;
                    let later = self.on_the_way.iter().rev().take_while(|r| r.queued > request.queued);
                    match later.count() {
                        0 => self.on_the_way.push_back(request),
                        later => self.on_the_way.insert(self.on_the_way.len() - later, request),
                    }
                }
                None => self.ended = true,
            }
        }
        self.on_the_way.pop_front().map(Input::Arrive)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_order_is_that_of_a_stable_sort(raw in prop::collection::vec((0u64..20, 0u64..30), 0..60)) {
            let mut at = 0;
            let requests: Vec<SimRequest> = raw
                .iter()
                .zip(0..)
                .map(|(&(gap, way), id)| {
                    at += gap;
                    let (received, queued) = (at, at + way);
                    SimRequest { id, received, queued, adapter: None, prompt_tokens: 1, output_tokens: 1 }
                })
                .collect();
            let mut sorted: Vec<Input> = requests.iter().copied().map(Input::Arrive).collect();
            sorted.sort_by_key(Input::at);
            prop_assert_eq!(FrontEnd::new(requests.into_iter()).collect::<Vec<_>>(), sorted);
        }
    }
}
