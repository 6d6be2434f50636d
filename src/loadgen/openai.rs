//! The OpenAI-compatible interface: models and their names, request bodies, and chunks of streams.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::piece::Piece;
use crate::report::record::PartsS;

/// How adapters are called in the `model` of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterNames {
    /// A name with `{}` where the adapter's number goes.
    Pattern(String),
    /// One name an adapter, from adapter 0 on.
    List(Vec<String>),
}

/// Names that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamesError {
    /// An empty name.
    #[error("--adapter-names '{0}' has an empty name: give a pattern like lora-{{}}, or names with commas")]
    EmptyName(String),
    /// A name twice: two numbers would be one adapter.
    #[error("--adapter-names has '{0}' twice: every adapter needs a name of its own")]
    Twice(String),
    /// Too few names.
    #[error(
        "--adapter-names has {given} names and --total-loras is {total}: give a name for each, or a pattern with {{}}"
    )]
    TooFew {
        /// Names there are.
        given: usize,
        /// Adapters asked for.
        total: u32,
    },
}

impl AdapterNames {
    /// `lora-{}`, or names with commas between, of which there must be at least `total`.
    ///
    /// # Errors
    /// If a name is empty or given twice, or if there are too few.
    pub fn parse(text: &str, total: u32) -> Result<Self, NamesError> {
        if text.contains("{}") {
            return Ok(Self::Pattern(text.to_owned()));
        }
        let names: Vec<String> = text.split(',').map(|n| n.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err(NamesError::EmptyName(text.to_owned()));
        }
        let mut sorted = names.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|w| w[0] == w[1]) {
            return Err(NamesError::Twice(pair[0].clone()));
        }
        if names.len() < total as usize {
            return Err(NamesError::TooFew { given: names.len(), total });
        }
        Ok(Self::List(names))
    }

    /// The name of adapter number `adapter`; none past the end of a list.
    pub fn name(&self, adapter: u32) -> Option<Cow<'_, str>> {
        match self {
            Self::Pattern(pattern) => Some(pattern.replace("{}", &adapter.to_string()).into()),
            Self::List(names) => names.get(adapter as usize).map(|n| n.as_str().into()),
        }
    }
}

impl Default for AdapterNames {
    /// As `serve` calls the adapters that it makes.
    fn default() -> Self {
        Self::Pattern("lora-{}".to_owned())
    }
}

/// What requests of this interface are made with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completions {
    /// The base model's name, where it is known; requests without an adapter need it.
    pub base: Option<String>,
    /// The adapters' names.
    pub names: AdapterNames,
    /// Members of the body that are added or, where null, left out.
    pub extra: Map<String, Value>,
}

impl Completions {
    /// The `model` of a request; none if it has no name.
    pub fn model(&self, adapter: Option<u32>) -> Option<Cow<'_, str>> {
        match adapter {
            Some(adapter) => self.names.name(adapter),
            None => self.base.as_deref().map(Cow::Borrowed),
        }
    }

    /// The body of a streamed `POST /v1/completions` whose output is greedy and has its full length.
    pub(super) fn body(&self, model: &str, prompt: &str, max_tokens: u32) -> Value {
        let mut body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": true,
            "stream_options": {"include_usage": true},
            "temperature": 0.0,
            "ignore_eos": true,
        });
        if let Value::Object(members) = &mut body {
            for (key, value) in &self.extra {
                if value.is_null() {
                    members.remove(key);
                } else {
                    members.insert(key.clone(), value.clone());
                }
            }
        }
        body
    }
}

/// What `GET /v1/models` answers.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ModelList {
    /// Models and adapters.
    pub data: Vec<Model>,
}

/// One model or adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// The model that an adapter is for; none of a model.
    #[serde(default)]
    pub parent: Option<String>,
    /// Prompt and output tokens of one request, at most, where it says.
    #[serde(default)]
    pub max_model_len: Option<u32>,
}

impl ModelList {
    /// The base model: the first that is no adapter.
    pub fn base(&self) -> Option<&Model> {
        self.data.iter().find(|m| m.parent.is_none())
    }

    /// Whether a model or adapter of this name is listed.
    pub fn has(&self, name: &str) -> bool {
        self.data.iter().any(|m| m.id == name)
    }

    /// Names of the adapters, in the order in which they are listed.
    pub fn adapters(&self) -> Vec<&str> {
        self.data.iter().filter(|m| m.parent.is_some()).map(|m| m.id.as_str()).collect()
    }
}

/// What is read of one event's data. The same shape serves completions and chat.
#[derive(Debug, Default, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    metrics: Option<Metrics>,
    #[serde(default)]
    error: Option<Value>,
    #[serde(default)]
    object: Option<String>,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Delta {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    completion_tokens: Option<u32>,
}

/// The server's own times of a request, where it tells them.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Metrics {
    time_to_first_token_ms: Option<f64>,
    front_time_ms: Option<f64>,
    queue_time_ms: Option<f64>,
    kv_time_ms: Option<f64>,
    slot_time_ms: Option<f64>,
    swap_time_ms: Option<f64>,
    prefill_time_ms: Option<f64>,
    deliver_time_ms: Option<f64>,
}

