//! The values of a JSON body: what each name may hold, and what is said when it does not.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::engine::GenerateParams;
use crate::engine::model::SamplingDefaults;

/// Sequences that one prompt may ask for.
const MAX_N: i64 = 64;
/// Stop strings of a request. All of them are looked for in the text of each of its tokens, on the one thread that
/// brings everybody's.
const MAX_STOPS: usize = 32;
/// Bytes of a stop string. Text waits until it is known not to be the beginning of one.
const MAX_STOP_BYTES: usize = 1024;
/// Stop token ids of a request, which the step loop looks for each token in.
const MAX_STOP_TOKEN_IDS: usize = 256;

/// A value that asks for nothing, so that a parameter that is not implemented may have it.
#[derive(Clone, Copy)]
pub(super) enum Neutral {
    Null,
    True,
    False,
    Number(f64),
    /// An empty object or list.
    Empty,
}

impl Neutral {
    fn is(self, value: &Value) -> bool {
        match self {
            _ if value.is_null() => true,
            Self::Null => false,
            Self::True => value == &Value::Bool(true),
            Self::False => value == &Value::Bool(false),
            Self::Number(n) => value.as_f64() == Some(n),
            Self::Empty => match value {
                Value::Object(map) => map.is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            },
        }
    }
}

/// Sampling parameters of vLLM that are not implemented, with the value that asks for nothing. They are
/// refused rather than ignored: the output would not be what the client asked for.
pub(super) const UNSUPPORTED: &[(&str, Neutral)] = &[
    ("use_beam_search", Neutral::False),
    ("repetition_penalty", Neutral::Number(1.0)),
    ("length_penalty", Neutral::Number(1.0)),
    ("min_p", Neutral::Number(0.0)),
    ("prompt_logprobs", Neutral::Null),
    ("logit_bias", Neutral::Empty),
    ("include_stop_str_in_output", Neutral::False),
    ("skip_special_tokens", Neutral::True),
];

/// The body as a JSON object.
pub(super) fn object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        ApiError::bad("body", format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to()))
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::bad("body", "the body is not a JSON object")),
        Err(e) => Err(ApiError::bad("body", format!("the body is not JSON: {e}"))),
    }
}

/// A body's values; null is as good as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    /// Refuses what is not implemented and asks for something.
    pub(super) fn refuse(self, unsupported: &[(&'static str, Neutral)]) -> Result<(), ApiError> {
        for &(name, neutral) in unsupported {
            if self.0.get(name).is_some_and(|v| !neutral.is(v)) {
                return Err(ApiError::bad(name, format!("{name} is not supported: leave it out")));
            }
        }
        Ok(())
    }

    /// A string.
    pub(super) fn text(self, name: &'static str) -> Result<Option<&'a str>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::bad(name, format!("{name} must be a string, not {}", kind(other)))),
        }
    }

    /// A string that must be there.
    pub(super) fn required(self, name: &'static str) -> Result<&'a str, ApiError> {
        self.text(name)?.ok_or_else(|| ApiError::bad(name, format!("{name} is missing")))
    }

    /// Sequences of each prompt.
    pub(super) fn n(self) -> Result<usize, ApiError> {
        let n = self.integer("n", 1, 1, MAX_N)?;
        if self.integer("best_of", n, 1, i64::MAX)? != n {
            return Err(ApiError::bad("best_of", "best_of other than n is not supported: leave it out"));
        }
        Ok(n as usize)
    }

    /// How to go on from a prompt, given its `max_tokens` and what holds where the body says nothing.
    pub(super) fn sampling(
        self,
        max_tokens: u32,
        defaults: SamplingDefaults,
    ) -> Result<GenerateParams, ApiError> {
        let SamplingDefaults { temperature, top_p, top_k } = defaults;
        let top_k = match self.integer("top_k", top_k.unwrap_or(0).into(), -1, i64::from(u32::MAX))? {
            -1 => 0,
            k => k as u32,
        };
        Ok(GenerateParams {
            max_tokens,
            min_tokens: self.integer("min_tokens", 0, 0, i64::from(max_tokens))? as u32,
            temperature: self.number(
                "temperature",
                temperature.unwrap_or(1.0),
                |v| v >= 0.0,
                "at least 0",
            )?,
            top_p: self.number(
                "top_p",
                top_p.unwrap_or(1.0),
                |v| v > 0.0 && v <= 1.0,
                "above 0 and at most 1",
            )?,
            top_k,
            seed: match self.get("seed") {
                None => None,
                // Negative seeds are as good as others.
                Some(_) => Some(self.integer("seed", 0, i64::MIN, i64::MAX)? as u64),
            },
            presence_penalty: self.number("presence_penalty", 0.0, |v| v.abs() <= 2.0, "within -2 and 2")?,
            frequency_penalty: self.number(
                "frequency_penalty",
                0.0,
                |v| v.abs() <= 2.0,
                "within -2 and 2",
            )?,
            ignore_eos: self.flag("ignore_eos", false)?,
            stop: self.stop()?,
            stop_token_ids: self.stop_token_ids()?,
            logprobs: None,
        })
    }

    pub(super) fn integer(
        self,
        name: &'static str,
        default: i64,
        low: i64,
        high: i64,
    ) -> Result<i64, ApiError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let Some(found) = value.as_i64() else {
            return Err(ApiError::bad(name, format!("{name} must be an integer, not {}", kind(value))));
        };
        if found < low || found > high {
            let bound = if found < low { format!("at least {low}") } else { format!("at most {high}") };
            return Err(ApiError::bad(name, format!("{name} must be {bound}, not {found}")));
        }
        Ok(found)
    }

    fn number(
        self,
        name: &'static str,
        default: f32,
        ok: impl Fn(f32) -> bool,
        range: &str,
    ) -> Result<f32, ApiError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        let Some(found) = value.as_f64() else {
            return Err(ApiError::bad(name, format!("{name} must be a number, not {}", kind(value))));
        };
        match found as f32 {
            v if v.is_finite() && ok(v) => Ok(v),
            _ => Err(ApiError::bad(name, format!("{name} must be {range}, not {found}"))),
        }
    }

    pub(super) fn flag(self, name: &'static str, default: bool) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(v)) => Ok(*v),
            Some(other) => {
                Err(ApiError::bad(name, format!("{name} must be true or false, not {}", kind(other))))
            }
        }
    }

    fn stop(self) -> Result<Arc<[String]>, ApiError> {
        let bad = |message: String| ApiError::bad("stop", message);
        let many = match self.get("stop") {
            None => &[],
            Some(one @ Value::String(_)) => std::slice::from_ref(one),
            Some(Value::Array(many)) => many.as_slice(),
            Some(_) => return Err(bad("stop must be a string or a list of strings".into())),
        };
        if many.len() > MAX_STOPS {
            let message = format!("stop has {} strings and may have {MAX_STOPS}: leave some out", many.len());
            return Err(bad(message));
        }
        let one = |(i, value): (usize, &Value)| match value.as_str() {
            None => Err(bad("stop must be a string or a list of strings".into())),
            Some(text) if text.len() > MAX_STOP_BYTES => {
                let bytes = text.len();
                let message = format!("string {i} of stop has {bytes} bytes and may have {MAX_STOP_BYTES}");
                Err(bad(format!("{message}: shorten it")))
            }
            Some(text) => Ok(text.to_owned()),
        };
        many.iter().enumerate().map(one).collect()
    }

    fn stop_token_ids(self) -> Result<Arc<[u32]>, ApiError> {
        const NAME: &str = "stop_token_ids";
        let many = self.get(NAME).and_then(Value::as_array).map_or(0, Vec::len);
        if many > MAX_STOP_TOKEN_IDS {
            let message = format!("{NAME} has {many} ids and may have {MAX_STOP_TOKEN_IDS}: leave some out");
            return Err(ApiError::bad(NAME, message));
        }
        Ok(self.token_ids(NAME)?.into())
    }

    /// A list of token ids; an empty one where there is none.
    pub(super) fn token_ids(self, name: &'static str) -> Result<Vec<u32>, ApiError> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(value) => {
                ids(value).ok_or_else(|| ApiError::bad(name, format!("{name} must be a list of token ids")))
            }
        }
    }
}

