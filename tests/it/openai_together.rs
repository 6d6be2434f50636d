//! OpenAI's endpoints under many requests at once: outputs are what each gets alone, and the metrics are what
//! the clients got.

use std::sync::atomic::Ordering;

use lora_hbm::engine::server::LocalServer;
use lora_hbm::engine::setup::{EngineSettings, Loaded};
use lora_sched::Config;
use serde_json::{Value, json};

use crate::openai::{CHAT, COMPLETIONS, answer, events, post};
use crate::support::{MS, config, held, idle, options, site, until};

/// The value of a sample whose line begins with `name`.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_agree_with_what_clients_got() {
    let site = site(Config { max_num_seqs: 8, ..config() }, options(), 1, 1).await;
    let (mut prompt, mut completion, mut sequences, mut refused) = (0, 0, 0, 0);
    let mut all = Vec::new();
    for i in 0..40u64 {
        let n = 1 + i % 2;
        let model = if i % 5 == 4 { "emulated".to_owned() } else { format!("lora-{}", i % 5) };
        let mut body = json!({
            "model": model, "n": n, "max_tokens": 1 + i % 7, "stream": i % 3 == 0,
            "stream_options": {"include_usage": true},
        });
        let path = if i % 4 == 0 { CHAT } else { COMPLETIONS };
        match path {
            CHAT => body["messages"] = json!([{"role": "user", "content": "hello"}]),
            _ => body["prompt"] = json!("x".repeat(5 + i as usize)),
        }
        if i % 10 == 9 {
            body["model"] = json!("nobody");
        }
        let url = site.url.clone();
        all.push(tokio::spawn(async move {
            let response = post(&url, path, &body).await;
            let status = response.status();
            let text = response.text().await.unwrap();
            let last = text.split_terminator("\n\n").filter(|e| *e != "data: [DONE]").last().unwrap();
            let last: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap_or(last)).unwrap();
            (status, n, last["usage"].clone())
        }));
    }
    for one in all {
        let (status, n, usage) = one.await.unwrap();
        if status != 200 {
            refused += 1;
            continue;
        }
        let of = |name: &str| usage[name].as_u64().unwrap();
        sequences += n;
        prompt += of("prompt_tokens") * n;
        completion += of("completion_tokens");
    }
    let engine = site.engine.clone();
    tokio::task::spawn_blocking(move || until(&engine, "idle", idle)).await.unwrap();
    let text = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    let is = |name: &str, value: u64| assert_eq!(sample(&text, name), value as f64, "{name}: {text}");
    assert_eq!(refused, 4);
    is("vllm:prompt_tokens_total", prompt);
    is("vllm:generation_tokens_total", completion);
    is("vllm:request_success_total{model_name=\"emulated\",finished_reason=\"length\"}", sequences);
    for name in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"] {
        is(&format!("vllm:{name}_count"), sequences);
    }
    is("vllm:request_prompt_tokens_sum", prompt);
    is("vllm:request_generation_tokens_sum", completion);
    is("vllm:inter_token_latency_seconds_count", completion - sequences);
    is("lora_hbm:first_tokens_total", sequences);
    let ok = |path: &str| {
        sample(
            &text,
            &format!(
                "lora_hbm:http_responses_total{{model_name=\"emulated\",path=\"{path}\",status=\"200\"}}"
            ),
        )
    };
    assert_eq!(ok(COMPLETIONS) + ok(CHAT), 36.0);
    is("lora_hbm:client_disconnects_total", 0);
    for name in ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"] {
        is(name, 0);
    }
    let parts: f64 = ["front", "queue", "kv", "slot", "swap", "prefill"]
        .iter()
        .map(|p| {
            sample(
                &text,
                &format!("lora_hbm:ttft_part_seconds_total{{model_name=\"emulated\",part=\"{p}\"}}"),
            )
        })
        .sum();
    let ttft = sample(&text, "vllm:time_to_first_token_seconds_sum");
    assert!(parts > 0.0 && parts <= ttft, "delivery comes on top: {parts} {ttft}");
    let info = "vllm:lora_requests_info{model_name=\"emulated\",max_lora=\"2\",running_lora_adapters=\"\",\
                waiting_lora_adapters=\"\"}";
    assert!(sample(&text, info) > 1.6e9);
    let slots = text.lines().filter(|l| l.starts_with("lora_hbm:adapter_resident{")).count();
    assert_eq!(slots, 2);
}

