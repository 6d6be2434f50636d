//! Log-probabilities of tokens, as either endpoint tells them.

use serde_json::{Map, Value, json};

use super::answer::Kind;
use crate::engine::executor::{TokenId, TokenLogprobs};
use crate::engine::server::error::ApiError;
use crate::engine::server::fields::Fields;

/// Alternatives to a token that may be asked for.
const MOST: i64 = 20;
/// What is told of a token that could not have come: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// What completions ask for with `logprobs`: how many of the likeliest tokens beside the one that came.
pub(super) fn of_completion(f: Fields<'_>) -> Result<Option<u32>, ApiError> {
    match f.get("logprobs") {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(_) => Ok(Some(f.integer("logprobs", 0, 0, MOST)? as u32)),
    }
}

/// What chats ask for with `logprobs` and `top_logprobs`.
pub(super) fn of_chat(f: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let top = f.integer("top_logprobs", 0, 0, MOST)? as u32;
    if f.flag("logprobs", false)? {
        return Ok(Some(top));
    }
    if top > 0 {
        return Err(ApiError::bad("top_logprobs", "top_logprobs needs \"logprobs\": true"));
    }
    Ok(None)
}

/// The log-probabilities of a sequence's tokens, from the last that were told.
#[derive(Debug, Default)]
pub(super) struct Untold {
    tokens: Vec<(TokenId, Box<TokenLogprobs>)>,
    /// Characters of the tokens that were told.
    told: usize,
}

impl Untold {
    pub(super) fn push(&mut self, token: Option<(TokenId, Box<TokenLogprobs>)>) {
        self.tokens.extend(token);
    }

    /// The answer's `logprobs` for what has gathered; `text` gives a token's text.
    pub(super) fn tell(&mut self, kind: Kind, text: impl Fn(TokenId) -> String) -> Value {
        match kind {
            Kind::Completion => self.tell_completion(text),
            Kind::Chat => self.tell_chat(text),
        }
    }

    fn tell_completion(&mut self, text: impl Fn(TokenId) -> String) -> Value {
        let (mut tokens, mut own, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, logprobs) in self.tokens.drain(..) {
            let said = text(token);
            let mut top = Map::new();
            top.insert(said.clone(), finite(logprobs.chosen).into());
            for (token, logprob) in logprobs.top {
                // Of tokens that read alike the likeliest is told.
                top.entry(text(token)).or_insert_with(|| finite(logprob).into());
            }
            offsets.push(self.told);
            self.told += said.chars().count();
            own.push(finite(logprobs.chosen));
            tops.push(top);
            tokens.push(said);
        }
        json!({"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets})
    }

    fn tell_chat(&mut self, text: impl Fn(TokenId) -> String) -> Value {
        let one = |token, logprob| {
            let said = text(token);
            json!({"token": said, "logprob": finite(logprob), "bytes": said.as_bytes()})
        };
        let of = |(token, logprobs): (TokenId, Box<TokenLogprobs>)| {
            let mut content = one(token, logprobs.chosen);
            let top = logprobs.top.into_iter().map(|(token, logprob)| one(token, logprob));
            content["top_logprobs"] = top.collect();
            content
        };
        json!({"content": self.tokens.drain(..).map(of).collect::<Vec<_>>()})
    }
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untold() -> Untold {
        let mut untold = Untold::default();
        untold.push(Some((7, Box::new(TokenLogprobs { chosen: -1.5, top: vec![(8, -0.5), (7, -1.5)] }))));
        untold.push(None);
        untold
    }

    fn text(token: TokenId) -> String {
        format!("é{token}")
    }

    #[test]
    fn completions_have_lists_and_go_on_where_they_were() {
        let mut untold = untold();
        let told = untold.tell(Kind::Completion, text);
        let expected = json!({"tokens": ["é7"], "token_logprobs": [-1.5],
            "top_logprobs": [{"é7": -1.5, "é8": -0.5}], "text_offset": [0]});
        assert_eq!(told, expected);
        untold.push(Some((9, Box::new(TokenLogprobs { chosen: f32::NEG_INFINITY, top: Vec::new() }))));
        let told = untold.tell(Kind::Completion, text);
        assert_eq!((&told["text_offset"], &told["token_logprobs"]), (&json!([2]), &json!([-9999.0])));
    }

    #[test]
    fn chats_have_objects_with_bytes() {
        let told = untold().tell(Kind::Chat, text);
        let eight = json!({"token": "é8", "logprob": -0.5, "bytes": [195, 169, 56]});
        assert_eq!(told["content"][0]["top_logprobs"][0], eight);
        assert_eq!(
            (told["content"].as_array().unwrap().len(), &told["content"][0]["token"]),
            (1, &json!("é7"))
        );
    }
}
