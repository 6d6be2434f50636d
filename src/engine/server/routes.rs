//! Which path goes where, and what holds for all of them.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderName, Method, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};

use super::error::ApiError;
use super::state::State;
use super::{adapters, admin, generate, metrics};

/// Paths that need no key.
const OPEN_PATHS: &[&str] = &["/health", "/metrics", "/ping"];

pub(super) fn router(state: Arc<State>) -> Router {
    let id = HeaderName::from_static("x-request-id");
    Router::new()
        .route("/generate", post(generate::generate))
        .route("/health", get(admin::health))
        .route("/swap_stats", get(admin::swap_stats))
        .route("/reset_swap_stats", post(admin::reset_swap_stats))
        .route("/metrics", get(metrics::metrics))
        .route("/version", get(admin::version))
        .route("/ping", get(admin::ping).post(admin::ping))
        .route("/v1/models", get(admin::models))
        .route("/adapters", get(adapters::list))
        .route("/adapters/{id}/pin", post(adapters::pin))
        .route("/adapters/{id}/unpin", post(adapters::unpin))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(state.clone(), authorize))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(PropagateRequestIdLayer::new(id.clone()))
        .layer(SetRequestIdLayer::new(id, MakeRequestUuid))
        .with_state(state)
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::not_found(None, format!("there is nothing at {}", uri.path()))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

async fn authorize(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(axum::http::header::AUTHORIZATION).map(|v| v.as_bytes());
    if OPEN_PATHS.contains(&request.uri().path()) || state.lets_in(given) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    ApiError::internal("a handler of the server panicked; its log says where").into_response()
}
