//! `POST /generate`'s body.

use super::error::ApiError;
use super::fields::{Fields, Neutral, UNSUPPORTED, kind, object};
use crate::engine::GenerateParams;
use crate::engine::model::SamplingDefaults;

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

impl GenerateBody {
    /// Parses a body. Names that nobody knows are ignored.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let map = object(bytes)?;
        let f = Fields(&map);
        f.refuse(UNSUPPORTED)?;
        f.refuse(&[("logprobs", Neutral::Null)])?;
        let max_tokens = f.integer("max_tokens", 16, 1, i64::from(u32::MAX))? as u32;
        let prompt = f.required("prompt")?;
        // Null is the base model, absent is adapter 0.
        let model_id = match map.get("model_id") {
            None => Some(0),
            Some(value) if value.is_null() => None,
            Some(value) => Some(value.as_i64().ok_or_else(|| {
                ApiError::bad("model_id", format!("model_id must be an integer, not {}", kind(value)))
            })?),
        };
        Ok(Self {
            prompt: prompt.to_owned(),
            model_id,
            stream: f.flag("stream", false)?,
            n: f.n()?,
            params: f.sampling(max_tokens, SamplingDefaults::default())?,
        })
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
            stop: ["x".into()].into(),
            stop_token_ids: [7].into(),
            logprobs: None,
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
