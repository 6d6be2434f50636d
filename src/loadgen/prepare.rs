//! From a trace to requests that are ready to be sent.

use bytes::Bytes;
use rayon::prelude::*;
use serde_json::json;

use crate::workload::prompts::{PromptError, synthesise};
use crate::workload::tokenizer::Tokenizer;
use crate::workload::trace::{Trace, TraceRequest};

/// A request with its body, made before the run so that sending it costs as little as possible.
#[derive(Clone, Debug, PartialEq)]
pub struct PreparedRequest {
    /// Its number in the trace.
    pub id: u64,
    /// When it is due, seconds from the run's start.
    pub scheduled_s: f64,
    /// Prompt length, BOS included.
    pub prompt_tokens: u32,
    /// Output tokens asked for.
    pub max_tokens: u32,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// The adapter's rank, where it is known.
    pub rank: Option<u32>,
    /// The JSON body of `POST /generate`.
    pub body: Bytes,
}

/// Requests of `trace`, in its order. A request without a text gets one of exactly its length in
/// `tokenizer`'s tokens. Output is greedy and never ends early, so that its length is what was asked for.
pub fn prepare(trace: &Trace, tokenizer: &Tokenizer) -> Result<Vec<PreparedRequest>, PromptError> {
    trace.requests.par_iter().map(|r| one(r, tokenizer, trace.header.seed)).collect()
}

fn one(request: &TraceRequest, tokenizer: &Tokenizer, seed: u64) -> Result<PreparedRequest, PromptError> {
    let made;
    let prompt = match &request.prompt {
        Some(text) => text,
        None => {
            made = synthesise(tokenizer, request.prompt_tokens, seed, request.id)?;
            &made
        }
    };
    let body = json!({
        "prompt": prompt,
        "model_id": request.adapter,
        "max_tokens": request.output_tokens,
        "stream": true,
        "temperature": 0.0,
        "ignore_eos": true,
    });
    Ok(PreparedRequest {
        id: request.id,
        scheduled_s: request.arrival_s,
        prompt_tokens: request.prompt_tokens,
        max_tokens: request.output_tokens,
        adapter: request.adapter,
        rank: request.rank,
        body: body.to_string().into(),
    })
}
