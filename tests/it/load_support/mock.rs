//! A stand-in for a server: the experiment's endpoints over HTTP, with behaviour that tests choose.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::openai::{self, OpenAi};

/// How it behaves.
#[derive(Clone, Debug)]
pub struct Behaviour {
    pub total_loras: u32,
    pub gpu_loras: u32,
    /// Before the first token.
    pub delay: Duration,
    /// `/generate` answers this.
    pub refuse: Option<StatusCode>,
    /// After so many `/generate` the server is gone, connections and all.
    pub dies_after: Option<u64>,
    /// Streams never end.
    pub hangs: bool,
    /// Streams end before their last message.
    pub cuts: bool,
    /// Swaps are not counted.
    pub miscounts: bool,
    /// How `/v1/completions` behaves.
    pub openai: OpenAi,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            total_loras: 128,
            gpu_loras: 2,
            delay: Duration::from_millis(2),
            refuse: None,
            dies_after: None,
            hangs: false,
            cuts: false,
            miscounts: false,
            openai: OpenAi::default(),
        }
    }
}

#[derive(Default)]
struct Seen {
    /// Bodies of `/generate` and `/v1/completions`.
    requests: Vec<Value>,
    /// `Authorization` of `/v1/completions`.
    keys: Vec<Option<String>>,
    /// Least recently used first.
    resident: VecDeque<u64>,
    swaps: u64,
    in_flight: u64,
    most_in_flight: u64,
}

pub(super) struct Shared {
    pub(super) behaviour: Behaviour,
    seen: Mutex<Seen>,
    generates: AtomicU64,
    stop: Notify,
}

/// A running stand-in; gone when dropped.
pub struct Mock {
    pub port: u16,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mock {
    pub fn start(behaviour: Behaviour) -> Self {
        let resident = (0..u64::from(behaviour.gpu_loras)).collect();
        let shared = Arc::new(Shared {
            behaviour,
            seen: Mutex::new(Seen { resident, ..Seen::default() }),
            generates: AtomicU64::new(0),
            stop: Notify::new(),
        });
        let app = Router::new()
            .route("/health", get(health))
            .route("/swap_stats", get(swap_stats))
            .route("/reset_swap_stats", post(reset))
            .route("/generate", post(generate))
            .route("/v1/models", get(openai::models))
            .route("/v1/completions", post(openai::completions))
            .with_state(Arc::clone(&shared));
        let (sender, port) = std::sync::mpsc::channel();
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                    sender.send(listener.local_addr().unwrap().port()).unwrap();
                    tokio::select! {
                        // Without it small pieces wait 40 ms for the client's delayed acknowledgement.
                        served = axum::serve(listener.tap_io(|s| s.set_nodelay(true).unwrap()), app) => served.unwrap(),
                        () = shared.stop.notified() => {}
                    }
                });
                // Connections go down with the runtime.
                runtime.shutdown_background();
            })
        };
        Self { port: port.recv().unwrap(), shared, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// `Authorization` headers of the `/v1/completions` requests so far.
    pub fn keys(&self) -> Vec<Option<String>> {
        self.shared.seen.lock().unwrap().keys.clone()
    }

    /// Bodies of the `/generate` and `/v1/completions` requests so far, in the order in which they came.
    pub fn requests(&self) -> Vec<Value> {
        self.shared.seen.lock().unwrap().requests.clone()
    }

    pub fn swaps(&self) -> u64 {
        self.shared.seen.lock().unwrap().swaps
    }

    pub fn most_in_flight(&self) -> u64 {
        self.shared.seen.lock().unwrap().most_in_flight
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.shared.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    pub(super) fn saw(&self, body: &Value, key: Option<String>) {
        let mut seen = self.seen.lock().unwrap();
        seen.requests.push(body.clone());
        seen.keys.push(key);
    }
}

pub(super) type Server = State<Arc<Shared>>;

async fn health(State(shared): Server) -> Json<Value> {
    let (total, gpu) = (shared.behaviour.total_loras, shared.behaviour.gpu_loras);
    Json(json!({"status": "ok", "config": {
        "model": "stand-in", "total_loras": total, "gpu_loras": gpu, "dtype": "float32", "max_num_seqs": 16,
        "max_r": 8, "policy": "skip", "evict": "lru", "swap_mode": "layered", "something": "else",
    }}))
}

async fn swap_stats(State(shared): Server) -> Json<Value> {
    let swaps = shared.seen.lock().unwrap().swaps;
    let init = json!({"swap_calls": 1, "swap_count": shared.behaviour.gpu_loras});
    Json(json!({"init": init, "runtime": {"swap_calls": swaps, "swap_count": swaps}}))
}

async fn reset(State(shared): Server) -> Json<Value> {
    shared.seen.lock().unwrap().swaps = 0;
    Json(json!({"status": "ok", "message": "reset"}))
}

/// Takes it down with the stream, however that ends.
struct InFlight(Arc<Shared>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.seen.lock().unwrap().in_flight -= 1;
    }
}

