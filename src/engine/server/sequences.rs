//! The sequences of one request on their way to the client, and what is measured of them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::{SelectAll, Stream, StreamExt};
use lora_sched::{AdapterId, Nanos};

use super::error::ApiError;
use super::state::{InFlight, State};
use crate::engine::clock::Clock;
use crate::engine::executor::{TokenId, TokenLogprobs};
use crate::engine::{Delta, Finish, GenerateHandle, SubmitError};
use crate::report::record::PartsS;

/// One sequence's output, with its number.
struct Numbered {
    choice: usize,
    handle: GenerateHandle,
    ended: bool,
}

impl Stream for Numbered {
    type Item = (usize, Delta);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let delta = match self.handle.poll_next(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(delta)) => delta,
            // The engine has gone without a word.
            Poll::Ready(None) => Delta { finish: Some(Finish::Abort), ..Delta::default() },
        };
        self.ended = delta.finish.is_some();
        Poll::Ready(Some((self.choice, delta)))
    }
}

/// What is known of a sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    tokens: usize,
    first: Option<Nanos>,
    last: Nanos,
    ended: bool,
    prefill_s: f64,
}

/// A piece of one sequence's output.
pub(super) struct Piece {
    /// Which sequence: prompt number times `n` plus the sequence's number among the prompt's.
    pub(super) choice: usize,
    pub(super) text: String,
    /// The token that brought it, and its log-probabilities, where the request asks for them.
    pub(super) logprobs: Option<(TokenId, Box<TokenLogprobs>)>,
    /// Tokens of the sequence so far, this piece's included.
    pub(super) tokens: usize,
    /// Why it is the sequence's last.
    pub(super) finish: Option<Finish>,
    /// With the last piece of a sequence that is not whole: why it is not. No other sequence's follows.
    pub(super) broken: Option<ApiError>,
}

/// Where a request's time went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Receipt to the first token of any sequence, by cause; none before it.
    pub(super) parts: Option<PartsS>,
    /// First token to the last piece, seconds.
    pub(super) decode_s: f64,
    /// Receipt to the last piece, seconds.
    pub(super) total_s: f64,
    /// Output tokens of all sequences.
    pub(super) output_tokens: usize,
    /// Between tokens of a sequence, mean over all, seconds; none where no sequence has two.
    pub(super) mean_inter_token_s: Option<f64>,
}

/// The sequences of one request. Dropping it cancels what is not at its end.
pub(super) struct Sequences {
    running: SelectAll<Numbered>,
    tracks: Vec<Track>,
    /// Sequences whose ends are still to come: none once one of them is broken.
    open: usize,
    /// Of each prompt.
    prompt_tokens: Vec<usize>,
    n: usize,
    received: Nanos,
    /// When the last piece was taken.
    last: Nanos,
    clock: Clock,
    parts: Option<PartsS>,
    first: Option<Nanos>,
    gaps: (Nanos, u64),
    state: Arc<State>,
    adapter: Option<AdapterId>,
    _guard: InFlight,
}

impl Sequences {
    /// `n` sequences of each prompt, by prompt.
    pub(super) fn new(
        state: &Arc<State>,
        guard: InFlight,
        handles: Vec<GenerateHandle>,
        prompt_tokens: Vec<usize>,
        n: usize,
        adapter: Option<AdapterId>,
        (received, clock): (Nanos, Clock),
    ) -> Self {
        let tracks = vec![Track::default(); handles.len()];
        for _ in &tracks {
            state.observed.adapter_enters(adapter);
        }
        let numbered = |(choice, handle)| Numbered { choice, handle, ended: false };
        Self {
            open: handles.len(),
            // Each is woken alone, so that many sequences do not cost the square of their number.
            running: handles.into_iter().enumerate().map(numbered).collect(),
            tracks,
            prompt_tokens,
            n,
            received,
            last: received,
            clock,
            parts: None,
            first: None,
            gaps: (0, 0),
            state: state.clone(),
            adapter,
            _guard: guard,
        }
    }