impl Metrics {
    /// All seven, or none: what is not told is not zero.
    fn parts(&self) -> Option<PartsS> {
        Some(PartsS {
            front: self.front_time_ms? * 1e-3,
            queue: self.queue_time_ms? * 1e-3,
            kv: self.kv_time_ms? * 1e-3,
            slot: self.slot_time_ms? * 1e-3,
            swap: self.swap_time_ms? * 1e-3,
            prefill: self.prefill_time_ms? * 1e-3,
            deliver: self.deliver_time_ms? * 1e-3,
        })
    }
}

/// The data of the event that ends a stream.
pub(super) const DONE: &str = "[DONE]";

/// Reads one event's data that is not [`DONE`].
pub(super) fn read(data: &str) -> Result<Piece, serde_json::Error> {
    let chunk: Chunk = serde_json::from_str(data)?;
    let text = |c: &Choice| {
        let said = c.text.as_deref().or_else(|| c.delta.as_ref()?.content.as_deref());
        said.is_some_and(|t| !t.is_empty())
    };
    let said =
        |e: Value| e.get("message").and_then(Value::as_str).map_or_else(|| e.to_string(), str::to_owned);
    let error = match chunk.error {
        Some(error) => Some(said(error)),
        // Servers that put the error's members at the top.
        None if chunk.object.as_deref() == Some("error") => Some(chunk.message.unwrap_or_default()),
        None => None,
    };
    Ok(Piece {
        token: chunk.choices.iter().any(text),
        ttft: chunk.metrics.and_then(|m| m.time_to_first_token_ms).map(|ms| ms * 1e-3),
        parts: chunk.metrics.and_then(|m| m.parts()),
        prompt_tokens: chunk.usage.and_then(|u| u.prompt_tokens),
        output_tokens: chunk.usage.and_then(|u| u.completion_tokens),
        finished: chunk.choices.iter().any(|c| c.finish_reason.is_some()).then_some(true),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_a_pattern_or_a_list() {
        let pattern = AdapterNames::parse("sql-{}-v2", 9).unwrap();
        assert_eq!(pattern.name(7).unwrap(), "sql-7-v2");
        let list = AdapterNames::parse("sql, chat", 2).unwrap();
        assert_eq!((list.name(1).unwrap().as_ref(), list.name(2)), ("chat", None));
        for (text, said) in
            [("a,,b", "empty name"), ("a,b,a", "'a' twice"), ("a,b", "2 names and --total-loras is 3")]
        {
            let error = AdapterNames::parse(text, 3).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_null_takes_a_member_away() {
        let mut completions = Completions::default();
        completions.extra.insert("ignore_eos".to_owned(), Value::Null);
        completions.extra.insert("min_tokens".to_owned(), 3.into());
        let body = completions.body("m", "p", 3);
        assert!(body.get("ignore_eos").is_none(), "{body}");
        assert_eq!((&body["min_tokens"], &body["stream"]), (&json!(3), &json!(true)));
    }

    #[test]
    fn only_text_is_a_token() {
        let empty = read(r#"{"choices":[{"index":0,"text":"","finish_reason":null}]}"#).unwrap();
        assert_eq!((empty.token, empty.finished), (false, None));
        let role = read(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#).unwrap();
        assert!(!role.token);
        assert!(read(r#"{"choices":[{"delta":{"content":"a"}}]}"#).unwrap().token);
        let last = read(r#"{"choices":[{"text":"b","finish_reason":"length"}],"usage":null}"#).unwrap();
        assert_eq!((last.token, last.finished), (true, Some(true)));
        let usage =
            read(r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}"#);
        let usage = usage.unwrap();
        assert_eq!((usage.token, usage.prompt_tokens, usage.output_tokens), (false, Some(7), Some(3)));
    }

    #[test]
    fn errors_are_read_in_both_shapes() {
        let nested = read(r#"{"error":{"message":"out of memory","code":500}}"#).unwrap();
        assert_eq!(nested.error.as_deref(), Some("out of memory"));
        let flat = read(r#"{"object":"error","message":"gone","code":500}"#).unwrap();
        assert_eq!(flat.error.as_deref(), Some("gone"));
        assert!(read("oops").is_err());
    }

    #[test]
    fn parts_are_told_whole_or_not_at_all() {
        let some =
            read(r#"{"choices":[],"metrics":{"time_to_first_token_ms":4.0,"queue_time_ms":1.0}}"#).unwrap();
        assert_eq!((some.ttft, some.parts), (Some(0.004), None));
        let all = r#"{"choices":[],"metrics":{"time_to_first_token_ms":3.5,"front_time_ms":0.5,"queue_time_ms":0.5,
            "kv_time_ms":0.5,"slot_time_ms":0.5,"swap_time_ms":0.5,"prefill_time_ms":0.5,"deliver_time_ms":0.5}}"#;
        assert!((read(all).unwrap().parts.unwrap().total() - 0.0035).abs() < 1e-12);
    }

    #[test]
    fn the_base_model_is_the_first_that_is_no_adapter() {
        let text = r#"{"object":"list","data":[{"id":"a","parent":"opt"},{"id":"opt","root":"x","parent":null,"max_model_len":99}]}"#;
        let list: ModelList = serde_json::from_str(text).unwrap();
        assert_eq!(list.base().map(|m| (m.id.as_str(), m.max_model_len)), Some(("opt", Some(99))));
        assert_eq!(list.adapters(), ["a"]);
        assert!(list.has("a") && !list.has("b"));
    }
}
