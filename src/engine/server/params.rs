//! `POST /generate`'s body: what each name may hold, and what is said when it does not.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::engine::GenerateParams;

/// Sequences that one request may ask for.
const MAX_N: u64 = 64;

/// A parsed body.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct GenerateBody {
    /// The prompt.
    pub(super) prompt: String,
    /// The adapter's number; none (`null`) is the base model.
    pub(super) model_id: Option<i64>,
    /// Whether output is sent as it comes.
    pub(super) stream: bool,
    /// Sequences.
    pub(super) n: usize,
    /// How to go on.
    pub(super) params: GenerateParams,
}

/// Sampling parameters of vLLM that are not implemented, with the value that asks for nothing. They are
/// refused rather than ignored: the output would not be what the client asked for.
const UNSUPPORTED: &[(&str, Neutral)] = &[
    ("use_beam_search", Neutral::False),
    ("repetition_penalty", Neutral::Number(1.0)),
    ("length_penalty", Neutral::Number(1.0)),
    ("min_p", Neutral::Number(0.0)),
    ("logprobs", Neutral::Null),
    ("prompt_logprobs", Neutral::Null),
    ("logit_bias", Neutral::Null),
    ("include_stop_str_in_output", Neutral::False),
    ("skip_special_tokens", Neutral::True),
];

#[derive(Clone, Copy)]
enum Neutral {
    Null,
    True,
    False,
    Number(f64),
}

impl Neutral {
    fn is(self, value: &Value) -> bool {
        match self {
            _ if value.is_null() => true,
            Self::Null => false,
            Self::True => value == &Value::Bool(true),
            Self::False => value == &Value::Bool(false),
            Self::Number(n) => value.as_f64() == Some(n),
        }
    }
}

impl GenerateBody {
    /// Parses a body. Names that nobody knows are ignored.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(bytes).map_err(|e| {
            ApiError::malformed(format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to()))
        })?;
        let value: Value = serde_json::from_str(text)
            .map_err(|e| ApiError::malformed(format!("the body is not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(ApiError::malformed("the body is not a JSON object"));
        };
        for &(name, neutral) in UNSUPPORTED {
            if map.get(name).is_some_and(|v| !neutral.is(v)) {
                return Err(ApiError::bad(name, format!("{name} is not supported: leave it out")));
            }
        }
        let f = Fields(&map);
        let n = f.integer("n", 1, 1, MAX_N as i64)? as usize;
        if f.integer("best_of", n as i64, 1, i64::MAX)? != n as i64 {
            return Err(ApiError::bad("best_of", "best_of other than n is not supported: leave it out"));
        }
        let max_tokens = f.integer("max_tokens", 16, 1, i64::from(u32::MAX))?;
        let top_k = match f.integer("top_k", 0, -1, i64::from(u32::MAX))? {
            -1 => 0,
            k => k as u32,
        };
        let params = GenerateParams {
            max_tokens: max_tokens as u32,
            min_tokens: f.integer("min_tokens", 0, 0, max_tokens)? as u32,
            temperature: f.number("temperature", 1.0, |v| v >= 0.0, "at least 0")?,
            top_p: f.number("top_p", 1.0, |v| v > 0.0 && v <= 1.0, "above 0 and at most 1")?,
            top_k,
            seed: match map.get("seed") {
                None | Some(Value::Null) => None,
                // Negative seeds are as good as others.
                Some(_) => Some(f.integer("seed", 0, i64::MIN, i64::MAX)? as u64),
            },
            presence_penalty: f.number("presence_penalty", 0.0, |v| v.abs() <= 2.0, "within -2 and 2")?,
            frequency_penalty: f.number("frequency_penalty", 0.0, |v| v.abs() <= 2.0, "within -2 and 2")?,
            ignore_eos: f.flag("ignore_eos")?,
            stop: f.strings("stop")?,
            stop_token_ids: f.token_ids("stop_token_ids")?,
        };
        Ok(Self { prompt: f.prompt()?, model_id: f.model_id()?, stream: f.flag("stream")?, n, params })
    }
}

