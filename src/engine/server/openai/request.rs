//! What completions and chat have in common in their bodies.

use serde_json::{Map, Value};

use crate::engine::GenerateParams;
use crate::engine::model::SamplingDefaults;
use crate::engine::server::error::ApiError;
use crate::engine::server::fields::{Fields, Neutral, UNSUPPORTED, kind};

/// Parameters of the two endpoints that are not implemented, with the values that ask for nothing.
const NOT_HERE: &[(&str, Neutral)] = &[
    ("add_special_tokens", Neutral::True),
    ("truncate_prompt_tokens", Neutral::Null),
    ("structured_outputs", Neutral::Null),
    ("guided_json", Neutral::Null),
    ("guided_regex", Neutral::Null),
    ("guided_choice", Neutral::Null),
    ("guided_grammar", Neutral::Null),
    ("allowed_token_ids", Neutral::Null),
    ("bad_words", Neutral::Empty),
    ("logits_processors", Neutral::Empty),
    ("return_token_ids", Neutral::False),
    ("return_tokens_as_token_ids", Neutral::False),
];

/// What a client asks of an answer's shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    /// Whether it comes as events.
    pub(super) stream: bool,
    /// A last event with the usage.
    pub(super) include_usage: bool,
    /// The usage so far in every event.
    pub(super) continuous_usage: bool,
    /// Where the request's time went.
    pub(super) metrics: bool,
    /// The tokens' log-probabilities.
    pub(super) logprobs: bool,
}

/// The common part of a body.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Common {
    pub(super) model: Option<String>,
    pub(super) n: usize,
    /// Whose `max_tokens` is [`u32::MAX`] where the body says none and there is no default.
    pub(super) params: GenerateParams,
    pub(super) max_tokens_given: bool,
    pub(super) shape: Shape,
}

impl Common {
    /// Parses it. `max_names` are the names of `max_tokens`, the one that counts first; `logprobs` is what is asked
    /// for of those; `defaults` are the model's.
    pub(super) fn parse(
        f: Fields<'_>,
        max_names: &[&'static str],
        default_max: Option<u32>,
        logprobs: Option<u32>,
        defaults: SamplingDefaults,
    ) -> Result<Self, ApiError> {
        f.refuse(UNSUPPORTED)?;
        f.refuse(NOT_HERE)?;
        response_format(f)?;
        let mut max_tokens = None;
        for &name in max_names {
            if f.get(name).is_some() {
                let given = f.integer(name, 1, 1, i64::from(u32::MAX))? as u32;
                max_tokens.get_or_insert(given);
            }
        }
        let options = match f.get("stream_options") {
            None => None,
            Some(Value::Object(options)) => Some(options),
            Some(other) => {
                let message = format!("stream_options must be an object, not {}", kind(other));
                return Err(ApiError::bad("stream_options", message));
            }
        };
        let shape = Shape {
            stream: f.flag("stream", false)?,
            include_usage: option(options, "include_usage")?,
            continuous_usage: option(options, "continuous_usage_stats")?,
            metrics: f.flag("metrics", false)?,
            logprobs: logprobs.is_some(),
        };
        let params = f.sampling(max_tokens.or(default_max).unwrap_or(u32::MAX), defaults)?;
        Ok(Self {
            model: f.text("model")?.map(str::to_owned),
            n: f.n()?,
            params: GenerateParams { logprobs, ..params },
            max_tokens_given: max_tokens.or(default_max).is_some(),
            shape,
        })
    }

    /// Gives the output all the room that the longest of the prompts leaves, where nothing else was said.
    pub(super) fn fill_room(
        &mut self,
        prompts: &[Vec<u32>],
        max_model_len: usize,
        param: &'static str,
    ) -> Result<(), ApiError> {
        if self.max_tokens_given {
            return Ok(());
        }
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let room = max_model_len.saturating_sub(longest);
        if room == 0 {
            let message = format!(
                "{param} are {longest} tokens and the model takes {max_model_len} with the answer: shorten them"
            );
            return Err(ApiError::bad(param, message));
        }
        self.params.max_tokens = u32::try_from(room).unwrap_or(u32::MAX);
        if self.params.min_tokens > self.params.max_tokens {
            let message = format!("min_tokens must be at most {room}, which is the room that is left");
            return Err(ApiError::bad("min_tokens", message));
        }
        Ok(())
    }
}

fn option(options: Option<&Map<String, Value>>, name: &'static str) -> Result<bool, ApiError> {
    match options.and_then(|o| o.get(name)) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(v)) => Ok(*v),
        Some(other) => {
            let message = format!("stream_options.{name} must be true or false, not {}", kind(other));
            Err(ApiError::bad("stream_options", message))
        }
    }
}

/// Text is what there is.
fn response_format(f: Fields<'_>) -> Result<(), ApiError> {
    match f.get("response_format") {
        None => Ok(()),
        Some(format) if format.get("type").and_then(Value::as_str) == Some("text") => Ok(()),
        Some(_) => Err(ApiError::bad(
            "response_format",
            "response_format other than {\"type\": \"text\"} is not supported: leave it out",
        )),
    }
}
