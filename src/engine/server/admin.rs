//! State and statistics: `/health`, `/swap_stats`, `/reset_swap_stats`, `/version`, `/ping`, `/v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::state::{Phase, State};
use crate::engine::SwapCounts;

pub(super) async fn health(Shared(state): Shared<Arc<State>>) -> Response {
    let config = state.loaded().ok().map(|(_, info)| json!(info));
    let (status, why) = match state.phase() {
        Phase::Ready => return Json(json!({"status": "ok", "config": config})).into_response(),
        Phase::Loading => ("loading", "the model is being loaded".to_owned()),
        Phase::Draining => ("draining", "the server is shutting down".to_owned()),
        Phase::Failed => {
            let failure = state.loaded().ok().and_then(|(engine, _)| engine.failure());
            ("failed", format!("the engine has stopped: {}", failure.unwrap_or_default()))
        }
    };
    // A failure like any other, and what the reference's clients read beside it.
    let mut body = ApiError::unavailable(why).body();
    body["status"] = json!(status);
    body["config"] = json!(config);
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], Json(body)).into_response()
}

pub(super) async fn swap_stats(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let stats = state.loaded()?.0.swap_stats();
    let counts = |c: SwapCounts| json!({"swap_calls": c.swap_calls, "swap_count": c.swap_count});
    Ok(Json(json!({"init": counts(stats.init), "runtime": counts(stats.runtime)})))
}

pub(super) async fn reset_swap_stats(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    state.loaded()?.0.reset_swap_stats();
    Ok(Json(json!({"status": "ok", "message": "Runtime swap stats reset"})))
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn ping() -> StatusCode {
    StatusCode::OK
}

pub(super) async fn models(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let (engine, info) = state.loaded()?;
    let model = |id: &str, root: &str, parent: Option<&str>| {
        json!({
            "id": id, "object": "model", "created": state.created, "owned_by": "lora-hbm",
            "root": root, "parent": parent, "max_model_len": info.max_model_len,
        })
    };
    let adapters = engine.adapters();
    let served = adapters.iter().filter(|a| engine.has_adapter(a.id));
    let served = served.map(|a| model(&a.name, &a.root, Some(&info.model)));
    let data: Vec<Value> = std::iter::once(model(&info.model, &info.model, None)).chain(served).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}
