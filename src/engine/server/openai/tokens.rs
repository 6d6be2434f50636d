//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State as Shared};
use serde_json::{Value, json};

use super::messages;
use crate::engine::server::error::ApiError;
use crate::engine::server::fields::{Fields, object};
use crate::engine::server::intake::{self, Intake, Prompt, piece_weight, tokenising};
use crate::engine::server::state::State;

pub(in crate::engine::server) async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let intake = Intake::read(&state, request).await?;
    let (engine, info) = intake.engine()?;
    let map = object(&intake.body)?;
    let f = Fields(&map);
    state.model(f.text("model")?)?;
    let special = f.flag("add_special_tokens", true)?;
    let tokens = match (f.text("prompt")?, f.get("messages")) {
        (Some(text), None) => {
            let prompt = Prompt::Text { text: text.to_owned(), special };
            intake::tokenize(vec![prompt], engine, "prompt").await?.concat()
        }
        (None, Some(messages)) => messages::encode(Some(messages), &state).await?,
        (None, None) => return Err(ApiError::bad("prompt", "prompt or messages is missing")),
        (Some(_), Some(_)) => {
            return Err(ApiError::bad("prompt", "prompt and messages are given: leave one of them out"));
        }
    };
    let strings = f.flag("return_token_strs", false)?;
    let engine = engine.clone();
    let (tokens, strings) = tokenising(if strings { tokens.len() * piece_weight(0) } else { 0 }, move || {
        let text = |id: &u32| engine.tokenizer().decode(&[*id]);
        let strings = strings.then(|| tokens.iter().map(text).collect::<Vec<_>>());
        (tokens, strings)
    })
    .await?;
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": info.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    })))
}

pub(in crate::engine::server) async fn detokenize(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let intake = Intake::read(&state, request).await?;
    let (engine, _) = intake.engine()?;
    let map = object(&intake.body)?;
    let f = Fields(&map);
    state.model(f.text("model")?)?;
    if f.get("tokens").is_none() {
        return Err(ApiError::bad("tokens", "tokens is missing"));
    }
    let tokens = f.token_ids("tokens")?;
    let vocab = engine.tokenizer().vocab_size();
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
        return Err(ApiError::bad("tokens", format!("token id {id} is outside the tokenizer's {vocab} ids")));
    }
    let engine = engine.clone();
    let text = tokenising(size_of_val(tokens.as_slice()), move || engine.tokenizer().decode(&tokens)).await?;
    Ok(Json(json!({"prompt": text})))
}
