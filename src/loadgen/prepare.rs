//! From a trace to requests that are ready to be sent.

use bytes::Bytes;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::openai::Completions;
use crate::workload::prompts::{PromptError, synthesise};
use crate::workload::tokenizer::Tokenizer;
use crate::workload::trace::{Trace, TraceRequest};

/// Requests that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The prompts.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// An adapter without a name.
    #[error("request {request} asks for adapter {adapter}, which has no name: give more --adapter-names")]
    NoName {
        /// The request's number.
        request: u64,
        /// The adapter's number.
        adapter: u32,
    },
    /// The base model's name is not known.
    #[error(
        "request {request} asks for the base model, whose name is not known: let the server be asked (without \
         --skip-health-check)"
    )]
    NoBase {
        /// The request's number.
        request: u64,
    },
}

/// Which HTTP interface requests are made for.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Dialect {
    /// The experiment's own `POST /generate`.
    #[default]
    Generate,
    /// `POST /v1/completions`.
    Completions(Completions),
}

/// Which HTTP interface a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// `POST /generate`, objects that end in NUL.
    Generate,
    /// `POST /v1/completions`, server-sent events.
    Completions,
}

impl Interface {
    /// The path that is posted to.
    pub fn path(self) -> &'static str {
        match self {
            Self::Generate => "/generate",
            Self::Completions => "/v1/completions",
        }
    }
}

/// A request with its body, made before the run so that sending it costs as little as possible.
#[derive(Clone, Debug, PartialEq)]
pub struct PreparedRequest {
    /// Its number in the trace.
    pub id: u64,
    /// When it is due, seconds from the run's start.
    pub scheduled_s: f64,
    /// Prompt length, BOS included.
    pub prompt_tokens: u32,
    /// Bytes of the prompt's text.
    pub prompt_bytes: u64,
    /// Output tokens asked for.
    pub max_tokens: u32,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// The adapter's rank, where it is known.
    pub rank: Option<u32>,
    /// Where it is posted and how the answer is read.
    pub interface: Interface,
    /// The JSON body.
    pub body: Bytes,
}

/// Requests of `trace` for `POST /generate`; see [`prepare_for`].
///
/// # Errors
/// If a prompt cannot be made.
pub fn prepare(trace: &Trace, tokenizer: &Tokenizer) -> Result<Vec<PreparedRequest>, PrepareError> {
    prepare_for(trace, tokenizer, &Dialect::Generate)
}

/// Requests of `trace`, in its order. A request without a text gets one of exactly its length in
/// `tokenizer`'s tokens. Output is greedy and never ends early, so that its length is what was asked for.
///
/// # Errors
/// If a prompt cannot be made, or if an adapter or the base model has no name.
pub fn prepare_for(
    trace: &Trace,
    tokenizer: &Tokenizer,
    dialect: &Dialect,
) -> Result<Vec<PreparedRequest>, PrepareError> {
    trace.requests.par_iter().map(|r| one(r, tokenizer, trace.header.seed, dialect)).collect()
}

fn one(
    request: &TraceRequest,
    tokenizer: &Tokenizer,
    seed: u64,
    dialect: &Dialect,
) -> Result<PreparedRequest, PrepareError> {
    let made;
    let prompt = match &request.prompt {
        Some(text) => text,
        None => {
            made = synthesise(tokenizer, request.prompt_tokens, seed, request.id)?;
            &made
        }
    };
    let (interface, body) = match dialect {
        Dialect::Generate => (Interface::Generate, generate_body(request, prompt)),
        Dialect::Completions(completions) => {
            let model = completions.model(request.adapter).ok_or(match request.adapter {
                Some(adapter) => PrepareError::NoName { request: request.id, adapter },
                None => PrepareError::NoBase { request: request.id },
            })?;
            (Interface::Completions, completions.body(&model, prompt, request.output_tokens))
        }
    };
    Ok(PreparedRequest {
        id: request.id,
        scheduled_s: request.arrival_s,
        prompt_tokens: request.prompt_tokens,
        prompt_bytes: prompt.len() as u64,
        max_tokens: request.output_tokens,
        adapter: request.adapter,
        rank: request.rank,
        interface,
        body: body.to_string().into(),
    })
}

fn generate_body(request: &TraceRequest, prompt: &str) -> Value {
    json!({
        "prompt": prompt,
        "model_id": request.adapter,
        "max_tokens": request.output_tokens,
        "stream": true,
        "temperature": 0.0,
        "ignore_eos": true,
    })
}