async fn generate(State(shared): Server, Json(body): Json<Value>) -> Response {
    let behaviour = shared.behaviour.clone();
    let number = shared.generates.fetch_add(1, Ordering::SeqCst) + 1;
    if behaviour.dies_after.is_some_and(|n| number > n) {
        shared.stop.notify_one();
        std::future::pending::<()>().await;
    }
    if let Some(status) = behaviour.refuse {
        return (status, Json(json!({"error": {"message": "not today"}}))).into_response();
    }
    let adapter = body["model_id"].as_u64().unwrap_or_default();
    {
        let mut seen = shared.seen.lock().unwrap();
        seen.requests.push(body.clone());
        seen.in_flight += 1;
        seen.most_in_flight = seen.most_in_flight.max(seen.in_flight);
        match seen.resident.iter().position(|a| *a == adapter) {
            Some(place) => drop(seen.resident.remove(place)),
            None => {
                seen.resident.pop_front();
                seen.swaps += u64::from(!behaviour.miscounts);
            }
        }
        seen.resident.push_back(adapter);
    }
    let in_flight = InFlight(Arc::clone(&shared));
    let prompt = body["prompt"].as_str().unwrap_or_default().to_owned();
    let tokens = body["max_tokens"].as_u64().unwrap_or(16);
    if body["stream"] != true {
        tokio::time::sleep(behaviour.delay).await;
        let text = format!("{prompt}{}", " w".repeat(tokens as usize));
        return Json(json!({"text": [text], "model_id": adapter, "ttft": 0.01, "completion_time": 0.02}))
            .into_response();
    }
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Infallible>>(64);
    tokio::spawn(async move {
        let _in_flight = in_flight;
        tokio::time::sleep(behaviour.delay).await;
        if behaviour.hangs {
            std::future::pending::<()>().await;
        }
        for n in 1..=tokens {
            let finished = n == tokens;
            if finished && behaviour.cuts {
                return;
            }
            let text = format!("{prompt}{}", " w".repeat(n as usize));
            let mut message = json!({"text": [text], "finished": finished, "ttft": 0.0125});
            if finished {
                message["output_tokens"] = tokens.into();
                message["ttft_parts"] = json!({
                    "front": 0.001, "queue": 0.002, "kv": 0.0, "slot": 0.0, "swap": 0.004,
                    "prefill": 0.005, "deliver": 0.0005,
                });
            }
            let mut bytes = message.to_string().into_bytes();
            bytes.push(0);
            // Two pieces, so that messages cross the edges of chunks.
            let tail = bytes.split_off(bytes.len() / 2);
            for piece in [bytes, tail] {
                if sender.send(Ok(piece.into())).await.is_err() {
                    return;
                }
            }
        }
    });
    Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver)).into_response()
}
