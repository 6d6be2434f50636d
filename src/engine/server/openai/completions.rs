//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::response::Response;
use serde_json::Value;

use super::answer::{Answer, Kind};
use super::logprobs;
use super::request::Common;
use crate::engine::model::SamplingDefaults;
use crate::engine::server::error::ApiError;
use crate::engine::server::fields::{Fields, Neutral, ids, kind, object};
use crate::engine::server::intake::{Ask, Intake, Names, Prompt, none_empty, tokenize};
use crate::engine::server::state::State;

const NOT_HERE: &[(&str, Neutral)] =
    &[("echo", Neutral::False), ("suffix", Neutral::Null), ("prompt_embeds", Neutral::Null)];

pub(in crate::engine::server) async fn completions(
    Shared(state): Shared<Arc<State>>,
    request: Request,
) -> Result<Response, ApiError> {
    let intake = Intake::read(&state, request).await?;
    let (engine, info) = intake.engine()?;
    let (common, prompts) = parse(&intake.body, info.sampling)?;
    let adapter = state.model(common.model.as_deref())?;
    let names = Names { prompt: "prompt", adapter: "model" };
    intake.takes(prompts.len(), common.n, names)?;
    let prompts = tokenize(prompts, engine, "prompt").await?;
    none_empty(&prompts, "prompt")?;
    let model = common.model.unwrap_or_else(|| info.model.clone());
    let answer = Answer::new(Kind::Completion, &intake.id, model, common.shape);
    let (n, params) = (common.n, common.params);
    let sequences = intake.submit(Ask { prompts, n, adapter, params, names }).await?;
    answer.respond(sequences).await
}

fn parse(bytes: &[u8], defaults: SamplingDefaults) -> Result<(Common, Vec<Prompt>), ApiError> {
    let map = object(bytes)?;
    let f = Fields(&map);
    f.refuse(NOT_HERE)?;
    let common = Common::parse(f, &["max_tokens"], Some(16), logprobs::of_completion(f)?, defaults)?;
    let prompt = f.get("prompt").ok_or_else(|| ApiError::bad("prompt", "prompt is missing"))?;
    Ok((common, prompts(prompt)?))
}

/// A string, a list of strings, a list of ids, or a list of lists of ids.
fn prompts(value: &Value) -> Result<Vec<Prompt>, ApiError> {
    let wrong = |what: String| {
        let says = "prompt must be a string, a list of strings, a list of token ids, or a list of such lists";
        ApiError::bad("prompt", format!("{says}, not {what}"))
    };
    let text = |text: &str| Prompt::Text { text: text.to_owned(), special: true };
    let many = match value {
        Value::String(one) => return Ok(vec![text(one)]),
        Value::Array(many) if many.is_empty() => {
            return Err(ApiError::bad("prompt", "prompt is an empty list"));
        }
        Value::Array(many) => many,
        other => return Err(wrong(kind(other).to_owned())),
    };
    if many[0].is_number() {
        return Ok(vec![Prompt::Ids(
            ids(value).ok_or_else(|| wrong("a list with something else in it".into()))?,
        )]);
    }
    let strings = many[0].is_string();
    let one = |(i, value): (usize, &Value)| match value {
        Value::String(one) if strings => Ok(text(one)),
        Value::Array(_) if !strings => {
            ids(value).map(Prompt::Ids).ok_or_else(|| wrong(format!("something else at prompt[{i}]")))
        }
        other => Err(wrong(format!("{} at prompt[{i}]", kind(other)))),
    };
    many.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(value: Value) -> Result<(Common, Vec<Prompt>), ApiError> {
        parse(value.to_string().as_bytes(), SamplingDefaults::default())
    }

    #[test]
    fn a_prompt_has_four_shapes() {
        let text = |t: &str| Prompt::Text { text: t.into(), special: true };
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Ids(vec![1, 2])]),
            (json!([[1, 2], [3]]), vec![Prompt::Ids(vec![1, 2]), Prompt::Ids(vec![3])]),
        ] {
            assert_eq!(parsed(json!({"prompt": prompt})).unwrap().1, expected);
        }
        for wrong in [
            json!(5),
            json!([]),
            json!(["a", 1]),
            json!([1, "a"]),
            json!([[1], "a"]),
            json!([[1.5]]),
            json!([-1]),
            json!([true]),
            json!({"a": 1}),
        ] {
            let error = parsed(json!({"prompt": wrong})).unwrap_err();
            assert_eq!(error.body()["error"]["param"], "prompt", "{wrong}");
        }
        assert!(format!("{:?}", parsed(json!({"prompt": null})).unwrap_err()).contains("missing"));
    }

    #[test]
    fn unknown_and_null_are_ignored_and_the_rest_is_read() {
        let (common, _) = parsed(json!({
            "prompt": "a", "model": null, "logprobs": null, "echo": false, "suffix": null, "user": "me",
            "logit_bias": {}, "stop": null, "seed": null, "response_format": {"type": "text"},
            "stream_options": null, "max_tokens": null,
        }))
        .unwrap();
        assert_eq!((common.model, common.n, common.params.max_tokens), (None, 1, 16));
        let (common, _) = parsed(json!({
            "prompt": "a", "model": "lora-1", "stream": true, "n": 2, "max_tokens": 4, "metrics": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        }))
        .unwrap();
        let asked = |n| parsed(json!({"prompt": "a", "logprobs": n})).unwrap().0.params.logprobs;
        assert_eq!([asked(json!(0)), asked(json!(3)), asked(json!(false))], [Some(0), Some(3), None]);
        let s = common.shape;
        assert!(s.stream && s.include_usage && s.continuous_usage && s.metrics);
        assert_eq!((common.model.as_deref(), common.n), (Some("lora-1"), 2));
    }

    #[test]
    fn what_a_body_leaves_open_is_the_models() {
        let model = SamplingDefaults { temperature: Some(0.2), top_p: Some(0.9), top_k: Some(50) };
        let parsed = |body: &[u8]| parse(body, model).unwrap().0.params;
        let params = parsed(br#"{"prompt":"a","top_p":null}"#);
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.2, 0.9, 50));
        let params = parsed(br#"{"prompt":"a","temperature":0,"top_p":1,"top_k":-1}"#);
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.0, 1.0, 0));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (name, value) in [
            ("echo", json!(true)),
            ("suffix", json!("x")),
            ("logprobs", json!(21)),
            ("logprobs", json!(-1)),
            ("logprobs", json!(true)),
            ("best_of", json!(2)),
            ("logit_bias", json!({"5": 1})),
            ("min_p", json!(0.1)),
            ("response_format", json!({"type": "json_object"})),
            ("structured_outputs", json!({"choice": ["a"]})),
            ("add_special_tokens", json!(false)),
            ("stream_options", json!(true)),
            ("stream_options", json!({"include_usage": 1})),
            ("metrics", json!("yes")),
            ("model", json!(5)),
            ("min_tokens", json!(17)),
        ] {
            let error = parsed(json!({"prompt": "a", name: value})).unwrap_err();
            assert_eq!(error.body()["error"]["param"], name, "{error:?}");
        }
    }
}
