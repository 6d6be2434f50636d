//! Clients that go, stall, flood or talk nonsense, and a stop under load: what they leave behind, and what
//! others notice of it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lora_hbm::engine::EngineStats;
use lora_hbm::engine::server::{Limits, ServerOptions};
use lora_sched::Config;
use rand::{RngExt, SeedableRng};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::serve_command::{emulated, metric, signal, start, status, until_metric};
use crate::support::{MS, PATIENCE, Site, config, held, options, site};

/// A request as bytes.
fn request(path: &str, body: &Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

async fn connect(site: &Site) -> TcpStream {
    TcpStream::connect(site.address).await.unwrap()
}

/// Waits for a state of the engine.
async fn wait_for(site: &Site, what: &str, ok: impl Fn(&EngineStats) -> bool) {
    let begun = Instant::now();
    while !ok(&site.engine.stats()) {
        assert!(begun.elapsed() < PATIENCE, "never {what}: {:?}", site.engine.stats());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn nothing_held(site: &Site) {
    // The engine's figures are out before the last answer has been taken off the list.
    wait_for(site, "everything given back", |s| held(s) == [0; 7] && site.engine.open_requests() == 0).await;
}

/// A request of somebody else, which must be answered whatever happens beside it.
async fn is_served(site: &Site) {
    let body = json!({"prompt": "hello", "max_tokens": 2});
    let answer = Client::new().post(format!("{}/v1/completions", site.url)).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["usage"]["completion_tokens"], 2);
}

async fn counter(site: &Site, name: &str) -> f64 {
    let text = reqwest::get(format!("{}/metrics", site.url)).await.unwrap().text().await.unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A step or a swap that is to be met while it lasts, or is long enough for the server to notice something.
const LONG: u64 = 1000 * MS;

/// Hangs up in each phase, with and without a stream.
async fn hang_up_in_every_phase(path: &str) {
    type Phase = (&'static str, fn(&EngineStats, u64) -> bool);
    let (step, swap) = (30, 30);
    let site = site(Config { max_num_seqs: 2, ..config() }, options(), step, swap).await;
    let times = |step: u64, swap: u64| {
        site.times.step.store(step, Ordering::Relaxed);
        site.times.swap.store(swap, Ordering::Relaxed);
    };
    let phases: [Phase; 4] = [
        ("queued", |s, _| s.waiting >= 1 && s.running == 2),
        ("swapping", |s, _| s.swaps_open == 1),
        ("prefilling", |s, before| s.running >= 1 && s.generation_tokens == before),
        ("decoding", |s, before| s.generation_tokens >= before + 3),
    ];
    let mut gone = 0;
    for stream in [true, false] {
        for (phase, reached) in phases {
            let mut others = Vec::new();
            if phase == "queued" {
                for _ in 0..2 {
                    let mut other = connect(&site).await;
                    let body = json!({"prompt": "a", "max_tokens": 400});
                    other.write_all(request("/v1/completions", &body).as_bytes()).await.unwrap();
                    others.push(other);
                }
                wait_for(&site, "busy", |s| s.running == 2).await;
            }
            // An adapter that is in no slot, where a copy is what is wanted, else one that is.
            let resident = |a: u32| {
                site.engine
                    .stats()
                    .slots
                    .contains(&lora_hbm::engine::SlotView::Resident(lora_sched::AdapterId(a)))
            };
            let adapter = (0..4).find(|a| resident(*a) != (phase == "swapping")).unwrap();
            let before = site.engine.stats().generation_tokens;
            // A phase that does not come back is one that lasts.
            times(
                if phase == "prefilling" { LONG } else { step * MS },
                if phase == "swapping" { LONG } else { swap * MS },
            );
            let body = json!({
                "prompt": "abc", "messages": [{"role": "user", "content": "abc"}],
                "model": format!("lora-{adapter}"), "model_id": adapter, "max_tokens": 400, "stream": stream,
            });
            let mut client = connect(&site).await;
            client.write_all(request(path, &body).as_bytes()).await.unwrap();
            wait_for(&site, phase, |s| reached(s, before)).await;
            gone += 1 + others.len() as u64;
            // A step that begins from now on is long enough for the server to notice, on any machine.
            times(LONG, swap * MS);
            let steps = site.engine.stats().steps;
            drop((client, others));
            nothing_held(&site).await;
            let stats = site.engine.stats();
            assert_eq!(stats.cancelled, gone, "{path} {stream} {phase}");
            // The one that was running, and the one that may have begun before the server noticed.
            assert!(stats.steps - steps <= 2, "{path} {stream} {phase}: {} more steps", stats.steps - steps);
            times(step * MS, swap * MS);
            assert_eq!(counter(&site, "lora_hbm:client_disconnects_total").await, gone as f64);
        }
    }
    let info = "vllm:lora_requests_info{model_name=\"emulated\",max_lora=\"2\",running_lora_adapters=\"\",\
                waiting_lora_adapters=\"\"}";
    counter(&site, info).await;
    is_served(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_leaves_nothing_in_any_phase() {
    // Side by side: they wait more than they do.
    let all = ["/v1/completions", "/v1/chat/completions", "/generate"].map(hang_up_in_every_phase);
    futures_util::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_takes_all_its_sequences_with_it() {
    let site = site(config(), options(), 20, 20).await;
    let body =
        json!({"prompt": ["a", "b", "c"], "n": 4, "model": "lora-2", "max_tokens": 400, "stream": true});
    let mut client = connect(&site).await;
    client.write_all(request("/v1/completions", &body).as_bytes()).await.unwrap();
    wait_for(&site, "decoding", |s| s.generation_tokens >= 8 && s.waiting == 8).await;
    drop(client);
    nothing_held(&site).await;
    assert_eq!(site.engine.stats().cancelled, 12);
}

/// Also while the engine has not yet said that it takes the request.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_is_counted_at_whatever_time() {
    let site = site(config(), options(), 5, 5).await;
    let text = request("/v1/completions", &json!({"prompt": "a", "model": "lora-1", "max_tokens": 400}));
    for i in 0..200 {
        let mut client = connect(&site).await;
        client.write_all(text.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_micros(50 * (i % 40))).await;
        drop(client);
    }
    // The last ones may not have been read yet, and who goes is counted here a little after there.
    let begun = Instant::now();
    loop {
        nothing_held(&site).await;
        let counted = counter(&site, "lora_hbm:client_disconnects_total").await;
        let cancelled = site.engine.stats().cancelled;
        if cancelled > 20 && counted == cancelled as f64 {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{cancelled} clients went while their requests were in the engine, and {counted} are counted"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn impatient() -> ServerOptions {
    let limits = Limits {
        // From here the test's own time to send a head is taken as well.
        head: Duration::from_secs(1),
        body_pause: Duration::from_millis(300),
        body: Duration::from_millis(900),
        write: Duration::from_millis(300),
        ..Limits::default()
    };
    ServerOptions { limits, ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_send_slowly_are_cut_off_and_others_are_served() {
    let site = site(config(), impatient(), 1, 1).await;
    // Heads that never end, of which some drip.
    let mut heads = Vec::new();
    for i in 0..20 {
        let mut head = connect(&site).await;
        head.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n").await.unwrap();
        heads.push((head, i % 2 == 0));
    }
    let mut bodies = Vec::new();
    for _ in 0..20 {
        let mut body = connect(&site).await;
        body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
            .await
            .unwrap();
        bodies.push(body);
    }
    is_served(&site).await;
    let drip = |mut stream: TcpStream, drips: bool| async move {
        let mut answer = Vec::new();
        let (mut from, mut to) = stream.split();
        let send = async {
            while drips && to.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = send => unreachable!("it never ends"),
            // A reset is as much of an end.
            _ = from.read_to_end(&mut answer) => String::from_utf8_lossy(&answer).into_owned(),
        }
    };
    let heads = futures_util::future::join_all(heads.into_iter().map(|(s, drips)| drip(s, drips)));
    for answer in heads.await {
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let bodies =
        futures_util::future::join_all(bodies.into_iter().enumerate().map(|(i, s)| drip(s, i % 2 == 0)));
    for answer in bodies.await {
        assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("RequestTimeoutError"), "{answer}");
    }
    is_served(&site).await;
    nothing_held(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_holds_no_place_and_is_cut_off() {
    let config = Config { max_num_seqs: 64, max_model_len: 4096, kv_blocks: 64 * 256, ..config() };
    // 64 sequences of 3,000 events of 200 bytes: more than the kernel's buffers hold long before the engine is done.
    let site = site(config, impatient(), 5, 1).await;
    let body = json!({"prompt": "a", "n": 64, "max_tokens": 3000, "stream": true});
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut deaf = socket.connect(site.address).await.unwrap();
    deaf.write_all(request("/v1/completions", &body).as_bytes()).await.unwrap();
    wait_for(&site, "decoding", |s| s.running == 64 || s.cancelled == 64).await;
    is_served(&site).await;
    nothing_held(&site).await;
    assert_eq!(site.engine.stats().cancelled, 64);
    let mut read = Vec::new();
    // Its end is what the time-out gives it: a reset, or an end before the last event.
    let _ = deaf.read_to_end(&mut read).await;
    assert!(!String::from_utf8_lossy(&read).contains("[DONE]"));
    is_served(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_cost_others_nothing_and_end() {
    // Both ends of each are this process's.
    rlimit::increase_nofile_limit(4096).unwrap();
    // Longer than it takes to open them all.
    let limits = Limits { head: Duration::from_secs(4), ..Limits::default() };
    let site = site(config(), ServerOptions { limits, ..options() }, 1, 1).await;
    let mut idle = Vec::new();
    for i in 0..1000 {
        let mut stream = connect(&site).await;
        // Some have had an answer: each asks at once, before its time for a head can be over.
        if i < 50 {
            stream.write_all(b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            let mut answer = [0; 15];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200 OK");
        }
        idle.push(stream);
    }
    for _ in 0..10 {
        is_served(&site).await;
    }
    for mut stream in idle {
        let mut rest = Vec::new();
        // The server ends it; nobody would wait for that longer than the test may take.
        let _ = stream.read_to_end(&mut rest).await;
    }
    is_served(&site).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gigabyte_is_refused_and_not_kept() {
    let site = site(config(), options(), 1, 1).await;
    for chunked in [false, true] {
        let mut stream = connect(&site).await;
        let framing = if chunked { "transfer-encoding: chunked" } else { "content-length: 1073741824" };
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        let piece = vec![b' '; 1 << 20];
        let send = async {
            for sent in 0..1024 {
                let size = if chunked { format!("{:x}\r\n", piece.len()) } else { String::new() };
                let end: &[u8] = if chunked { b"\r\n" } else { b"" };
                let all = [size.as_bytes(), &piece, end].concat();
                if to.write_all(&all).await.is_err() {
                    return sent;
                }
                if sent == 4 {
                    is_served(&site).await;
                }
            }
            1024
        };
        let mut answer = Vec::new();
        let read = async {
            // A reset may come after the answer.
            let mut piece = [0; 4096];
            while let Ok(n) = from.read(&mut piece).await {
                if n == 0 {
                    break;
                }
                answer.extend_from_slice(&piece[..n]);
            }
        };
        let (sent, ()) = tokio::join!(send, read);
        assert!(sent < 200, "it stopped taking it after {sent} MiB");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("RequestTooLargeError"), "{answer}");
    }
    // One that asks before it sends is told at once.
    let mut polite = connect(&site).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 1073741824\r\n\r\n";
    polite.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    polite.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    is_served(&site).await;
}

/// The most memory that a process has had, in MiB, where the system tells it.
fn peak_mib(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? / 1024)
}

#[test]
fn a_prompt_that_is_too_long_is_not_copied_for_each_sequence() {
    let (serve, _) = start(&["--total-loras", "2", "--gpu-loras", "2", "--kv-memory", "64MiB"]);
    let before = peak_mib(serve.child.id());
    let text = "a".repeat(7 << 20);
    let messages = json!([{"role": "user", "content": text}]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for path in ["/v1/completions", "/v1/chat/completions", "/generate"] {
        let mut body = json!({"n": 64, "max_tokens": 4});
        match path {
            "/v1/chat/completions" => body["messages"] = messages.clone(),
            _ => body["prompt"] = json!(text),
        }
        let sent = Client::new().post(format!("{}{path}", serve.url)).json(&body).send();
        assert_eq!(runtime.block_on(sent).unwrap().status(), 400, "{path}");
    }
    // Sixty-four copies of its ids are 1,800 MiB.
    if let Some((before, after)) = before.zip(peak_mib(serve.child.id())) {
        assert!(after - before < 500, "{before} MiB before and {after} MiB after");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_answered_with_an_error_or_a_close() {
    let site = site(config(), impatient(), 1, 1).await;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let whole = request("/v1/completions", &json!({"prompt": "hello", "max_tokens": 2})).into_bytes();
    for round in 0..120 {
        let bytes: Vec<u8> = match round % 3 {
            // Noise.
            0 => (0..rng.random_range(1..2000)).map(|_| rng.random()).collect(),
            // A request with some bytes changed.
            1 => {
                let mut bytes = whole.clone();
                for _ in 0..rng.random_range(1..8) {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
                bytes
            }
            // A whole head and noise for a body.
            _ => {
                let noise: Vec<u8> = (0..64).map(|_| rng.random()).collect();
                [b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: 64\r\n\r\n", &noise[..]].concat()
            }
        };
        let mut stream = connect(&site).await;
        // The server may close before all is sent.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        let fine = round % 3 == 1 && answer.starts_with("HTTP/1.1 200");
        assert!(fine || answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{round}: {answer}");
        if round % 20 == 0 {
            is_served(&site).await;
        }
    }
    nothing_held(&site).await;
    is_served(&site).await;
}

/// Reads a stream to its end. `Err` is the status of a request that was not taken.
async fn stream(client: Client, url: String, i: usize) -> Result<String, u16> {
    let body = json!({
        "model": format!("lora-{}", i % 8), "prompt": format!("request {i}"), "max_tokens": 400, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let response = client.post(format!("{url}/v1/completions")).json(&body).send().await.unwrap();
    if response.status() != 200 {
        assert!(response.headers().contains_key("retry-after"));
        let status = response.status().as_u16();
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["type"], "ServiceUnavailableError");
        return Err(status);
    }
    Ok(response.text().await.unwrap())
}

#[test]
fn sigterm_under_load_lets_streams_end_whole_and_refuses_the_rest() {
    // Steps of 1 ms for 400 tokens of eight adapters in two slots: the last stream ends seconds after the signal.
    let dir = tempfile::tempdir().unwrap();
    let machine = emulated(dir.path(), &[("step", 1e6)], 1_000_000);
    let flags = ["--total-loras", "8", "--gpu-loras", "2", "--shutdown-timeout", "100"];
    let (mut serve, _) = start(&[&flags[..], &["--emulate", machine.to_str().unwrap()]].concat());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let url = serve.url.clone();
    let client = Client::new();
    let accepted: Vec<_> = (0..24).map(|i| runtime.spawn(stream(client.clone(), url.clone(), i))).collect();
    // All are in before the signal, and few have ended by then.
    let asked: usize = (0..24).map(|i| format!("request {i}").len() + 1).sum();
    until_metric(&url, "vllm:prompt_tokens_total", |n| n >= asked as f64);
    assert!(metric(&url, "vllm:num_requests_running") > 0.0);
    signal(&serve, "-TERM");
    let health =
        |url: &str| runtime.block_on(async { reqwest::get(format!("{url}/health")).await.unwrap().status() });
    while health(&url) == 200 {
        std::thread::sleep(Duration::from_millis(1));
    }
    for i in 0..5 {
        assert_eq!(runtime.block_on(stream(client.clone(), url.clone(), i)), Err(503));
    }
    for task in accepted {
        let text = runtime.block_on(task).unwrap().unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        assert!(text.contains("\"completion_tokens\":400") && !text.contains("\"error\""), "{text}");
    }
    assert_eq!(status(&mut serve), 0);
}