/// A body's values; null is as good as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, name: &'static str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn prompt(&self) -> Result<String, ApiError> {
        match self.get("prompt") {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => {
                Err(ApiError::bad("prompt", format!("prompt must be a string, not {}", kind(other))))
            }
            None => Err(ApiError::bad("prompt", "prompt is missing")),
        }
    }

    /// Null is the base model, absent is adapter 0.
    fn model_id(&self) -> Result<Option<i64>, ApiError> {
        match self.0.get("model_id") {
            None => Ok(Some(0)),
            Some(Value::Null) => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| {
                ApiError::bad("model_id", format!("model_id must be an integer, not {}", kind(value)))
            }),
        }
    }

    fn integer(&self, name: &'static str, default: i64, low: i64, high: i64) -> Result<i64, ApiError> {
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
        &self,
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

    fn flag(&self, name: &'static str) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(v)) => Ok(*v),
            Some(other) => {
                Err(ApiError::bad(name, format!("{name} must be true or false, not {}", kind(other))))
            }
        }
    }

    fn strings(&self, name: &'static str) -> Result<Vec<String>, ApiError> {
        let wrong = || ApiError::bad(name, format!("{name} must be a string or a list of strings"));
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one.clone()]),
            Some(Value::Array(many)) => {
                many.iter().map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
            }
            Some(_) => Err(wrong()),
        }
    }

    fn token_ids(&self, name: &'static str) -> Result<Vec<u32>, ApiError> {
        let wrong = || ApiError::bad(name, format!("{name} must be a list of token ids"));
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok()).ok_or_else(wrong);
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(many)) => many.iter().map(id).collect(),
            Some(_) => Err(wrong()),
        }
    }
}

fn kind(value: &Value) -> &'static str {
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
    use axum::response::IntoResponse;

    use super::*;

    fn parse(text: &str) -> Result<GenerateBody, ApiError> {
        GenerateBody::parse(text.as_bytes())
    }

    #[test]
    fn defaults_are_the_references() {
        let body = parse(r#"{"prompt":"hi","some_new_name":[1]}"#).unwrap();
        assert_eq!((body.model_id, body.stream, body.n), (Some(0), false, 1));
        assert_eq!(body.params, GenerateParams::default());
        assert_eq!(body.params.max_tokens, 16);
        assert_eq!(parse(r#"{"prompt":"hi","model_id":null}"#).unwrap().model_id, None);
    }

    #[test]
    fn every_parameter_is_read() {
        let body = parse(
            r#"{"prompt":"p","model_id":5,"stream":true,"n":2,"max_tokens":9,"min_tokens":2,
                "temperature":0.5,"top_p":0.9,"top_k":-1,"seed":-3,"presence_penalty":-1,
                "frequency_penalty":2,"ignore_eos":true,"stop":"x","stop_token_ids":[7]}"#,
        )
        .unwrap();
        let params = GenerateParams {
            max_tokens: 9,
            min_tokens: 2,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 0,
            seed: Some(-3i64 as u64),
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            ignore_eos: true,
            stop: vec!["x".into()],
            stop_token_ids: vec![7],
        };
        let expected = GenerateBody { prompt: "p".into(), model_id: Some(5), stream: true, n: 2, params };
        assert_eq!(body, expected);
    }

    #[test]
    fn a_wrong_value_is_400_and_names_its_parameter() {
        for (field, value) in [
            ("max_tokens", "0"),
            ("max_tokens", "1.5"),
            ("max_tokens", "\"9\""),
            ("min_tokens", "17"),
            ("temperature", "-0.1"),
            ("temperature", "\"hot\""),
            ("top_p", "0"),
            ("top_p", "1.01"),
            ("top_k", "-2"),
            ("n", "0"),
            ("n", "65"),
            ("best_of", "3"),
            ("presence_penalty", "2.5"),
            ("frequency_penalty", "[]"),
            ("ignore_eos", "1"),
            ("stream", "\"yes\""),
            ("stop", "[1]"),
            ("stop_token_ids", "[-1]"),
            ("seed", "0.5"),
            ("model_id", "\"5\""),
            ("model_id", "1.5"),
            ("use_beam_search", "true"),
            ("logprobs", "3"),
        ] {
            let error = parse(&format!(r#"{{"prompt":"p","{field}":{value}}}"#)).unwrap_err();
            assert!(format!("{error:?}").contains(field), "{field}={value}: {error:?}");
            assert_eq!(error.into_response().status(), 400, "{field}={value}");
        }
        for (text, says) in
            [("{}", "prompt is missing"), (r#"{"prompt":[1]}"#, "string"), ("[]", "object"), ("{", "JSON")]
        {
            assert!(format!("{:?}", parse(text).unwrap_err()).contains(says), "{text}");
        }
        let error = GenerateBody::parse(b"{\"prompt\":\"\xff\"}").unwrap_err();
        assert!(format!("{error:?}").contains("UTF-8: byte 11"), "{error:?}");
    }
}
