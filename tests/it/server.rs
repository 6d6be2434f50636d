//! The HTTP server in front of an emulated engine: the reference's endpoints, what is refused and how,
//! and what a client that goes leaves behind.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lora_hbm::engine::EngineStats;
use lora_hbm::engine::server::{Ended, Server, ServerOptions};
use lora_sched::Config;
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{MS, PATIENCE, Site, config, idle, options, request, site, until};

async fn quick() -> Site {
    site(config(), options(), 1, 1).await
}

async fn post(site: &Site, body: impl Into<reqwest::Body>) -> Response {
    let url = format!("{}/generate", site.url);
    Client::new().post(url).header("content-type", "application/json").body(body).send().await.unwrap()
}

async fn get(site: &Site, path: &str) -> (StatusCode, Value) {
    let response = reqwest::get(format!("{}{path}", site.url)).await.unwrap();
    (response.status(), response.json().await.unwrap())
}

/// Status, parameter and message of a failure in the one shape that they have.
async fn failure(response: Response) -> (u16, Value, String) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    let error = &body["error"];
    assert_eq!(error["code"], status, "{body}");
    assert!(error["type"].as_str().is_some_and(|t| t.ends_with("Error")), "{body}");
    (status, error["param"].clone(), error["message"].as_str().unwrap().to_owned())
}

/// Waits for engine states without holding up the runtime.
async fn reached(site: &Site, what: &'static str, ok: impl Fn(&EngineStats) -> bool + Send + 'static) {
    let engine = site.engine.clone();
    tokio::task::spawn_blocking(move || until(&engine, what, ok)).await.unwrap();
}

