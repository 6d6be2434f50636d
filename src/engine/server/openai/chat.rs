//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::response::Response;

use super::answer::{Answer, Kind};
use super::logprobs;
use super::messages;
use super::request::Common;
use crate::engine::server::error::ApiError;
use crate::engine::server::fields::{Fields, Neutral, object};
use crate::engine::server::intake::{Ask, Intake, Names, none_empty};
use crate::engine::server::state::State;

const NOT_HERE: &[(&str, Neutral)] = &[
    ("tools", Neutral::Empty),
    ("functions", Neutral::Empty),
    ("echo", Neutral::False),
    ("chat_template", Neutral::Null),
    ("chat_template_kwargs", Neutral::Empty),
    ("add_generation_prompt", Neutral::True),
    ("continue_final_message", Neutral::False),
    ("documents", Neutral::Empty),
    ("audio", Neutral::Null),
];

pub(in crate::engine::server) async fn chat_completions(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let intake = Intake::read(&state, request).await?;
    let (_, info) = intake.engine()?;
    let map = object(&intake.body)?;
    let f = Fields(&map);
    f.refuse(NOT_HERE)?;
    let logprobs = logprobs::of_chat(f)?;
    let mut common =
        Common::parse(f, &["max_completion_tokens", "max_tokens"], None, logprobs, info.sampling)?;
    let adapter = state.model(common.model.as_deref())?;
    let names = Names { prompt: "messages", adapter: "model" };
    intake.takes(1, common.n, names)?;
    let prompts = vec![messages::encode(f.get("messages"), &state).await?];
    none_empty(&prompts, "messages")?;
    common.fill_room(&prompts, info.max_model_len, "messages")?;
    let model = common.model.unwrap_or_else(|| info.model.clone());
    let answer = Answer::new(Kind::Chat, &intake.id, model, common.shape);
    let (n, params) = (common.n, common.params);
    let sequences = intake.submit(Ask { prompts, n, adapter, params, names }).await?;
    answer.respond(sequences).await
}
