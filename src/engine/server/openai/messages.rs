//! Conversations: from a body's messages to token ids.

use std::sync::Arc;

use serde_json::Value;

use crate::engine::server::error::ApiError;
use crate::engine::server::fields::kind;
use crate::engine::server::intake::{piece_weight, tokenising};
use crate::engine::server::state::State;
use crate::workload::tokenizer::Message;

/// Token ids of `messages`, a list of `{"role", "content"}`, with the beginning of the assistant's turn.
pub(super) async fn encode(messages: Option<&Value>, state: &State) -> Result<Vec<u32>, ApiError> {
    let messages = parse(messages)?;
    let template = Arc::clone(state.template()?);
    let encoded = tokenising(weight(&messages), move || template.encode(&messages, true)).await?;
    encoded.map_err(|e| ApiError::bad("messages", e.to_string()))
}

fn weight(messages: &[Message]) -> usize {
    messages.iter().map(|m| piece_weight(m.role.len() + m.content.len())).sum()
}

fn parse(messages: Option<&Value>) -> Result<Vec<Message>, ApiError> {
    let bad = |message: String| ApiError::bad("messages", message);
    let list = match messages {
        None => return Err(bad("messages is missing".into())),
        Some(Value::Array(list)) if list.is_empty() => return Err(bad("messages is an empty list".into())),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(bad(format!("messages must be a list, not {}", kind(other)))),
    };
    let one = |(i, message): (usize, &Value)| {
        let Value::Object(message) = message else {
            return Err(bad(format!("messages[{i}] must be an object, not {}", kind(message))));
        };
        let Some(Value::String(role)) = message.get("role") else {
            return Err(bad(format!("messages[{i}].role must be a string")));
        };
        let content =
            content(message.get("content")).map_err(|why| bad(format!("messages[{i}].content{why}")))?;
        Ok(Message { role: role.clone(), content })
    };
    list.iter().enumerate().map(one).collect()
}

/// A string, or a list of parts of text, which are put together as they are.
fn content(value: Option<&Value>) -> Result<String, String> {
    let parts = match value {
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        None | Some(Value::Null) => return Err(" is missing".into()),
        Some(other) => return Err(format!(" must be a string or a list of parts, not {}", kind(other))),
    };
    let mut all = String::new();
    for (i, part) in parts.iter().enumerate() {
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(text))) => all.push_str(text),
            (Some("text"), _) => return Err(format!("[{i}].text must be a string")),
            (Some(other), _) => return Err(format!("[{i}] is of type '{other}': only 'text' is supported")),
            (None, _) => return Err(format!("[{i}].type is missing: only 'text' is supported")),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn content_is_a_string_or_parts_of_text() {
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ]);
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        let expected = [message("system", "Be brief."), message("user", "Hello")];
        assert_eq!(parse(Some(&messages)).unwrap(), expected);
    }

    #[test]
    fn a_conversation_weighs_its_roles_and_the_number_of_its_messages() {
        let message =
            |role: usize, content: usize| Message { role: "r".repeat(role), content: "c".repeat(content) };
        assert_eq!(weight(&[message(0, 5000)]), weight(&[message(5000, 0)]));
        assert_eq!(weight(&vec![message(4, 1); 100]), 100 * weight(&[message(4, 1)]));
        assert!(weight(&vec![message(0, 0); 100]) > weight(&[message(4, 1000)]));
    }

    #[test]
    fn what_is_no_conversation_is_refused_where_it_stands() {
        for (messages, says) in [
            (json!("hi"), "must be a list"),
            (json!([]), "empty"),
            (json!(["hi"]), "messages[0] must be an object"),
            (json!([{"role": "user", "content": "a"}, {"content": "b"}]), "messages[1].role"),
            (json!([{"role": "user"}]), "messages[0].content is missing"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content must be"),
            (
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
                "messages[0].content[0] is of type",
            ),
            (json!([{"role": "user", "content": ["a"]}]), "messages[0].content[0].type"),
        ] {
            let error = parse(Some(&messages)).unwrap_err().body();
            assert_eq!(error["error"]["param"], "messages");
            assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
        }
        assert!(parse(None).is_err());
    }
}
