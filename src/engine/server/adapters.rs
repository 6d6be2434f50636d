//! Adapters while the server runs: `GET /adapters`, pins, and vLLM's `/v1/load_lora_adapter` and
//! `/v1/unload_lora_adapter`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State as Shared};
use lora_sched::{AdapterId, EventError};
use serde::Serialize;

use super::body;
use super::error::ApiError;
use super::fields::{Fields, object};
use super::state::{InFlight, State};
use crate::engine::adapters::{AdapterView, PoolError};
use crate::engine::{AdapterError, Engine};

/// One adapter, as it is told.
#[derive(Debug, Serialize)]
struct AdapterObject {
    /// What requests call it.
    id: String,
    object: &'static str,
    /// The reference's number.
    model_id: u32,
    tier: &'static str,
    slot: Option<u32>,
    rank: u32,
    bytes: u64,
    /// Requests that hold its slot.
    pinned_by: u32,
    user_pinned: bool,
    /// Seconds since the last request for it was taken.
    last_used_s: Option<f64>,
    requests: u64,
    hits: u64,
    swaps: u64,
    root: String,
    /// Why it cannot be had.
    error: Option<String>,
}

impl AdapterObject {
    fn new(view: AdapterView, now: u64) -> Self {
        Self {
            id: view.name,
            object: "adapter",
            model_id: view.id.0,
            tier: view.tier.as_str(),
            slot: view.slot,
            rank: view.rank,
            bytes: view.bytes,
            pinned_by: view.pinned_by,
            user_pinned: view.user_pinned,
            last_used_s: view.last_used.map(|t| now.saturating_sub(t) as f64 * 1e-9),
            requests: view.requests,
            hits: view.hits,
            swaps: view.swaps,
            root: view.root,
            error: view.failure,
        }
    }
}

/// A list, as OpenAI's API has them.
#[derive(Debug, Serialize)]
pub(super) struct List {
    object: &'static str,
    data: Vec<AdapterObject>,
}

pub(super) async fn list(Shared(state): Shared<Arc<State>>) -> Result<Json<List>, ApiError> {
    let (engine, _) = state.loaded()?;
    let now = engine.clock().now();
    let data = engine.adapters().into_iter().map(|view| AdapterObject::new(view, now)).collect();
    Ok(Json(List { object: "list", data }))
}

/// An adapter as a path names it.
type Named = Result<Path<String>, PathRejection>;

pub(super) async fn pin(
    Shared(state): Shared<Arc<State>>,
    name: Named,
) -> Result<Json<serde_json::Value>, ApiError> {
    set_pin(&state, name, true).await
}

pub(super) async fn unpin(
    Shared(state): Shared<Arc<State>>,
    name: Named,
) -> Result<Json<serde_json::Value>, ApiError> {
    set_pin(&state, name, false).await
}

/// Answers with the adapter as it is once the pin holds: it may still be on its way into a slot.
async fn set_pin(state: &State, name: Named, pinned: bool) -> Result<Json<serde_json::Value>, ApiError> {
    let Path(name) = name.map_err(|e| ApiError::bad("adapter", e.body_text()))?;
    let (engine, _) = state.serving()?;
    let id = find(engine, &name)?;
    let refused = |error| match error {
        // It went in the meantime.
        AdapterError::Refused(EventError::UnknownAdapter(_)) => unknown(&name),
        other => ApiError::from(other),
    };
    engine.pin_adapter(id, pinned).map_err(refused)?.done().await.map_err(refused)?;
    let now = engine.clock().now();
    let view = engine.adapters().into_iter().find(|view| view.id == id).ok_or_else(|| unknown(&name))?;
    let adapter = serde_json::to_value(AdapterObject::new(view, now));
    Ok(Json(adapter.map_err(|e| ApiError::internal(e.to_string()))?))
}

/// An adapter by name, else by number.
fn find(engine: &Engine, name: &str) -> Result<AdapterId, ApiError> {
    let number = || name.parse().ok().map(AdapterId).filter(|&id| engine.has_adapter(id));
    engine.find_adapter(name).or_else(number).ok_or_else(|| unknown(name))
}

/// Of a path: bodies call it otherwise.
fn unknown(name: &str) -> ApiError {
    ApiError::not_found(Some("adapter"), AdapterError::Unknown { name: name.to_owned() }.to_string())
}

pub(super) async fn load(Shared(state): Shared<Arc<State>>, request: Request) -> Result<String, ApiError> {
    let bytes = body::read(request, &state.limits).await?;
    let guard = InFlight::new(&state);
    let map = object(&bytes)?;
    let name = Fields(&map).required("lora_name")?.to_owned();
    let lora_path = PathBuf::from(Fields(&map).required("lora_path")?);
    let (engine, info) = state.serving()?;
    if name.is_empty() {
        return Err(ApiError::bad(
            "lora_name",
            "lora_name is empty: say what requests are to call the adapter",
        ));
    }
    if name == info.model {
        let message = format!("'{name}' is the base model's name: choose another for the adapter");
        return Err(ApiError::bad("lora_name", message));
    }
    let engine = Arc::clone(engine);
    let said = format!("Success: LoRA adapter '{name}' added successfully.");
    // Reading takes its time; once begun it is finished, whether or not the client waits for it.
    let load = move || {
        let _guard = guard;
        engine.load_adapter(&name, &lora_path)
    };
    tokio::task::spawn_blocking(load)
        .await
        .map_err(|e| ApiError::internal(format!("loading failed: {e}")))??;
    Ok(said)
}

pub(super) async fn unload(Shared(state): Shared<Arc<State>>, request: Request) -> Result<String, ApiError> {
    let bytes = body::read(request, &state.limits).await?;
    // A stop waits for the adapter's last requests, and so for their adapter to go.
    let guard = InFlight::new(&state);
    let map = object(&bytes)?;
    let name = Fields(&map).required("lora_name")?;
    let (engine, _) = state.serving()?;
    let pending = engine.unload_adapter(name)?;
    // Waited for even if the client does not, so that the memory is given back on a thread that may wait.
    let ended = tokio::spawn(async move {
        let _guard = guard;
        let made = pending.done().await?;
        tokio::task::spawn_blocking(move || drop(made)).await.map_err(|e| ApiError::internal(e.to_string()))
    });
    ended.await.map_err(|e| ApiError::internal(format!("unloading failed: {e}")))??;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let message = error.to_string();
        match error {
            AdapterError::Unknown { .. } | AdapterError::Refused(EventError::UnknownAdapter(_)) => {
                Self::not_found(Some("lora_name"), message)
            }
            AdapterError::NoFolder { .. } => Self::not_found(Some("lora_path"), message),
            AdapterError::Duplicate { .. } | AdapterError::Leaving { .. } => Self::bad("lora_name", message),
            AdapterError::Refused(EventError::AllPinned) => Self::conflict(message),
            AdapterError::Emulated | AdapterError::Refused(_) => Self::malformed(message),
            AdapterError::Pool(PoolError::Slab { .. }) | AdapterError::Stopped(_) => Self::internal(message),
            AdapterError::Pool(_) => Self::bad("lora_path", message),
        }
    }
}