/// A list of token ids.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|v| u32::try_from(v.as_u64()?).ok()).collect()
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a fraction",
        Value::Number(_) => "a number out of range",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sampling(body: &Value) -> Result<GenerateParams, ApiError> {
        Fields(body.as_object().unwrap()).sampling(16, SamplingDefaults::default())
    }

    #[test]
    fn stops_are_bounded_in_number_and_length() {
        let longest = "a".repeat(MAX_STOP_BYTES);
        let params = sampling(&json!({"stop": vec![&longest; MAX_STOPS]})).unwrap();
        assert!(params.stop.len() == MAX_STOPS && params.stop[MAX_STOPS - 1] == longest);
        let params = sampling(&json!({"stop_token_ids": vec![5; MAX_STOP_TOKEN_IDS]})).unwrap();
        assert_eq!(params.stop_token_ids.len(), MAX_STOP_TOKEN_IDS);
        assert_eq!(*sampling(&json!({"stop": longest})).unwrap().stop, [longest.as_str()]);
        for (name, value, says) in [
            ("stop", json!(vec!["a"; MAX_STOPS + 1]), "33 strings and may have 32"),
            // Empty ones would not stop anything, and are as many to go through.
            ("stop", json!(vec![""; MAX_STOPS + 1]), "33 strings"),
            ("stop", json!(longest.clone() + "a"), "string 0 of stop has 1025 bytes and may have 1024"),
            ("stop", json!(["a", "ä".repeat(MAX_STOP_BYTES / 2 + 1)]), "string 1 of stop has 1026 bytes"),
            ("stop", json!(["a", 5]), "must be"),
            ("stop_token_ids", json!(vec![5; MAX_STOP_TOKEN_IDS + 1]), "257 ids and may have 256"),
            ("stop_token_ids", json!("5"), "must be"),
        ] {
            let error = sampling(&json!({name: value})).unwrap_err().body();
            assert_eq!((&error["error"]["param"], &error["error"]["code"]), (&json!(name), &json!(400)));
            assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
        }
    }

    #[test]
    fn the_description_and_the_page_have_the_bounds() {
        let described: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        let mut found = 0;
        for schema in described["components"]["schemas"].as_object().unwrap().values() {
            let Some(stop) = schema.pointer("/properties/stop/anyOf/0/anyOf") else { continue };
            assert_eq!(stop[0]["maxLength"], MAX_STOP_BYTES);
            assert_eq!((&stop[1]["maxItems"], &stop[1]["items"]), (&json!(MAX_STOPS), &stop[0]));
            assert_eq!(schema["properties"]["stop_token_ids"]["anyOf"][0]["maxItems"], MAX_STOP_TOKEN_IDS);
            found += 1;
        }
        assert_eq!(found, 3);
        let page = include_str!("../../../docs/api.md");
        let says = format!("up to {MAX_STOPS} of up to {MAX_STOP_BYTES} bytes, and {MAX_STOP_TOKEN_IDS} ids");
        assert!(page.contains(&says), "docs/api.md: {says}");
    }
}
