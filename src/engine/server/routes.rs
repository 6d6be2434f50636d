//! Which path goes where, and what holds for all of them.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State as Shared};
use axum::handler::Handler;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, Method, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};

use super::error::ApiError;
use super::state::State;
use super::{adapters, admin, generate, metrics, openai};

/// Paths that need no key.
const OPEN_PATHS: &[&str] = &["/health", "/metrics"];

/// A path and who answers there.
struct Route {
    path: &'static str,
    /// What it takes; `HEAD` goes with `GET`.
    methods: &'static [&'static str],
    handler: MethodRouter<Arc<State>>,
}

fn at<H, T>(methods: &'static [&'static str], path: &'static str, handler: H) -> Route
where
    H: Handler<T, Arc<State>> + Clone,
    T: 'static,
{
    let handler = methods.iter().fold(MethodRouter::new(), |router, method| match *method {
        "GET" => router.get(handler.clone()),
        "POST" => router.post(handler.clone()),
        other => unreachable!("no route takes {other}"),
    });
    Route { path, methods, handler }
}

/// Every path there is; `openapi.json` says the same.
fn routes() -> Vec<Route> {
    const GET: &[&str] = &["GET"];
    const POST: &[&str] = &["POST"];
    vec![
        at(POST, "/generate", generate::generate),
        at(GET, "/health", admin::health),
        at(GET, "/swap_stats", admin::swap_stats),
        at(POST, "/reset_swap_stats", admin::reset_swap_stats),
        at(GET, "/metrics", metrics::metrics),
        at(GET, "/version", admin::version),
        at(&["GET", "POST"], "/ping", admin::ping),
        at(GET, "/v1/models", admin::models),
        at(POST, "/v1/load_lora_adapter", adapters::load),
        at(POST, "/v1/unload_lora_adapter", adapters::unload),
        at(GET, "/adapters", adapters::list),
        at(POST, "/adapters/{id}/pin", adapters::pin),
        at(POST, "/adapters/{id}/unpin", adapters::unpin),
        at(POST, "/v1/completions", openai::completions),
        at(POST, "/v1/chat/completions", openai::chat_completions),
        at(POST, "/tokenize", openai::tokenize),
        at(POST, "/detokenize", openai::detokenize),
        at(GET, "/openapi.json", openapi),
    ]
}

pub(super) fn router(state: Arc<State>) -> Router {
    let id = HeaderName::from_static("x-request-id");
    let add = |router: Router<Arc<State>>, route: Route| router.route(route.path, route.handler);
    routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(state.clone(), authorize))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), count))
        .layer(PropagateRequestIdLayer::new(id.clone()))
        .layer(SetRequestIdLayer::new(id, MakeRequestUuid))
        .with_state(state)
}

/// What is embedded and served.
const OPENAPI: &str = include_str!("openapi.json");

async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
}

/// Counts answers by path and status. Paths are the router's, so that there are only so many of them.
async fn count(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map(|p| p.as_str().to_owned());
    let response = next.run(request).await;
    state.observed.response(path.as_deref().unwrap_or("other"), response.status().as_u16());
    response
}

async fn not_found(uri: Uri) -> ApiError {
    ApiError::not_found(None, format!("there is nothing at {}", uri.path()))
}

async fn method_not_allowed(method: Method, path: MatchedPath) -> ApiError {
    let takes = routes().iter().find(|r| r.path == path.as_str()).map_or(&[][..], |r| r.methods);
    ApiError::method_not_allowed(method.as_str(), path.as_str(), takes)
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn the_description_has_every_path_and_method_and_no_other() {
        let described: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut there = BTreeSet::new();
        for (path, methods) in described["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys() {
                there.insert((path.clone(), method.to_uppercase()));
            }
        }
        let served: BTreeSet<_> = routes()
            .iter()
            .flat_map(|r| r.methods.iter().map(|m| (r.path.to_owned(), (*m).to_owned())))
            .collect();
        assert_eq!(there, served);
        assert_eq!(described["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn every_reference_in_the_description_leads_somewhere() {
        let described: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut open = vec![&described];
        let mut followed = 0;
        while let Some(value) = open.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(to)) = map.get("$ref") {
                        let to = to.strip_prefix('#').unwrap();
                        assert!(described.pointer(to).is_some(), "{to}");
                        followed += 1;
                    }
                    open.extend(map.values());
                }
                Value::Array(list) => open.extend(list),
                _ => {}
            }
        }
        assert!(followed > 10);
    }
}
