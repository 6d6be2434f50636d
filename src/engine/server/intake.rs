//! From a request's bytes to sequences in the engine's queue: what `/generate` and the OpenAI endpoints share.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::Request;
use bytes::Bytes;
use lora_sched::{AdapterId, Nanos};
use tower_http::request_id::RequestId;

use super::body;
use super::error::ApiError;
use super::sequences::Sequences;
use super::state::{InFlight, ServerInfo, State};
use crate::engine::{Engine, GenerateParams, GenerateRequest};

/// When a request's head had been read; put there by the listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received(pub(super) Instant);

/// What weighs at least this many bytes is tokenised on a blocking thread: under a tenth of a
/// millisecond of work is not worth the two hand-overs.
const INLINE_BYTES: usize = 1024;
/// What a prompt or a message weighs beside its own bytes: a call, and what a template writes around it.
const PIECE_BYTES: usize = 64;
/// A prompt of as many bytes is tokenised on a blocking thread.
pub const HANDED_OVER_BYTES: usize = INLINE_BYTES - PIECE_BYTES;
/// Sequences that one request may ask for, over all its prompts.
const MAX_SEQUENCES: usize = 1024;

/// A request whose body is here, while the server takes requests.
pub(super) struct Intake {
    state: Arc<State>,
    guard: InFlight,
    received: Instant,
    /// The request's id, as the client gave it or as the server made it.
    pub(super) id: String,
    pub(super) body: Bytes,
}

/// What is to be generated.
pub(super) struct Ask {
    /// Token ids of each prompt, none of them empty.
    pub(super) prompts: Vec<Vec<u32>>,
    /// Sequences of each prompt.
    pub(super) n: usize,
    pub(super) adapter: Option<AdapterId>,
    pub(super) params: GenerateParams,
    pub(super) names: Names,
}

/// What the client calls the things that a request can fail by, for messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) prompt: &'static str,
    pub(super) adapter: &'static str,
}

/// A prompt as it came.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    /// To be tokenised, as the beginning of a text or as it is.
    Text {
        text: String,
        /// Whether the ids that begin a text (BOS) are put in front.
        special: bool,
    },
    Ids(Vec<u32>),
}

impl Intake {
    /// Reads a request whose body is JSON.
    pub(super) async fn read(state: &Arc<State>, request: Request) -> Result<Self, ApiError> {
        let received = request.extensions().get::<Received>().map_or_else(Instant::now, |r| r.0);
        let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
        let id = id.unwrap_or_default().to_owned();
        state.serving()?;
        let body = body::read(request, &state.limits).await?;
        // Counted only now: a client that does not go on sending must not hold up a drain.
        let guard = InFlight::new(state);
        state.serving()?;
        Ok(Self { state: state.clone(), guard, received, id, body })
    }

    /// The engine and what is said about it.
    pub(super) fn engine(&self) -> Result<(&Arc<Engine>, &ServerInfo), ApiError> {
        self.state.loaded()
    }

    /// Refuses more sequences than a request may have: to be asked before its prompts are tokenised.
    pub(super) fn takes(&self, prompts: usize, n: usize, names: Names) -> Result<(), ApiError> {
        let asked = prompts.saturating_mul(n);
        // More than the whole queue holds would be refused for ever.
        let most = MAX_SEQUENCES.min(self.engine()?.0.scheduler_config().max_queue);
        if asked <= most {
            return Ok(());
        }
        let message = format!(
            "{prompts} prompts with n = {n} ask for {asked} sequences and a request may have {most}: \
             send several requests"
        );
        Err(ApiError::bad(if prompts == 1 { "n" } else { names.prompt }, message))
    }

    /// Puts everything that is asked for into the engine's queue, or nothing.
    pub(super) async fn submit(self, ask: Ask) -> Result<Sequences, ApiError> {
        self.takes(ask.prompts.len(), ask.n, ask.names)?;
        let Self { state, guard, received, .. } = self;
        let engine = state.loaded()?.0.clone();
        let clock = engine.clock();
        let received = clock.at(received);
        let names = ask.names;
        let refused = |error| ApiError::refused(error, names, engine.failure());
        // Before there is anything for each of the sequences.
        for prompt in &ask.prompts {
            engine.fits(prompt.len(), ask.params.max_tokens).map_err(refused)?;
        }
        let prompt_tokens = ask.prompts.iter().map(Vec::len).collect();
        let (n, adapter) = (ask.n, ask.adapter);
        let handles = engine.submit_all(ask.requests(received)).map_err(refused)?;
        let mut sequences =
            Sequences::new(&state, guard, handles, prompt_tokens, n, adapter, (received, clock));
        sequences.admitted().await.map_err(refused)?;
        Ok(sequences)
    }
}

