//! Requests that are timed, one or several at once.

use super::{BlackBoxError, BlackBoxOptions};
use crate::loadgen::{LoadOptions, prepare_for, run_load};
use crate::report::record::Status;
use crate::report::stats;
use crate::workload::trace::{SCHEMA, Trace, TraceHeader, TraceRequest};

/// One request to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) adapter: u32,
    /// Prompt tokens.
    pub(super) prompt: u32,
    /// Output tokens.
    pub(super) output: u32,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reply {
    /// The server's count, where it told.
    pub(super) prompt_tokens: u32,
    pub(super) output_tokens: u32,
    /// From sending to the first text, by the client's clock.
    pub(super) ttft_s: f64,
    /// When each message with text came.
    pub(super) token_times: Vec<f64>,
}

/// Makes requests; no two have the same prompt, so that no cache of prefixes can answer.
pub(super) struct Asker<'a> {
    options: &'a BlackBoxOptions,
    next_id: u64,
}

impl<'a> Asker<'a> {
    pub(super) fn new(options: &'a BlackBoxOptions) -> Self {
        Self { options, next_id: 0 }
    }

    pub(super) fn options(&self) -> &'a BlackBoxOptions {
        self.options
    }

    /// Every adapter of the rotation once, and every shape once: first uses compile, load and allocate.
    pub(super) async fn warm_up(&mut self) -> Result<(), BlackBoxError> {
        let options = self.options;
        for adapter in 0..options.gpu_loras {
            self.one("the warm-up", Ask { adapter, prompt: 16, output: 2 }).await?;
        }
        self.one("the warm-up", Ask { adapter: 0, prompt: options.longest, output: 2 }).await?;
        let all: Vec<Ask> = (0..options.max_num_seqs)
            .map(|n| Ask { adapter: n % options.gpu_loras, prompt: 16, output: 4 })
            .collect();
        self.together("the warm-up", &all).await.map(drop)
    }

    /// One request, alone.
    pub(super) async fn one(&mut self, what: &str, ask: Ask) -> Result<Reply, BlackBoxError> {
        let mut replies = self.together(what, &[ask]).await?;
        replies.pop().ok_or_else(|| BlackBoxError::Request {
            what: what.to_owned(),
            why: "nothing came back".to_owned(),
        })
    }

    /// All of them sent at once; ends with the last.
    pub(super) async fn together(&mut self, what: &str, asks: &[Ask]) -> Result<Vec<Reply>, BlackBoxError> {
        let options = self.options;
        let requests = asks.iter().map(|ask| {
            self.next_id += 1;
            TraceRequest {
                id: self.next_id,
                arrival_s: 0.0,
                prompt_tokens: ask.prompt,
                output_tokens: ask.output,
                adapter: Some(ask.adapter),
                rank: Some(options.rank),
                prompt: None,
            }
        });
        let trace = Trace {
            header: TraceHeader {
                schema: SCHEMA,
                source: "black-box calibration".to_owned(),
                seed: options.seed,
                popularity: "uniform".to_owned(),
            },
            requests: requests.collect(),
        };
        let prepared = prepare_for(&trace, &options.tokenizer, &options.dialect)?;
        let load = LoadOptions { timeout: options.timeout, ..LoadOptions::default() };
        let outcome = run_load(&options.endpoint, &prepared, &load, |_| {}).await;
        let times = outcome.token_times.into_iter();
        outcome
            .records
            .into_iter()
            .zip(times)
            .map(|(record, token_times)| {
                let failed = |why: Option<String>| BlackBoxError::Request {
                    what: what.to_owned(),
                    why: why.unwrap_or_else(|| "no reason given".to_owned()),
                };
                let first_s = match record.status {
                    Status::Ok => record.first_s.ok_or_else(|| failed(None))?,
                    _ => return Err(failed(record.error)),
                };
                Ok(Reply {
                    prompt_tokens: record.prompt_tokens,
                    output_tokens: record.output_tokens,
                    ttft_s: first_s - record.sent_s,
                    token_times,
                })
            })
            .collect()
    }
}

/// Fewest gaps between messages to time a step by.
const FEWEST: usize = 4;

/// Seconds from a token to the next while all of `replies` were decoding, the median over them, and the
/// mean positions that they attended to in the middle of that time. None if it was too short to tell.
pub(super) fn decode_step_s(replies: &[Reply]) -> Option<(f64, f64)> {
    let from =
        replies.iter().filter_map(|r| r.token_times.first().copied()).fold(f64::NEG_INFINITY, f64::max);
    let to = replies.iter().filter_map(|r| r.token_times.last().copied()).fold(f64::INFINITY, f64::min);
    let (mut steps, mut contexts) = (Vec::new(), Vec::new());
    for reply in replies {
        // A server may put several tokens into one message.
        let tokens_each = f64::from(reply.output_tokens.max(1)) / reply.token_times.len().max(1) as f64;
        let within = |t: &&f64| (from..=to).contains(*t);
        let times: Vec<f64> = reply.token_times.iter().filter(within).copied().collect();
        if times.len() <= FEWEST {
            return None;
        }
        let gaps = (times.len() - 1) as f64 * tokens_each;
        steps.push((times[times.len() - 1] - times[0]) / gaps);
        let before = reply.token_times.iter().position(|t| *t >= from).unwrap_or(0) as f64 * tokens_each;
        contexts.push(f64::from(reply.prompt_tokens) + before + gaps / 2.0);
    }
    Some((stats::median(&stats::sorted(&steps))?, stats::mean(&contexts)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(first: f64, step: f64, n: usize) -> Reply {
        Reply {
            prompt_tokens: 100,
            output_tokens: n as u32,
            ttft_s: first,
            token_times: (0..n).map(|i| first + step * i as f64).collect(),
        }
    }

    #[test]
    fn steps_are_timed_while_all_decode() {
        // The first decodes alone at 10 ms until the second comes at 0.1 s; together at 20 ms.
        let mut first = reply(0.0, 0.01, 10);
        first.token_times.extend((0..20).map(|i| 0.1 + 0.02 * f64::from(i)));
        first.output_tokens = 30;
        let second = reply(0.1, 0.02, 20);
        let (step, context) = decode_step_s(&[first, second]).unwrap();
        assert!((step - 0.02).abs() < 1e-9, "{step}");
        assert!((context - (100.0 + 5.0 + 9.5)).abs() < 0.6, "{context}");
    }

    #[test]
    fn several_tokens_in_a_message_are_several_steps() {
        let mut pairs = reply(0.0, 0.04, 10);
        pairs.output_tokens = 20;
        assert!((decode_step_s(&[pairs]).unwrap().0 - 0.02).abs() < 1e-9);
        assert_eq!(decode_step_s(&[reply(0.0, 0.01, 4)]), None);
        assert_eq!(decode_step_s(&[reply(0.0, 0.01, 9), reply(1.0, 0.01, 9)]), None);
    }
}