async fn until_idle(site: &Site) {
    reached(site, "idle", idle).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_has_the_references_keys() {
    // The step is stalled by what it takes less time than the swap, however late it is submitted.
    let site = site(config(), options(), 1, 200).await;
    let response = post(&site, r#"{"prompt":"hello","model_id":3,"max_tokens":4}"#).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    assert!(response.headers().contains_key("x-request-id"));
    let body: Value = response.json().await.unwrap();
    let text = body["text"][0].as_str().unwrap();
    assert!(text.starts_with("hello") && text.len() == 9, "{body}");
    assert_eq!(body["text"].as_array().unwrap().len(), 1);
    assert_eq!(body["model_id"], 3);
    let (ttft, whole) = (body["ttft"].as_f64().unwrap(), body["completion_time"].as_f64().unwrap());
    assert!(ttft > 0.001 && ttft < whole, "{body}");
    let parts = body["ttft_parts"].as_object().unwrap();
    let sum: f64 = parts.values().map(|v| v.as_f64().unwrap()).sum();
    assert_eq!(parts.len(), 7);
    assert!((sum - ttft).abs() < 1e-9, "{body}");
    assert!(parts["swap"].as_f64().unwrap() > 0.0, "adapter 3 was copied in: {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_one_object_and_one_nul_a_token_with_one_ttft() {
    let site = quick().await;
    let response = post(&site, r#"{"prompt":"say \"hi\"","max_tokens":5,"stream":true}"#).await;
    let bytes = response.bytes().await.unwrap();
    assert_eq!(bytes.last(), Some(&0));
    let messages: Vec<&[u8]> = bytes[..bytes.len() - 1].split(|&b| b == 0).collect();
    assert_eq!(messages.len(), 5);
    let first = std::str::from_utf8(messages[0]).unwrap();
    assert!(first.starts_with(r#"{"text": ["say \"hi\""#), "{first}");
    assert!(first.contains(r#""], "finished": false, "ttft": "#), "{first}");
    let values: Vec<Value> = messages.iter().map(|m| serde_json::from_slice(m).unwrap()).collect();
    assert!(values[0]["ttft"].as_f64().unwrap() > 0.001, "{first}");
    for (i, value) in values.iter().enumerate() {
        assert_eq!(value["text"][0].as_str().unwrap().len(), 8 + i + 1);
        assert_eq!(value["finished"], i == 4);
        assert_eq!(value["ttft"], values[0]["ttft"]);
        assert_eq!(value.get("completion_time").is_some(), i == 4);
        assert_eq!(value.get("ttft_parts").is_some(), i == 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn n_sequences_come_in_one_answer() {
    let site = quick().await;
    let body: Value =
        post(&site, r#"{"prompt":"ab","n":3,"max_tokens":4,"seed":1}"#).await.json().await.unwrap();
    let texts: Vec<&str> = body["text"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert!(texts.len() == 3 && texts.iter().all(|t| t.starts_with("ab") && t.len() == 6), "{body}");
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "the emulated model says another thing to each");
    let streamed = post(&site, r#"{"prompt":"ab","n":3,"max_tokens":4,"stream":true}"#).await;
    let bytes = streamed.bytes().await.unwrap();
    let messages: Vec<&[u8]> = bytes[..bytes.len() - 1].split(|&b| b == 0).collect();
    assert_eq!(messages.len(), 12);
    let finished = |m: &&[u8]| serde_json::from_slice::<Value>(m).unwrap()["finished"] == true;
    assert_eq!(messages.iter().filter(|m| finished(m)).count(), 1, "only when all have ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn state_and_statistics_have_the_references_shapes() {
    let site = quick().await;
    let (status, body) = get(&site, "/health").await;
    assert_eq!((status, &body["status"]), (StatusCode::OK, &json!("ok")));
    for (key, value) in [("total_loras", 4), ("gpu_loras", 2), ("max_num_seqs", 4)] {
        assert_eq!(body["config"][key], value);
    }
    assert!(body["config"]["model"].is_string() && body["config"]["dtype"].is_string());
    assert_eq!(body["config"]["tokenizer"], "byte-level");
    assert!(body["config"]["ranks"].is_array() && body["config"]["max_r"].is_u64(), "{body}");

    let zero =
        json!({"init": {"swap_calls": 1, "swap_count": 2}, "runtime": {"swap_calls": 0, "swap_count": 0}});
    assert_eq!(get(&site, "/swap_stats").await.1, zero);
    post(&site, r#"{"prompt":"a","model_id":2}"#).await;
    assert_eq!(get(&site, "/swap_stats").await.1["runtime"], json!({"swap_calls": 1, "swap_count": 1}));
    let reset = Client::new().post(format!("{}/reset_swap_stats", site.url)).send().await.unwrap();
    let reset: Value = reset.json().await.unwrap();
    assert!(reset["status"] == "ok" && reset["message"].is_string(), "{reset}");
    assert_eq!(get(&site, "/swap_stats").await.1, zero);

    let (_, models) = get(&site, "/v1/models").await;
    assert_eq!(models["data"].as_array().unwrap().len(), 5);
    assert_eq!(models["data"][4]["id"], "lora-3");
    assert_eq!(models["data"][4]["parent"], "emulated");
    let metrics = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    assert!(metrics.contains("vllm:generation_tokens_total{model_name=\"emulated\"} 16\n"), "{metrics}");
    assert!(get(&site, "/version").await.1["version"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_the_page_and_the_dashboard_is_served() {
    let site = quick().await;
    let metrics = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    let served = |name: &str| metrics.contains(&format!("# TYPE {name} "));
    for (file, text) in [
        ("docs/metrics.md", include_str!("../../docs/metrics.md")),
        ("docs/grafana.json", include_str!("../../docs/grafana.json")),
    ] {
        let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c)));
        let mut found = 0;
        for name in words.filter(|w| w.starts_with("vllm:") || w.starts_with("lora_hbm:")) {
            // Beginnings of names, which the page has where it searches for several.
            if name.ends_with([':', '_']) || name == "lora_hbm:swap" {
                continue;
            }
            found += 1;
            assert!(served(name) || served(name.trim_end_matches("_bucket")), "{file} names {name}");
        }
        assert!(found > 10, "{file} names {found} metrics");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_in_one_shape() {
    let site = quick().await;
    let long = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(600));
    for (body, status, param) in [
        (br#"{"prompt":"a""#.to_vec(), 400, json!("body")),
        (b"{\"prompt\":\"\xff\"}".to_vec(), 400, json!("body")),
        (br#"["prompt"]"#.to_vec(), 400, json!("body")),
        (br#"{"model_id":0}"#.to_vec(), 400, json!("prompt")),
        (br#"{"prompt":"a","temperature":"hot"}"#.to_vec(), 400, json!("temperature")),
        (br#"{"prompt":"a","max_tokens":0}"#.to_vec(), 400, json!("max_tokens")),
        (br#"{"prompt":"a","model_id":4}"#.to_vec(), 404, json!("model_id")),
        (br#"{"prompt":"a","model_id":-1}"#.to_vec(), 404, json!("model_id")),
        (long.into_bytes(), 400, json!("prompt")),
    ] {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let (got, got_param, message) = failure(post(&site, body).await).await;
        assert_eq!((got, got_param), (status, param), "{shown}: {message}");
    }
    // The base model is asked for by name of nothing.
    assert_eq!(post(&site, r#"{"prompt":"a","model_id":null}"#).await.status(), 200);

    let (status, _, message) = failure(post(&site, vec![b' '; 9 << 20]).await).await;
    assert_eq!(status, 413, "{message}");
    let client = Client::new();
    let url = |path: &str| format!("{}{path}", site.url);
    assert_eq!(failure(client.get(url("/nothing")).send().await.unwrap()).await.0, 404);
    assert_eq!(failure(client.get(url("/generate")).send().await.unwrap()).await.0, 405);
    let plain = client.post(url("/generate")).header("content-type", "text/plain").body("{}");
    assert_eq!(failure(plain.send().await.unwrap()).await.0, 415);
    for (path, status) in
        [("/adapters/%ff/pin", 400), ("/adapters/%ff/unpin", 400), ("/adapters/nobody/pin", 404)]
    {
        let (got, param, _) = failure(client.post(url(path)).send().await.unwrap()).await;
        assert_eq!((got, param), (status, json!("adapter")), "{path}");
    }
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        for (body, param) in [
            (json!([]), "body"),
            (json!({"lora_path": "/x"}), "lora_name"),
            (json!({"lora_name": 5, "lora_path": "/x"}), "lora_name"),
            (json!({"lora_name": "x", "lora_path": ["/x"]}), "lora_path"),
            (json!({"lora_name": "x", "lora_path": null}), "lora_path"),
        ] {
            if path.contains("unload") && param == "lora_path" {
                continue;
            }
            let (got, found, _) = failure(client.post(url(path)).json(&body).send().await.unwrap()).await;
            assert_eq!((got, found), (400, json!(param)), "{path} {body}");
        }
    }
    assert_eq!(get(&site, "/health").await.0, 200, "and it still serves");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_asked_for_everywhere_but_on_health_and_metrics() {
    let options = ServerOptions { api_key: Some("secret".into()), ..options() };
    let site = site(config(), options, 1, 1).await;
    assert_eq!(failure(post(&site, r#"{"prompt":"a"}"#).await).await.0, 401);
    assert_eq!(get(&site, "/health").await.0, 200);
    let request = Client::new().post(format!("{}/generate", site.url)).bearer_auth("secret");
    let answer = request.header("content-type", "application/json").body(r#"{"prompt":"a"}"#).send().await;
    assert_eq!(answer.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_503_with_retry_after() {
    let config = Config { max_num_seqs: 1, max_queue: 1, ..config() };
    let site = site(config, options(), 200, 1).await;
    let body = r#"{"prompt":"a","max_tokens":100}"#;
    let come = async {
        // The first one runs until all have come.
        reached(&site, "come", |s| s.running + s.waiting + s.refused == 4).await;
        site.times.step.store(MS, Ordering::Relaxed);
    };
    let answers =
        tokio::join!(post(&site, body), post(&site, body), post(&site, body), post(&site, body), come);
    let answers = [answers.0, answers.1, answers.2, answers.3];
    let refused: Vec<_> = answers.iter().filter(|a| a.status() == 503).collect();
    assert!(!refused.is_empty() && refused.len() < 4);
    assert!(refused.iter().all(|a| a.headers().contains_key("retry-after")));
    assert_eq!(site.engine.stats().refused, refused.len() as u64);
}

/// Sends a request and waits for a phase.
async fn sent(site: &Site, body: &str, what: &'static str, phase: fn(&Site) -> bool) -> TcpStream {
    let mut stream = TcpStream::connect(site.address).await.unwrap();
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let begun = Instant::now();
    while !phase(site) {
        assert!(begun.elapsed() < PATIENCE, "never {what}: {:?}", site.engine.stats());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    stream
}

/// Sends a request, waits for a phase, hangs up, and sees that nothing is left.
async fn hang_up(site: &Site, body: &str, what: &'static str, phase: fn(&Site) -> bool) {
    drop(sent(site, body, what, phase).await);
    until_idle(site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_gives_everything_back_in_every_phase() {
    for stream in [true, false] {
        let body =
            |id: u32| format!(r#"{{"prompt":"abc","model_id":{id},"max_tokens":400,"stream":{stream}}}"#);
        let slow_swap = site(config(), options(), 20, 200).await;
        let swapping = |s: &Site| s.engine.swap_stats().runtime.swap_count == 1;
        hang_up(&slow_swap, &body(3), "swapping", swapping).await;
        let slow_step = site(config(), options(), 150, 1).await;
        hang_up(&slow_step, &body(0), "prefilling", |s| s.engine.stats().running == 1).await;
        hang_up(&slow_step, &body(0), "decoding", |s| s.engine.stats().generation_tokens >= 2).await;

        let one = site(Config { max_num_seqs: 1, ..config() }, options(), 150, 1).await;
        let url = format!("{}/generate", one.url);
        let first = Client::new().post(url).json(&json!({"prompt": "a", "max_tokens": 400})).send();
        let first = tokio::spawn(first);
        reached(&one, "running", |s| s.running == 1).await;
        drop(sent(&one, &body(1), "queued", |s| s.engine.stats().waiting == 1).await);
        reached(&one, "gone from the queue", |s| s.waiting == 0).await;
        assert_eq!(one.engine.stats().running, 1, "the other one goes on");
        one.times.step.store(MS, Ordering::Relaxed);
        until_idle(&one).await;
        assert_eq!(first.await.unwrap().unwrap().status(), 200, "the others are not touched");
        assert_eq!(one.engine.stats().cancelled, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_streams_end_and_refuses_new_requests() {
    let options = ServerOptions { shutdown_timeout: PATIENCE, ..options() };
    let site = site(config(), options, 100, 1).await;
    let mut running = post(&site, r#"{"prompt":"a","max_tokens":400,"stream":true}"#).await;
    assert!(running.chunk().await.unwrap().is_some());
    site.stop.send(()).await.unwrap();
    let begun = Instant::now();
    while get(&site, "/health").await.0 == 200 {
        assert!(begun.elapsed() < PATIENCE, "it does not stop");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let health = reqwest::get(format!("{}/health", site.url)).await.unwrap();
    assert!(health.headers().contains_key("retry-after"));
    assert_eq!(failure(health).await, (503, Value::Null, "the server is shutting down".into()));
    let refused = post(&site, r#"{"prompt":"a"}"#).await;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(failure(refused).await.0, 503);
    site.times.step.store(MS, Ordering::Relaxed);
    // A chunk need not be a message.
    let rest = running.bytes().await.unwrap();
    let last = rest.strip_suffix(b"\0").unwrap().rsplit(|&b| b == 0).next().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(last).unwrap()["finished"], true);
    assert_eq!(site.running.await.unwrap(), Ended::Drained);
    assert!(TcpStream::connect(site.address).await.is_err(), "the port is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_an_unload_that_drains() {
    let site = site(config(), options(), 30, 1).await;
    // Not the server's, so that nothing but the unload holds up the stop. Longer than connections get to close.
    let running = site.engine.submit(request(10, Some(1), 100)).unwrap();
    let unload = Client::new().post(format!("{}/v1/unload_lora_adapter", site.url));
    let unload = tokio::spawn(unload.json(&json!({"lora_name": "lora-1"})).send());
    let begun = Instant::now();
    while site.engine.find_adapter("lora-1").is_some() {
        assert!(begun.elapsed() < PATIENCE, "it is not unloaded");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    site.stop.send(()).await.unwrap();
    assert_eq!(site.running.await.unwrap(), Ended::Drained);
    assert!(site.engine.adapters().iter().all(|a| a.name != "lora-1"), "it has gone before the server has");
    assert_eq!(unload.await.unwrap().unwrap().status(), 200);
    assert_eq!(running.wait().unwrap().tokens.len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_stop_or_the_time_out_cuts_off() {
    let body = r#"{"prompt":"a","max_tokens":400,"stream":true}"#;
    let site1 = site(config(), options(), 100, 1).await;
    let _running = post(&site1, body).await;
    site1.stop.send(()).await.unwrap();
    site1.stop.send(()).await.unwrap();
    assert_eq!(site1.running.await.unwrap(), Ended::Cut(1));

    let options = ServerOptions { shutdown_timeout: Duration::from_millis(50), ..options() };
    let site2 = site(config(), options, 100, 1).await;
    let _running = post(&site2, body).await;
    site2.stop.send(()).await.unwrap();
    assert_eq!(site2.running.await.unwrap(), Ended::Cut(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stops_breaks_streams_off_and_says_so() {
    let site = site(config(), options(), 60, 1).await;
    let mut running = post(&site, r#"{"prompt":"a","max_tokens":400,"stream":true}"#).await;
    assert!(running.chunk().await.unwrap().is_some());
    let engine = site.engine.clone();
    tokio::task::spawn_blocking(move || engine.shutdown()).await.unwrap();
    let broken = loop {
        match running.chunk().await {
            Ok(Some(_)) => {}
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(broken, "a cut stream must not look like a whole one");
    assert_eq!(failure(post(&site, r#"{"prompt":"a"}"#).await).await.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn until_the_model_is_loaded_the_server_says_that_it_loads() {
    let server = Server::bind(options()).await.unwrap();
    let address = server.address();
    let again = Server::bind(ServerOptions { port: address.port(), ..options() }).await.unwrap_err();
    assert!(again.to_string().contains(&address.to_string()), "{again}");
    let (_stop, stops) = tokio::sync::mpsc::channel(1);
    tokio::spawn(server.run(stops));
    let health = reqwest::get(format!("http://{address}/health")).await.unwrap();
    assert_eq!(health.status(), 503);
    let health: Value = health.json().await.unwrap();
    assert_eq!((&health["status"], &health["config"]), (&json!("loading"), &Value::Null));
    let error = json!({
        "message": "the model is being loaded", "type": "ServiceUnavailableError", "param": null, "code": 503,
    });
    assert_eq!(health["error"], error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_its_request_in_small_pieces_is_served_and_blocks_nobody() {
    let site = quick().await;
    let mut slow = TcpStream::connect(site.address).await.unwrap();
    let body = r#"{"prompt":"a","max_tokens":1}"#;
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    for piece in format!("{head}{body}").into_bytes().chunks(16) {
        slow.write_all(piece).await.unwrap();
        slow.flush().await.unwrap();
        assert_eq!(get(&site, "/health").await.0, 200);
    }
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"text\": [\"a"), "{answer}");
}