impl Ask {
    /// A request to the engine for each sequence, by prompt. They differ in their random streams and share the rest.
    fn requests(self, received: Nanos) -> Vec<GenerateRequest> {
        let Self { prompts, n, adapter, params, .. } = self;
        let mut requests = Vec::with_capacity(prompts.len() * n);
        for prompt in prompts {
            let prompt: Arc<[u32]> = prompt.into();
            for i in 0..n as u64 {
                let mut params = params.clone();
                params.seed = params.seed.map(|seed| seed.wrapping_add(i));
                let prompt = prompt.clone();
                requests.push(GenerateRequest { prompt, adapter, params, received: Some(received) });
            }
        }
        requests
    }
}

/// Ids of each prompt.
pub(super) async fn tokenize(
    prompts: Vec<Prompt>,
    engine: &Arc<Engine>,
    param: &'static str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let engine = engine.clone();
    tokenising(weight(&prompts), move || encode(prompts, &engine, param)).await?
}

/// Ids need no work.
fn weight(prompts: &[Prompt]) -> usize {
    let one = |p: &Prompt| if let Prompt::Text { text, .. } = p { piece_weight(text.len()) } else { 0 };
    prompts.iter().map(one).sum()
}

/// What a piece of so many bytes weighs, for [`tokenising`].
pub(super) fn piece_weight(bytes: usize) -> usize {
    bytes + PIECE_BYTES
}

/// Does `work` of a `weight` in bytes: here, or on a blocking thread if it takes longer.
pub(super) async fn tokenising<T: Send + 'static>(
    weight: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if weight < INLINE_BYTES {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| ApiError::internal(format!("tokenising failed: {e}")))
}

fn encode(prompts: Vec<Prompt>, engine: &Engine, param: &'static str) -> Result<Vec<Vec<u32>>, ApiError> {
    let tokenizer = engine.tokenizer();
    let ids = |prompt| match prompt {
        Prompt::Ids(ids) => Ok(ids),
        Prompt::Text { text, special: true } => tokenizer.encode(&text),
        Prompt::Text { text, special: false } => tokenizer.encode_as_is(&text),
    };
    prompts.into_iter().map(|p| ids(p).map_err(|e| ApiError::bad(param, e.to_string()))).collect()
}

/// Refuses prompts without tokens: there is nothing to go on from.
pub(super) fn none_empty(prompts: &[Vec<u32>], param: &'static str) -> Result<(), ApiError> {
    match prompts.iter().position(Vec::is_empty) {
        None => Ok(()),
        Some(_) if prompts.len() == 1 => Err(ApiError::bad(param, format!("{param} has no tokens"))),
        Some(i) => Err(ApiError::bad(param, format!("{param}[{i}] has no tokens"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether work of this weight is done on the runtime's own thread.
    async fn inline(weight: usize) -> bool {
        let here = std::thread::current().id();
        tokenising(weight, || std::thread::current().id()).await.unwrap() == here
    }

    #[tokio::test]
    async fn many_short_prompts_are_as_much_work_as_a_long_one() {
        let text = |bytes: usize| Prompt::Text { text: "a".repeat(bytes), special: true };
        assert!(inline(weight(&[text(500)])).await);
        assert!(inline(weight(&[text(5), text(5)])).await);
        assert!(!inline(weight(&[text(1024)])).await);
        assert!(!inline(weight(&vec![text(1); 64])).await);
        assert!(!inline(weight(&vec![text(0); 1024])).await, "each is a call");
        assert!(inline(weight(&vec![Prompt::Ids(vec![1; 4000]); 10])).await, "ids need no work");
    }

    #[test]
    fn sequences_share_what_is_the_same_for_all_of_them() {
        let params = GenerateParams {
            seed: Some(7),
            stop: ["x".into()].into(),
            stop_token_ids: [5].into(),
            ..GenerateParams::default()
        };
        let names = Names { prompt: "prompt", adapter: "model" };
        let ask = Ask { prompts: vec![vec![1, 2], vec![3]], n: 3, adapter: None, params, names };
        let requests = ask.requests(4);
        let seen: Vec<_> = requests.iter().map(|r| (r.prompt.to_vec(), r.params.seed.unwrap())).collect();
        let expected = [vec![1, 2], vec![3]].map(|p| [7, 8, 9].map(|seed| (p.clone(), seed)));
        assert_eq!(seen, expected.concat());
        for (i, request) in requests.iter().enumerate() {
            assert!(Arc::ptr_eq(&request.prompt, &requests[i / 3 * 3].prompt));
            assert!(Arc::ptr_eq(&request.params.stop, &requests[0].params.stop));
            assert!(Arc::ptr_eq(&request.params.stop_token_ids, &requests[0].params.stop_token_ids));
        }
    }
}
