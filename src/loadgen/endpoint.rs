//! A server's address and its small calls: health and swap statistics.

use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::openai::ModelList;

/// How long a small call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A server.
#[derive(Clone, Debug)]
pub struct Endpoint {
    base: String,
    api_key: Option<String>,
    client: Client,
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Not an address that this client can use.
    #[error("the endpoint '{url}' cannot be used: {message}; give one like http://localhost:8000")]
    Address {
        /// What was given.
        url: String,
        /// Why not.
        message: String,
    },
    /// Nobody answers.
    #[error(
        "no server answers at {url}: {message}; start one with `lora-hbm serve`, or give another --endpoint"
    )]
    NoAnswer {
        /// The address.
        url: String,
        /// What the connection said.
        message: String,
    },
    /// An answer that is a refusal.
    #[error("{url} answered {status}: {message}")]
    Refused {
        /// The call.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The body's message.
        message: String,
    },
    /// An answer of another shape.
    #[error("{url} answered something else than expected ({message}): is it a server of this experiment?")]
    Shape {
        /// The call.
        url: String,
        /// What is wrong.
        message: String,
    },
}

/// What `/health` says. Everything beyond the reference's keys is optional.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`.
    pub status: String,
    /// How the server was started.
    #[serde(default)]
    pub config: HealthConfig,
}

/// The server's configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthConfig {
    /// Base model.
    pub model: Option<String>,
    /// Adapters served.
    pub total_loras: Option<u32>,
    /// Adapters in device memory.
    pub gpu_loras: Option<u32>,
    /// Data type.
    pub dtype: Option<String>,
    /// Running sequences, at most.
    pub max_num_seqs: Option<u32>,
    /// Adapter rank.
    pub max_r: Option<u32>,
    /// Ranks of generated adapters.
    pub ranks: Option<Vec<u32>>,
    /// Admission policy.
    pub policy: Option<String>,
    /// Eviction rule.
    pub evict: Option<String>,
    /// Swap mode.
    pub swap_mode: Option<String>,
    /// Where its tokenizer comes from.
    pub tokenizer: Option<String>,
}

/// Counters of one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapCounts {
    /// Times that at least one adapter was copied in.
    pub swap_calls: u64,
    /// Adapters copied in.
    pub swap_count: u64,
}

/// What `/swap_stats` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapStats {
    /// Preloading.
    pub init: SwapCounts,
    /// Since start or the last reset.
    pub runtime: SwapCounts,
}

/// What `/generate` answers without streaming.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Generated {
    /// Prompt and completion, one for each output.
    pub text: Vec<String>,
    /// The adapter.
    pub model_id: Option<i64>,
    /// Seconds to the first token, by the server.
    pub ttft: Option<f64>,
    /// Seconds to the last.
    pub completion_time: Option<f64>,
}

impl Endpoint {
    /// A server at `url` (`http://host:port`), with a key for its `Authorization` header where it wants one.
    pub fn new(url: &str, api_key: Option<String>) -> Result<Self, EndpointError> {
        let wrong = |message: String| EndpointError::Address { url: url.to_owned(), message };
        let parsed = reqwest::Url::parse(url).map_err(|e| wrong(e.to_string()))?;
        if parsed.scheme() != "http" {
            return Err(wrong(format!("its scheme is {} and only http is spoken here", parsed.scheme())));
        }
        let client = Client::builder()
            // Latency is measured: no proxy between, no waiting for full packets, no limit on
            // connections, and none reused that the server may be about to close.
            .no_proxy()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(usize::MAX)
            .pool_idle_timeout(Duration::from_secs(4))
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        Ok(Self { base: url.trim_end_matches('/').to_owned(), api_key, client })
    }

    /// The address.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// `GET /health`.
    pub async fn health(&self) -> Result<Health, EndpointError> {
        self.call(self.client.get(self.at("/health")), "/health").await
    }

    /// `GET /swap_stats`.
    pub async fn swap_stats(&self) -> Result<SwapStats, EndpointError> {
        self.call(self.client.get(self.at("/swap_stats")), "/swap_stats").await
    }