/// A request that there is no room for leaves no trace of itself, however much of it there was room for.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_takes_all_of_a_request_or_nothing() {
    let site = site(Config { max_num_seqs: 1, max_queue: 4, ..config() }, options(), 50, 1).await;
    let send = |body: Value| {
        let url = site.url.clone();
        tokio::spawn(async move { answer(&url, COMPLETIONS, &body).await })
    };
    let wait_for = |running, waiting| {
        let engine = site.engine.clone();
        tokio::task::spawn_blocking(move || {
            until(&engine, "as full as that", |s| (s.running, s.waiting) == (running, waiting));
        })
    };
    // Twenty seconds, in which all that follows is refused.
    let mut answers = vec![send(json!({"prompt": "a", "max_tokens": 400}))];
    wait_for(1, 0).await.unwrap();
    answers.push(send(json!({"prompt": ["b", "cd"], "max_tokens": 1})));
    wait_for(1, 2).await.unwrap();
    let messages = json!([{"role": "user", "content": "a"}]);
    let mut refused = 0;
    for (path, body, sequences) in [
        (COMPLETIONS, json!({"prompt": "abc", "n": 3}), 3),
        (COMPLETIONS, json!({"prompt": ["a", "b", "c"], "stream": true}), 3),
        (COMPLETIONS, json!({"prompt": ["a", "bc"], "n": 2}), 4),
        (CHAT, json!({"messages": messages, "n": 4, "max_tokens": 2}), 4),
        ("/generate", json!({"prompt": "abc", "n": 3}), 3),
    ] {
        let response = post(&site.url, path, &body).await;
        assert_eq!(response.status(), 503, "{path} {body}");
        assert!(response.headers().contains_key("retry-after"));
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["type"], "ServiceUnavailableError", "{error}");
        refused += sequences;
        let stats = site.engine.stats();
        assert_eq!((stats.waiting, stats.accepted, stats.refused), (2, 3, refused), "{path} {body}");
    }
    answers.push(send(json!({"prompt": "e", "n": 2, "max_tokens": 1})));
    wait_for(1, 4).await.unwrap();
    assert_eq!(post(&site.url, COMPLETIONS, &json!({"prompt": "f"})).await.status(), 503);
    refused += 1;
    // What would not fit into an empty queue need not be sent again.
    let never = post(&site.url, COMPLETIONS, &json!({"prompt": "a", "n": 5})).await;
    assert_eq!(never.status(), 400);
    assert_eq!(never.json::<Value>().await.unwrap()["error"]["param"], "n");

    site.times.step.store(MS, Ordering::Relaxed);
    let (mut prompt, mut completion) = (0, 0);
    for (answer, n) in answers.into_iter().zip([1, 1, 2]) {
        let usage = answer.await.unwrap()["usage"].clone();
        prompt += usage["prompt_tokens"].as_u64().unwrap() * n;
        completion += usage["completion_tokens"].as_u64().unwrap();
    }
    let engine = site.engine.clone();
    tokio::task::spawn_blocking(move || until(&engine, "empty", |s| held(s) == [0; 7])).await.unwrap();
    assert_eq!(site.engine.open_requests(), 0);
    let text = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    for (name, value) in [
        ("vllm:prompt_tokens_total", prompt),
        ("vllm:generation_tokens_total", completion),
        ("vllm:request_success_total{model_name=\"emulated\",finished_reason=\"length\"}", 5),
        ("vllm:request_success_total{model_name=\"emulated\",finished_reason=\"abort\"}", 0),
        ("vllm:time_to_first_token_seconds_count", 5),
        ("lora_hbm:requests_refused_total", refused),
        ("lora_hbm:client_disconnects_total", 0),
    ] {
        assert_eq!(sample(&text, name), value as f64, "{name}: {text}");
    }
}

/// A real model with sixteen adapters in four slots.
fn computed() -> LocalServer {
    let loaded = Loaded::load(EngineSettings {
        model: "tiny".into(),
        total_loras: 16,
        gpu_loras: 4,
        ranks: vec![8, 4, 2],
        max_num_seqs: 12,
        max_num_batched_tokens: 128,
        max_model_len: Some(128),
        threads: 1,
        ..EngineSettings::default()
    })
    .unwrap();
    LocalServer::start(&loaded, 4, None).unwrap()
}