    /// Waits until the engine has said of each that it takes it. Who goes meanwhile has gone as at any other time.
    pub(super) async fn admitted(&mut self) -> Result<(), SubmitError> {
        for numbered in self.running.iter_mut() {
            if let Err(refusal) = numbered.handle.admitted().await {
                self.open = 0;
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.tracks.len()
    }

    /// A token's text when it stands alone; half a character's is the replacement character.
    pub(super) fn text_of(&self, token: TokenId) -> String {
        self.state.loaded().map(|(engine, _)| engine.tokenizer().decode(&[token])).unwrap_or_default()
    }

    /// Sequences whose ends are still to come.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// Tokens of the prompt of a sequence.
    pub(super) fn prompt_tokens_of(&self, choice: usize) -> usize {
        self.prompt_tokens[choice / self.n.max(1)]
    }

    /// Tokens of all prompts, each counted once.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens.iter().sum()
    }

    /// Receipt to the first token of any sequence, by cause; none before it.
    pub(super) fn parts(&self) -> Option<PartsS> {
        self.parts
    }

    /// Receipt to the last piece taken, and what lay between.
    pub(super) fn timing(&self) -> Timing {
        let s = |ns: Nanos| ns as f64 * 1e-9;
        let (sum, count) = self.gaps;
        Timing {
            parts: self.parts,
            decode_s: s(self.first.map_or(0, |first| self.last.saturating_sub(first))),
            total_s: s(self.last.saturating_sub(self.received)),
            output_tokens: self.tracks.iter().map(|t| t.tokens).sum(),
            mean_inter_token_s: (count > 0).then(|| s(sum) / count as f64),
        }
    }

    /// The next piece of any sequence; none when all have ended.
    pub(super) async fn next(&mut self) -> Option<Piece> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Self::next`], for streams.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        if self.open == 0 {
            return Poll::Ready(None);
        }
        match self.running.poll_next_unpin(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some((choice, delta))) => Poll::Ready(Some(self.take(choice, delta))),
        }
    }

    fn take(&mut self, choice: usize, delta: Delta) -> Piece {
        let now = self.clock.now();
        self.last = now;
        let observed = &self.state.observed;
        let track = &mut self.tracks[choice];
        if delta.token.is_some() {
            track.tokens += 1;
            if track.first.is_some() {
                let gap = now - track.last;
                observed.inter_token.observe(gap as f64 * 1e-9);
                self.gaps = (self.gaps.0 + gap, self.gaps.1 + 1);
            }
            track.last = now;
        }
        if let Some(first) = delta.first {
            let parts: PartsS = first.parts_until(now);
            track.first = Some(now);
            track.prefill_s = parts.prefill;
            observed.first_token(&parts);
            observed.adapter_moves(self.adapter);
            if self.parts.is_none() {
                self.parts = Some(parts);
                self.first = Some(now);
            }
        }
        if let Some(finish) = delta.finish {
            self.open -= 1;
            track.ended = true;
            observed.adapter_leaves(self.adapter, track.first.is_some());
            if finish != Finish::Abort {
                let prompt_tokens = self.prompt_tokens[choice / self.n.max(1)];
                observed.e2e.observe((now - self.received) as f64 * 1e-9);
                observed.decode.observe(track.first.map_or(0.0, |first| (now - first) as f64 * 1e-9));
                observed.prefill.observe(track.prefill_s);
                observed.prompt_tokens.observe(prompt_tokens as f64);
                observed.output_tokens.observe(track.tokens as f64);
            }
        }
        let tokens = track.tokens;
        let broken = (delta.finish == Some(Finish::Abort)).then(|| self.give_up(delta.failure));
        let logprobs = delta.token.zip(delta.logprobs);
        Piece { choice, text: delta.text, logprobs, tokens, finish: delta.finish, broken }
    }

    /// Cancels the others, whose output is worth nothing without this one's; why is `failure`, or that the engine
    /// has stopped. None of them is left for a client to abandon.
    fn give_up(&mut self, failure: Option<String>) -> ApiError {
        self.running.clear();
        self.open = 0;
        match failure {
            Some(why) => ApiError::internal(why),
            None => ApiError::stopped(self.state.loaded().ok().and_then(|(engine, _)| engine.failure())),
        }
    }
}

impl Drop for Sequences {
    fn drop(&mut self) {
        for track in self.tracks.iter().filter(|t| !t.ended) {
            self.state.observed.adapter_leaves(self.adapter, track.first.is_some());
        }
        if self.open > 0 {
            self.state.observed.abandoned(self.open as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use lora_sched::{Config, RequestId, StepPlan, SwapPlan};

    use super::*;
    use crate::engine::channel::channel;
    use crate::engine::emulated::EmulatedExecutor;
    use crate::engine::output::StreamItem;
    use crate::engine::server::body::Limits;
    use crate::engine::{Engine, EngineConfig, GenerateParams, GenerateRequest};
    use crate::workload::tokenizer::Tokenizer;

    /// An engine whose steps take five milliseconds.
    fn engine() -> Engine {
        let costs = (|_: &StepPlan| 5_000_000, |_: &SwapPlan| 0);
        let executor = EmulatedExecutor::new(costs, |_, _| 100, 1).unwrap();
        let config = EngineConfig {
            scheduler: Config { max_model_len: 512, kv_blocks: 128, ..Config::with_adapters(1, 1, 8, 1000) },
            adapters: None,
            vocab_size: 259,
            eos: Vec::new(),
            seed: 1,
            warm_up: false,
            log: None,
        };
        Engine::start(config, Box::new(executor), Tokenizer::byte_level()).unwrap()
    }

    #[tokio::test]
    async fn a_broken_sequence_takes_the_others_along_and_no_client_has_gone() {
        let engine = engine();
        let params = GenerateParams { max_tokens: 400, ..GenerateParams::default() };
        let request = GenerateRequest { prompt: [9; 4].into(), adapter: None, params, received: None };
        let whole = engine.submit(request).unwrap();
        let (sender, receiver) = channel();
        let broken = GenerateHandle {
            id: RequestId(u64::MAX),
            received: 0,
            receiver,
            shared: engine.shared.clone(),
            admitted: false,
            done: false,
        };
        let failure = Some("its adapter cannot be read".to_owned());
        sender.send(StreamItem::Accepted);
        sender.send(StreamItem::Delta(Delta { finish: Some(Finish::Abort), failure, ..Delta::default() }));

        let state = Arc::new(State::new(None, Limits::default()));
        let (guard, at) = (InFlight::new(&state), (0, engine.clock()));
        let mut sequences = Sequences::new(&state, guard, vec![whole, broken], vec![4], 2, None, at);
        sequences.admitted().await.unwrap();
        let error = loop {
            let piece = sequences.next().await.unwrap();
            if let Some(error) = piece.broken {
                break error;
            }
        };
        assert!(error.to_string().contains("adapter"), "{error}");
        assert!(sequences.next().await.is_none(), "nobody waits for what is worth nothing");
        // While the answer that tells of it is still on its way.
        let begun = Instant::now();
        while engine.stats().cancelled == 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "never cancelled: {:?}", engine.stats());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(sequences);
        assert_eq!(state.observed.abandoned_so_far(), 0);
    }
}