    /// `POST /reset_swap_stats`.
    pub async fn reset_swap_stats(&self) -> Result<(), EndpointError> {
        let path = "/reset_swap_stats";
        self.call::<serde::de::IgnoredAny>(self.client.post(self.at(path)), path).await.map(drop)
    }

    /// `POST /generate` without streaming.
    pub async fn generate(
        &self,
        body: &serde_json::Value,
        timeout: Duration,
    ) -> Result<Generated, EndpointError> {
        let request = self.client.post(self.at("/generate")).json(body).timeout(timeout);
        self.call(request, "/generate").await
    }

    /// `GET /v1/models`.
    pub async fn models(&self) -> Result<ModelList, EndpointError> {
        self.call(self.client.get(self.at("/v1/models")), "/v1/models").await
    }

    /// A `POST` with a JSON body made before, for the caller to send.
    pub(super) fn post(&self, path: &str, body: bytes::Bytes) -> RequestBuilder {
        let request = self.client.post(self.at(path)).header("content-type", "application/json").body(body);
        self.authorised(request)
    }

    /// Seconds that a `GET` of `path` takes until its answer is whole, whatever the answer.
    pub async fn round_trip(&self, path: &str) -> Result<f64, EndpointError> {
        let no_answer =
            |e: reqwest::Error| EndpointError::NoAnswer { url: self.base.clone(), message: describe(&e) };
        let request = self.authorised(self.client.get(self.at(path)).timeout(CALL_TIMEOUT));
        let sent = Instant::now();
        let response = request.send().await.map_err(no_answer)?;
        response.bytes().await.map_err(no_answer)?;
        Ok(sent.elapsed().as_secs_f64())
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn authorised(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        path: &str,
    ) -> Result<T, EndpointError> {
        let url = self.at(path);
        // A request's own time-out, set by the caller, goes before this one.
        let request = match request.try_clone().and_then(|r| r.build().ok()?.timeout().copied()) {
            Some(_) => request,
            None => request.timeout(CALL_TIMEOUT),
        };
        let no_answer =
            |e: reqwest::Error| EndpointError::NoAnswer { url: self.base.clone(), message: describe(&e) };
        let response = self.authorised(request).send().await.map_err(no_answer)?;
        let status = response.status();
        let body = response.bytes().await.map_err(no_answer)?;
        if status != StatusCode::OK {
            let message = refusal(&body);
            return Err(EndpointError::Refused { url, status: status.as_u16(), message });
        }
        serde_json::from_slice(&body).map_err(|e| EndpointError::Shape { url, message: e.to_string() })
    }
}

/// An error and its causes on one line; reqwest's own text leaves the causes out.
pub(super) fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = cause {
        let said = e.to_string();
        // Outer errors of some layers repeat what the inner one says.
        if !text.contains(&said) {
            if !text.is_empty() {
                text += ": ";
            }
            text += &said;
        }
        cause = e.source();
    }
    text
}

/// What a refusal's body says: the message of `{"error":{"message"}}` or `{"detail"}`, else its beginning.
pub(super) fn refusal(body: &[u8]) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let message = json.as_ref().and_then(|v| {
        v.pointer("/error/message").or_else(|| v.get("error")).or_else(|| v.get("detail"))?.as_str()
    });
    match message {
        Some(message) => message.to_owned(),
        None => String::from_utf8_lossy(body).trim().chars().take(200).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_used_are_refused() {
        for url in ["", "localhost:8000", "https://x:1", "ftp://x"] {
            let error = Endpoint::new(url, None).unwrap_err().to_string();
            assert!(
                error.contains(&format!("'{url}'")) && error.contains("http://localhost:8000"),
                "{error}"
            );
        }
        assert_eq!(Endpoint::new("http://localhost:8000/", None).unwrap().url(), "http://localhost:8000");
    }

    #[test]
    fn refusals_are_read_in_the_shapes_that_servers_use() {
        assert_eq!(refusal(br#"{"error":{"message":"too long","code":400}}"#), "too long");
        assert_eq!(refusal(br#"{"error":"no"}"#), "no");
        assert_eq!(refusal(br#"{"detail":"gone"}"#), "gone");
        assert_eq!(refusal(b" plain \n"), "plain");
        assert_eq!(refusal(&[b'x'; 1000]).len(), 200);
    }
}