/// The same tokens in a stream, in one answer and in a chat, with and without temperature; what is told of a token is
/// the softmax's, so that a prompt's likeliest tokens do not depend on which of them came.
#[test]
fn logprobs_are_told_with_each_token() {
    let server = computed();
    let url = server.url();
    server.block_on(async {
        let body = json!({"model": "lora-9", "prompt": "a b c", "max_tokens": 6, "seed": 3, "logprobs": 20, "stop": "zz"});
        let whole = answer(&url, COMPLETIONS, &body).await;
        let choice = &whole["choices"][0];
        let told = &choice["logprobs"];
        let tokens: Vec<&str> = told["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!((tokens.len(), tokens.concat().as_str()), (6, choice["text"].as_str().unwrap()));
        let offsets: Vec<usize> = (0..6).map(|i| tokens[..i].concat().chars().count()).collect();
        assert_eq!(told["text_offset"], json!(offsets));
        for i in 0..6 {
            let top = told["top_logprobs"][i].as_object().unwrap();
            assert_eq!(top[tokens[i]], told["token_logprobs"][i]);
            let sum: f64 = top.values().map(|p| p.as_f64().unwrap().exp()).sum();
            // Half characters read alike and are one entry.
            assert!((2..=21).contains(&top.len()) && sum < 1.0 + 1e-4, "{sum}: {top:?}");
        }

        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let parts = events(&url, COMPLETIONS, &streamed).await;
        for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let of = |e: &Value| e["choices"][0]["logprobs"][column].as_array().unwrap().clone();
            assert_eq!(json!(parts.iter().flat_map(of).collect::<Vec<_>>()), told[column], "{column}");
        }

        let greedy = json!({"model": "lora-9", "prompt": "a b c", "max_tokens": 1, "temperature": 0, "logprobs": 0});
        let greedy = answer(&url, COMPLETIONS, &greedy).await;
        let told_greedy = &greedy["choices"][0]["logprobs"];
        let token = told_greedy["tokens"][0].as_str().unwrap();
        assert_eq!(told_greedy["top_logprobs"][0].as_object().unwrap().len(), 1);
        assert_eq!(told["top_logprobs"][0][token], told_greedy["token_logprobs"][0]);

        let chat = json!({"model": "lora-9", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4,
            "logprobs": true, "top_logprobs": 2});
        let chat = answer(&url, CHAT, &chat).await;
        let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 4);
        for token in content {
            assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
            assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
            assert!(token["top_logprobs"][0]["logprob"].as_f64() >= token["logprob"].as_f64());
        }
        let unasked = answer(&url, COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1})).await;
        assert_eq!(unasked["choices"][0]["logprobs"], Value::Null);
    });
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emulated_engine_has_no_logprobs() {
    let site = site(config(), options(), 1, 1).await;
    let messages = json!([{"role": "user", "content": "a"}]);
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "a", "logprobs": 1})),
        (CHAT, json!({"messages": messages, "logprobs": true})),
        (CHAT, json!({"messages": messages, "top_logprobs": 1})),
    ] {
        let response = post(&site.url, path, &body).await;
        assert_eq!(response.status(), 400);
        let error: Value = response.json().await.unwrap();
        assert!(error["error"]["param"].as_str().unwrap().ends_with("logprobs"), "{error}");
    }
}

/// Sixty-four requests at once over sixteen adapters, on a real model: each says what it says alone.
#[test]
fn concurrent_requests_say_what_each_says_alone() {
    let server = computed();
    let url = server.url();
    let bodies: Vec<(&str, Value)> = (0..64usize)
        .map(|i| {
            let text = format!("{} of {}", i * i, "words ".repeat(1 + i % 5));
            let mut body = json!({
                "model": format!("lora-{}", i % 16), "max_tokens": 3 + i % 6, "seed": i,
                "temperature": if i % 2 == 0 { 0.0 } else { 0.8 }, "n": 1 + i / 48,
                "stream": i % 3 == 0,
            });
            if i % 4 == 3 {
                body["messages"] = json!([{"role": "user", "content": text}]);
                return (CHAT, body);
            }
            body["prompt"] = json!(text);
            (COMPLETIONS, body)
        })
        .collect();
    let one = |path: &'static str, body: Value| {
        let url = url.clone();
        async move {
            let n = body["n"].as_u64().unwrap() as usize;
            let mut texts = vec![String::new(); n];
            let choices: Vec<Value> = if body["stream"] == true {
                events(&url, path, &body).await.iter().map(|e| e["choices"][0].clone()).collect()
            } else {
                answer(&url, path, &body).await["choices"].as_array().unwrap().clone()
            };
            for choice in choices {
                let text = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
                let text = text.iter().find_map(|t| t.as_str()).unwrap();
                texts[choice["index"].as_u64().unwrap() as usize] += text;
            }
            texts
        }
    };
    server.block_on(async {
        let together = bodies.iter().map(|(path, body)| tokio::spawn(one(path, body.clone())));
        let together: Vec<_> = together.collect();
        let mut said = Vec::new();
        for task in together {
            said.push(task.await.unwrap());
        }
        for ((path, body), together) in bodies.iter().zip(&said) {
            let alone = one(path, body.clone()).await;
            assert!(alone.iter().all(|text| !text.is_empty()));
            assert_eq!(together, &alone, "{path} {body}");
        }
        let different: std::collections::BTreeSet<_> = said.iter().collect();
        assert!(different.len() > 60, "adapters and prompts matter: {}", different.len());
    });
    assert!(server.engine().stats().swaps > 12, "adapters had to take turns");
    server.stop();
}
