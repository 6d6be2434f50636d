//! OpenAI's endpoints: shapes, events, what is refused and how.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lora_hbm::engine::server::ServerOptions;
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

use crate::support::{BROKEN, Site, config, options, site};

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

async fn quick() -> Site {
    site(config(), options(), 1, 1).await
}

pub async fn post(url: &str, path: &str, body: &Value) -> Response {
    Client::new().post(format!("{url}{path}")).json(body).send().await.unwrap()
}

pub async fn answer(url: &str, path: &str, body: &Value) -> Value {
    let response = post(url, path, body).await;
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, 200, "{body}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// The events of a stream, without the `[DONE]` that must be its last.
pub async fn events(url: &str, path: &str, body: &Value) -> Vec<Value> {
    let response = post(url, path, body).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let mut events: Vec<&str> = text.split_terminator("\n\n").collect();
    assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
    events.into_iter().map(|e| serde_json::from_str(e.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

fn usage(prompt: usize, completion: usize) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_has_openais_shape_and_exact_counts() {
    let site = quick().await;
    let request = Client::new().post(format!("{}{COMPLETIONS}", site.url)).header("x-request-id", "mine-7");
    let body = json!({"model": "lora-3", "prompt": "hello", "max_tokens": 4, "user": "me", "stop": null});
    let response = request.json(&body).send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-7");
    let got: Value = response.json().await.unwrap();
    assert_eq!((&got["id"], &got["object"]), (&json!("cmpl-mine-7"), &json!("text_completion")));
    assert_eq!((&got["model"], &got["usage"]), (&json!("lora-3"), &usage(6, 4)));
    assert!(got["created"].as_u64().unwrap() > 1_600_000_000 && got.get("metrics").is_none(), "{got}");
    let choice = &got["choices"][0];
    assert_eq!(choice["text"].as_str().unwrap().len(), 4);
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    assert_eq!(choice["logprobs"], Value::Null);

    let got = answer(&site.url, COMPLETIONS, &json!({"prompt": "hello", "metrics": true})).await;
    assert_eq!((&got["model"], &got["usage"]), (&json!("emulated"), &usage(6, 16)));
    let metrics = &got["metrics"];
    let ms = |name: &str| metrics[name].as_f64().unwrap();
    let parts =
        ["front", "queue", "kv", "slot", "swap", "prefill", "deliver"].map(|p| ms(&format!("{p}_time_ms")));
    assert!((parts.iter().sum::<f64>() - ms("time_to_first_token_ms")).abs() < 1e-6, "{metrics}");
    assert!(
        ms("total_time_ms") >= ms("time_to_first_token_ms") + ms("generation_time_ms") - 1e-6,
        "{metrics}"
    );
    assert!(ms("mean_itl_ms") > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_prompts_and_sequences_are_numbered_prompt_by_prompt() {
    let site = quick().await;
    let body = json!({"prompt": ["ab", "abcd"], "n": 2, "max_tokens": 3, "seed": 1});
    let got = answer(&site.url, COMPLETIONS, &body).await;
    let indices: Vec<_> = got["choices"].as_array().unwrap().iter().map(|c| c["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(got["usage"], usage(3 + 5, 12), "a prompt counts once, its sequences all");
    let ids = answer(&site.url, "/tokenize", &json!({"prompt": "ab"})).await;
    assert_eq!(ids["count"], 3);
    let body = json!({"prompt": [ids["tokens"], [1, 100]], "max_tokens": 2});
    assert_eq!(answer(&site.url, COMPLETIONS, &body).await["usage"], usage(5, 4));

    let mut body = json!({"prompt": ["ab", "abcd"], "n": 2, "max_tokens": 3, "stream": true});
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = events(&site.url, COMPLETIONS, &body).await;
    let (tail, pieces) = events.split_last().unwrap();
    assert_eq!((&tail["choices"], &tail["usage"]), (&json!([]), &usage(8, 12)));
    let mut by_choice: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for piece in pieces {
        assert_eq!(piece["id"], tail["id"]);
        by_choice.entry(piece["choices"][0]["index"].as_u64().unwrap()).or_default().push(piece);
    }
    assert_eq!(by_choice.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (choice, pieces) in by_choice {
        assert_eq!(pieces.len(), 3);
        for (i, piece) in pieces.iter().enumerate() {
            assert_eq!(piece["usage"], usage(if choice < 2 { 3 } else { 5 }, i + 1), "of its own sequence");
            let ends = (i == 2).then_some("length");
            assert_eq!(piece["choices"][0]["finish_reason"], json!(ends));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_begin_with_text_and_end_with_done() {
    let site = quick().await;
    let ask = |more: Value| {
        let mut body = json!({"model": "lora-1", "max_tokens": 5, "stream": true, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let got = events(&site.url, COMPLETIONS, &ask(json!({"prompt": "abc"}))).await;
    assert_eq!(got.len(), 5, "no event for what was not asked for");
    for event in &got {
        assert_eq!(event["object"], "text_completion");
        assert!(!event["choices"][0]["text"].as_str().unwrap().is_empty());
        assert!(event.get("usage").is_none() && event.get("metrics").is_none());
    }

    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    let body = ask(json!({
        "messages": messages, "max_completion_tokens": 3, "metrics": true,
        "stream_options": {"include_usage": true},
    }));
    let got = events(&site.url, CHAT, &body).await;
    assert_eq!(got.len(), 4, "max_completion_tokens goes before max_tokens");
    for (i, event) in got[..3].iter().enumerate() {
        assert_eq!(event["object"], "chat.completion.chunk");
        let delta = &event["choices"][0]["delta"];
        assert!(!delta["content"].as_str().unwrap().is_empty());
        assert_eq!(delta.get("role").is_some(), i == 0, "with the first text, not before it");
    }
    let prompt = "user: hi\nassistant:".len() + 1;
    assert_eq!(got[3]["usage"], usage(prompt, 3));
    assert!(got[3]["metrics"]["time_to_first_token_ms"].as_f64().unwrap() > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_takes_the_room_that_is_left_and_a_stop_string_cuts() {
    let site = quick().await;
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]);
    let ids = answer(&site.url, "/tokenize", &json!({"messages": messages})).await;
    let prompt = ids["count"].as_u64().unwrap() as usize;
    let text = answer(&site.url, "/detokenize", &json!({"tokens": ids["tokens"]})).await;
    assert_eq!(text["prompt"], "system: Be brief.\nuser: Hello\nassistant:");
    let got = answer(&site.url, CHAT, &json!({"messages": messages})).await;
    assert_eq!((&got["object"], &got["usage"]), (&json!("chat.completion"), &usage(prompt, 512 - prompt)));
    let message = &got["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    assert_eq!(message["content"].as_str().unwrap().len(), 512 - prompt);

    // The emulated model goes through the alphabet: "z" is there, and what is before it is given.
    let body = json!({"prompt": "abc", "max_tokens": 40, "stop": ["z"], "stream": true});
    let got = events(&site.url, COMPLETIONS, &body).await;
    assert_eq!(got.last().unwrap()["choices"][0]["finish_reason"], "stop");
    let text: String = got.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert!(text.len() < 40 && !text.contains('z') && text.ends_with('y'), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_names_its_parameter() {
    let site = quick().await;
    let hi = json!([{"role": "user", "content": "hi"}]);
    for (path, body, status, param) in [
        (COMPLETIONS, json!({}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": []}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": [[]]}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": [1, 259]}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": "a".repeat(600)}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": vec!["a"; 20], "n": 64}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": vec!["a"; 1025]}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": "a", "model": "lora-4"}), 404, json!("model")),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 0}), 400, json!("max_tokens")),
        (COMPLETIONS, json!({"prompt": "a", "temperature": -1}), 400, json!("temperature")),
        (COMPLETIONS, json!({"prompt": "a", "logprobs": 1}), 400, json!("logprobs")),
        (COMPLETIONS, json!({"prompt": "a", "echo": true}), 400, json!("echo")),
        (COMPLETIONS, json!({"prompt": "a", "stream_options": 1}), 400, json!("stream_options")),
        (COMPLETIONS, json!({"prompt": "a", "n": 16, "stop": vec!["q"; 100_000]}), 400, json!("stop")),
        (CHAT, json!({"messages": hi, "stop": "q".repeat(100_000)}), 400, json!("stop")),
        (
            "/generate",
            json!({"prompt": "a", "stop_token_ids": vec![9; 100_000]}),
            400,
            json!("stop_token_ids"),
        ),
        (CHAT, json!({"prompt": "a"}), 400, json!("messages")),
        (CHAT, json!({"messages": "hi"}), 400, json!("messages")),
        (CHAT, json!({"messages": [{"role": "user", "content": "a".repeat(600)}]}), 400, json!("messages")),
        (CHAT, json!({"messages": hi, "max_tokens": 500}), 400, json!("messages")),
        (CHAT, json!({"messages": hi, "max_completion_tokens": "x"}), 400, json!("max_completion_tokens")),
        (CHAT, json!({"messages": hi, "min_tokens": 500}), 400, json!("min_tokens")),
        (CHAT, json!({"messages": hi, "logprobs": true}), 400, json!("logprobs")),
        (CHAT, json!({"messages": hi, "tools": [{"type": "function"}]}), 400, json!("tools")),
        (CHAT, json!({"messages": hi, "model": "gpt-4"}), 404, json!("model")),
        ("/tokenize", json!({}), 400, json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "messages": hi}), 400, json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "model": "b"}), 404, json!("model")),
        ("/detokenize", json!({}), 400, json!("tokens")),
        ("/detokenize", json!({"tokens": [259]}), 400, json!("tokens")),
        ("/detokenize", json!({"tokens": "a"}), 400, json!("tokens")),
    ] {
        let response = post(&site.url, path, &body).await;
        assert_eq!(response.status().as_u16(), status, "{path} {body}");
        let got: Value = response.json().await.unwrap();
        let error = &got["error"];
        assert_eq!((&error["param"], &error["code"]), (&param, &json!(status)), "{path} {body}: {error}");
        let kind = if status == 404 { "NotFoundError" } else { "BadRequestError" };
        assert!(error["type"] == kind && !error["message"].as_str().unwrap().is_empty(), "{error}");
    }
    let stats = site.engine.stats();
    assert_eq!((stats.accepted, stats.cancelled), (0, 0), "nothing was begun for any of them");
}

/// Which of two reasons is given tells what was looked at first.
#[tokio::test(flavor = "multi_thread")]
async fn too_many_sequences_are_refused_before_their_prompts_are_looked_into() {
    let site = quick().await;
    let mut prompts = vec![vec![1]; 1024];
    for (n, says) in [(1, "prompt[1023] has no tokens"), (2, "2048 sequences")] {
        prompts[1023].clear();
        let response = post(&site.url, COMPLETIONS, &json!({"prompt": prompts, "n": n})).await;
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], "prompt");
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stops_is_told_in_the_stream() {
    let site = site(config(), options(), 60, 1).await;
    for (path, stream) in [(COMPLETIONS, true), (CHAT, false)] {
        // The second request finds an engine that has stopped already.
        let messages = json!([{"role": "user", "content": "hi"}]);
        let body = json!({"prompt": "a", "messages": messages, "max_tokens": 400, "stream": stream});
        let mut response = post(&site.url, path, &body).await;
        if !stream {
            assert_eq!(response.status(), 503);
            continue;
        }
        let mut text = String::from_utf8(response.chunk().await.unwrap().unwrap().to_vec()).unwrap();
        let engine = site.engine.clone();
        tokio::task::spawn_blocking(move || engine.shutdown()).await.unwrap();
        text += &response.text().await.unwrap();
        let events: Vec<&str> = text.split_terminator("\n\n").collect();
        let [.., error, done] = events[..] else { panic!("{text}") };
        assert_eq!(done, "data: [DONE]");
        let error: Value = serde_json::from_str(error.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["type"], "ServiceUnavailableError", "{error}");
    }
}

/// Sends a request for three sequences, ends the engine when they run, and hands over what the client has got: status,
/// whether it may come again, and text as far as it came. What `/metrics` then counts as gone is asserted to be nobody.
async fn ended_under(path: &str, stream: bool, end: impl FnOnce(&Site)) -> (u16, bool, String) {
    let site = site(config(), options(), 30, 1).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let body = json!({
        "prompt": "a", "messages": messages, "model_id": null, "n": 3, "max_tokens": 400, "stream": stream,
    });
    let (url, to) = (site.url.clone(), path.to_owned());
    let answer = tokio::spawn(async move {
        let mut response = post(&url, &to, &body).await;
        let again = response.headers().contains_key("retry-after");
        let (status, mut text) = (response.status().as_u16(), Vec::new());
        while let Ok(Some(chunk)) = response.chunk().await {
            text.extend_from_slice(&chunk);
        }
        (status, again, String::from_utf8(text).unwrap())
    });
    while site.engine.stats().generation_tokens < 6 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    end(&site);
    let answer = answer.await.unwrap();
    let text = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    let gone = text.lines().find(|l| l.starts_with("lora_hbm:client_disconnects_total")).unwrap();
    assert!(gone.ends_with(" 0"), "{path} {stream}: {gone}");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_stopped_is_503_and_one_that_fails_is_500() {
    let stop: fn(&Site) = |site| tokio::task::block_in_place(|| site.engine.shutdown());
    let fail: fn(&Site) = |site| site.times.step.store(BROKEN, Ordering::Relaxed);
    for path in [COMPLETIONS, CHAT, "/generate"] {
        for (end, status, kind) in
            [(stop, 503, "ServiceUnavailableError"), (fail, 500, "InternalServerError")]
        {
            let (got, again, text) = ended_under(path, false, end).await;
            assert_eq!((got, again), (status, status == 503), "{path}: {text}");
            assert!(text.contains(kind), "{path}: {text}");
            let (got, _, text) = ended_under(path, true, end).await;
            // A stream of /generate is only cut off.
            assert_eq!((got, text.contains(kind)), (200, path != "/generate"), "{path}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_ask_first_is_answered() {
    let options = ServerOptions { api_key: Some("secret".into()), ..options() };
    let site = site(config(), options, 1, 1).await;
    let send = |method: Method, path: &str, key: &str| {
        let url = format!("{}{path}", site.url);
        let (method, key) = (method, key.to_owned());
        async move { Client::new().request(method, url).bearer_auth(key).send().await.unwrap() }
    };
    for (method, path) in [
        (Method::GET, "/v1/models"),
        (Method::GET, "/version"),
        (Method::GET, "/ping"),
        (Method::POST, "/ping"),
        (Method::GET, "/openapi.json"),
        (Method::GET, "/swap_stats"),
        (Method::HEAD, "/metrics"),
    ] {
        let denied = send(method.clone(), path, "wrong").await;
        let open = path == "/metrics";
        assert_eq!(denied.status(), if open { 200 } else { 401 }, "{path}");
        let given = send(method, path, "secret").await;
        assert_eq!(given.status(), 200, "{path}");
        assert!(given.headers().contains_key("x-request-id"));
    }
    let head = send(Method::HEAD, "/metrics", "").await;
    assert!(head.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    assert_eq!(head.text().await.unwrap(), "");
    let models: Value = send(Method::GET, "/v1/models", "secret").await.json().await.unwrap();
    let first = &models["data"][0];
    assert_eq!(
        (&first["id"], &first["parent"], &first["max_model_len"]),
        (&json!("emulated"), &Value::Null, &json!(512))
    );
    let description: Value = send(Method::GET, "/openapi.json", "secret").await.json().await.unwrap();
    assert!(description["paths"][COMPLETIONS]["post"].is_object());
    let wrong = send(Method::DELETE, "/tokenize", "secret").await;
    assert_eq!(wrong.headers()["allow"], "POST");
    let wrong: Value = wrong.json().await.unwrap();
    assert!(wrong["error"]["message"].as_str().unwrap().contains("send POST"), "{wrong}");
}
