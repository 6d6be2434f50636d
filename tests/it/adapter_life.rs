//! Adapters that are loaded, unloaded and pinned while others are served, on the `tiny` model's CPU engine:
//! nobody else notices, memory comes back, and the simulator does it all again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use lora_hbm::engine::adapters::{AdapterView, Tier};
use lora_hbm::engine::server::LocalServer;
use lora_hbm::engine::setup::{DeviceKind, EngineSettings, Loaded};
use lora_hbm::engine::{AdapterError, Engine, Finish, GenerateParams, GenerateRequest, SubmitError};
use lora_hbm::report::decision_log::{DecisionLog, LogHeader, LogLine};
use lora_hbm::sim::{Recorded, ReplayReport, replay};
use lora_sched::{AdapterId, Config, EventError, SwapMode};
use reqwest::Client;
use serde_json::{Value, json};

use crate::support::{PATIENCE, idle, until};

/// Writes a PEFT folder for `tiny` that adapts the query of each layer.
pub fn peft_folder(parent: &Path, name: &str, rank: usize, seed: usize) -> PathBuf {
    let folder = parent.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 64 * rank});
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    for layer in 0..3 {
        let stem = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        for (half, rows, columns) in [("lora_A", rank, 256), ("lora_B", 128, rank)] {
            let value =
                |i: usize| (((i * 7919 + seed * 104_729 + layer * 31) % 997) as f32 / 997.0 - 0.5) * 0.4;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
            tensors.insert(format!("{stem}.{half}.weight"), tensor);
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
    folder
}

pub fn settings(total_loras: usize, gpu_loras: usize) -> EngineSettings {
    EngineSettings {
        model: "tiny".into(),
        device: DeviceKind::Cpu,
        total_loras,
        gpu_loras,
        max_r: 4,
        max_num_seqs: 8,
        max_num_batched_tokens: 256,
        max_model_len: Some(512),
        kv_memory: Some(64 << 20),
        threads: 1,
        ..EngineSettings::default()
    }
}

/// An engine with a log.
pub struct Logged {
    pub engine: Arc<Engine>,
    header: LogHeader,
    lines: Arc<Mutex<Vec<LogLine>>>,
}

impl Logged {
    pub fn start(settings: EngineSettings) -> Self {
        let gpu_loras = settings.gpu_loras;
        let loaded = Loaded::load(settings).unwrap();
        let header = loaded.log_header(gpu_loras);
        let (log, lines) = DecisionLog::in_memory();
        Self { engine: Arc::new(loaded.start(gpu_loras, Some(log)).unwrap()), header, lines }
    }

    /// Ends the engine; its log must replay.
    pub fn replays(self) -> ReplayReport {
        until(&self.engine, "idle", |s| idle(s) && s.swaps_open + s.fetches_open == 0);
        self.engine.shutdown();
        assert_eq!(self.engine.failure(), None);
        let lines = std::mem::take(&mut *self.lines.lock().unwrap());
        let recorded = Recorded::new(&self.header, &lines).unwrap();
        let report = replay(&recorded, Config::try_from(&self.header.config).unwrap()).unwrap();
        assert!(report.holds(), "{report:#?}");
        report
    }
}

pub fn ask(adapter: Option<AdapterId>, prompt: usize, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: (0..prompt as u32).map(|i| 40 + (i * 13) % 60).collect(),
        adapter,
        params: GenerateParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            ..GenerateParams::default()
        },
        received: None,
    }
}

/// The greedy tokens of a request that must come to its end.
pub fn tokens(engine: &Engine, adapter: Option<AdapterId>) -> Vec<u32> {
    let out = engine.submit(ask(adapter, 24, 12)).unwrap().wait().unwrap();
    assert_eq!((out.finish, out.failure), (Finish::Length, None));
    out.tokens
}

pub fn view(engine: &Engine, name: &str) -> Option<AdapterView> {
    engine.adapters().into_iter().find(|a| a.name == name)
}

/// Waits for a view; fails with what there is when patience ends.
fn until_view(engine: &Engine, name: &str, ok: impl Fn(&AdapterView) -> bool) -> AdapterView {
    let begun = Instant::now();
    loop {
        let found = view(engine, name);
        if let Some(found) = found.clone().filter(|v| ok(v)) {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{name} is {found:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn in_slots(engine: &Engine) -> usize {
    engine.adapters().iter().filter(|a| a.slot.is_some()).count()
}

pub async fn post(url: &str, path: &str, body: Value) -> (u16, String) {
    let response = Client::new().post(format!("{url}{path}")).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

async fn get(url: &str, path: &str) -> Value {
    reqwest::get(format!("{url}{path}")).await.unwrap().json().await.unwrap()
}

#[test]
fn an_adapter_is_loaded_served_and_unloaded_over_http() {
    let dir = tempfile::tempdir().unwrap();
    let good = peft_folder(dir.path(), "mine", 3, 1);
    let large = peft_folder(dir.path(), "large", 8, 2);
    let other = peft_folder(dir.path(), "other", 2, 3);
    let tensors: HashMap<String, Tensor> = [("lora_A", [2, 64]), ("lora_B", [128, 2])]
        .map(|(half, shape)| {
            let name = format!("base_model.model.model.layers.0.self_attn.q_proj.{half}.weight");
            (name, Tensor::zeros(&shape[..], candle_core::DType::F32, &Device::Cpu).unwrap())
        })
        .into();
    candle_core::safetensors::save(&tensors, other.join("adapter_model.safetensors")).unwrap();

    let loaded = Loaded::load(settings(3, 2)).unwrap();
    let server = LocalServer::start(&loaded, 2, None).unwrap();
    let (url, engine) = (server.url(), server.engine());
    let before = engine.host_bytes();
    server.block_on(async {
        let load = |name: &str, path: &Path| json!({"lora_name": name, "lora_path": path, "extra": 1});
        let path = "/v1/load_lora_adapter";
        let (status, said) = post(&url, path, load("mine", &good)).await;
        assert_eq!((status, said.as_str()), (200, "Success: LoRA adapter 'mine' added successfully."));
        for (name, folder, status, says) in [
            ("mine", &good, 400, "already been loaded"),
            ("lora-1", &good, 400, "already been loaded"),
            ("tiny", &good, 400, "base model"),
            ("", &good, 400, "empty"),
            ("x", &dir.path().join("nothing"), 404, "no such folder"),
            ("x", &large, 400, "rank 8"),
            ("x", &other, 400, "shape"),
            ("x", &dir.path().to_path_buf(), 400, "adapter_config.json"),
        ] {
            let (found, said) = post(&url, path, load(name, folder)).await;
            assert!(found == status && said.contains(says), "{name} {}: {found} {said}", folder.display());
            let error: Value = serde_json::from_str(&said).unwrap();
            assert_eq!(error["error"]["code"], status);
        }
        assert_eq!(post(&url, path, json!({"lora_name": "x"})).await.0, 400);

        let models = get(&url, "/v1/models").await;
        let mine = models["data"].as_array().unwrap().last().unwrap().clone();
        assert_eq!((&mine["id"], &mine["parent"]), (&json!("mine"), &json!("tiny")));
        assert_eq!(mine["root"], good.to_str().unwrap());
        let answer = post(&url, "/generate", json!({"prompt": "hi", "model_id": 3, "max_tokens": 4})).await;
        assert_eq!(answer.0, 200, "{}", answer.1);
        // A step that waits for a layer may see the last one, and end, before the copy is said to be whole.
        let begun = Instant::now();
        let listed = loop {
            let listed = get(&url, "/adapters").await;
            let mine = &listed["data"][3];
            if (&mine["tier"], &mine["swaps"]) == (&json!("slot"), &json!(1)) {
                break listed;
            }
            assert!(begun.elapsed() < PATIENCE, "{listed}");
        };
        let mine = &listed["data"][3];
        for (key, value) in [
            ("id", json!("mine")),
            ("model_id", json!(3)),
            ("rank", json!(3)),
            ("bytes", json!(3 * 3 * (256 + 128) * 4)),
            ("pinned_by", json!(0)),
            ("user_pinned", json!(false)),
            ("requests", json!(1)),
            ("hits", json!(0)),
            ("error", Value::Null),
        ] {
            assert_eq!(mine[key], value, "{key}: {mine}");
        }
        assert!(mine["slot"].is_u64() && mine["last_used_s"].is_f64(), "{mine}");
        assert_eq!(listed["data"][2]["last_used_s"], Value::Null);

        let unload = |name: &str| json!({"lora_name": name});
        let path = "/v1/unload_lora_adapter";
        let (status, said) = post(&url, path, unload("mine")).await;
        assert_eq!((status, said.as_str()), (200, "Success: LoRA adapter 'mine' removed successfully."));
        let (status, said) = post(&url, path, unload("mine")).await;
        assert!(status == 404 && said.contains("'mine' cannot be found"), "{status} {said}");
        let gone = post(&url, "/generate", json!({"prompt": "hi", "model_id": 3})).await;
        assert_eq!(gone.0, 404, "{}", gone.1);
        assert_eq!(get(&url, "/adapters").await["data"].as_array().unwrap().len(), 3);
        assert_eq!(get(&url, "/v1/models").await["data"].as_array().unwrap().len(), 4);
    });
    assert_eq!((engine.host_bytes(), in_slots(engine)), (before, 1), "its slot is free");
}

#[test]
fn pins_keep_an_adapter_and_leave_a_slot_to_others() {
    let loaded = Loaded::load(settings(4, 2)).unwrap();
    let server = LocalServer::start(&loaded, 2, None).unwrap();
    let (url, engine) = (server.url(), server.engine());
    server.block_on(async {
        let (status, said) = post(&url, "/adapters/lora-3/pin", json!(null)).await;
        let pinned: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((status, &pinned["user_pinned"], &pinned["id"]), (200, &json!(true), &json!("lora-3")));
        let (status, said) = post(&url, "/adapters/1/pin", json!(null)).await;
        assert!(status == 409 && said.contains("no slot"), "{status} {said}");
        assert_eq!(post(&url, "/adapters/nobody/pin", json!(null)).await.0, 404);
    });
    let there = until_view(engine, "lora-3", |v| v.tier == Tier::Slot);
    for i in [0, 1, 2, 0, 1, 2] {
        tokens(engine, Some(AdapterId(i)));
        let now = view(engine, "lora-3").unwrap();
        assert_eq!((now.tier, now.slot, now.swaps), (Tier::Slot, there.slot, 1));
    }
    server.block_on(async {
        assert_eq!(post(&url, "/adapters/lora-3/unpin", json!(null)).await.0, 200);
        assert_eq!(post(&url, "/adapters/lora-1/pin", json!(null)).await.0, 200);
        assert_eq!(post(&url, "/v1/unload_lora_adapter", json!({"lora_name": "lora-1"})).await.0, 200);
        // Who has gone pins nothing.
        assert_eq!(post(&url, "/adapters/lora-2/pin", json!(null)).await.0, 200);
    });
}

#[test]
fn an_adapter_in_use_is_drained_and_its_name_can_be_had_again() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (peft_folder(dir.path(), "a", 2, 1), peft_folder(dir.path(), "b", 4, 2));
    let logged = Logged::start(EngineSettings { max_model_len: Some(4096), ..settings(2, 2) });
    let engine = &logged.engine;
    let before = engine.host_bytes();
    let id = engine.load_adapter("mine", &first).unwrap();
    assert_eq!(id, AdapterId(2));
    let alone = tokens(engine, Some(id));
    assert_ne!(alone, tokens(engine, None), "the adapter changes what is said");

    // Longer than all that follows, whoever has to wait for a core.
    let long = engine.submit(ask(Some(id), 24, 3000)).unwrap();
    until_view(engine, "mine", |v| v.pinned_by == 1);
    let unloading = engine.unload_adapter("mine").unwrap();
    let refused = engine.submit(ask(Some(id), 24, 1)).unwrap_err();
    assert_eq!(refused, SubmitError::Refused(EventError::UnknownAdapter(id)));
    assert!(matches!(engine.unload_adapter("mine"), Err(AdapterError::Unknown { .. })));
    assert!(matches!(engine.load_adapter("mine", &second), Err(AdapterError::Leaving { .. })));
    let out = long.wait().unwrap();
    assert_eq!((out.finish, out.tokens.len()), (Finish::Length, 3000), "what was begun is ended");
    assert_eq!(out.tokens[..12], alone[..]);
    assert_eq!(unloading.wait().unwrap(), id);
    assert_eq!((view(engine, "mine"), engine.host_bytes()), (None, before));

    let again = engine.load_adapter("mine", &second).unwrap();
    assert_eq!(again, AdapterId(3), "numbers are not given again");
    let other = tokens(engine, Some(again));
    assert_ne!(other, alone, "another adapter under the same name");
    engine.unload_adapter("mine").unwrap().wait().unwrap();
    let third = engine.load_adapter("mine", &first).unwrap();
    assert_eq!(tokens(engine, Some(third)), alone, "what was loaded first, loaded again");
    engine.unload_adapter("mine").unwrap().wait().unwrap();
    assert_eq!(engine.host_bytes(), before);
    let report = logged.replays();
    assert!(report.swaps >= 3, "{report:?}");
}

#[test]
fn of_sixty_four_callers_one_loads_and_one_unloads() {
    let dir = tempfile::tempdir().unwrap();
    let folder = peft_folder(dir.path(), "a", 2, 1);
    let logged = Logged::start(settings(2, 2));
    let engine = &logged.engine;
    let before = engine.host_bytes();
    for round in 0..3 {
        let race = |call: &(dyn Fn() -> Result<(), AdapterError> + Sync)| {
            let results: Vec<_> = std::thread::scope(|scope| {
                let callers: Vec<_> = (0..64).map(|_| scope.spawn(call)).collect();
                callers.into_iter().map(|c| c.join().unwrap()).collect()
            });
            let (made, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
            assert_eq!(made.len(), 1, "round {round}: {refused:?}");
            refused.into_iter().map(Result::unwrap_err).collect::<Vec<_>>()
        };
        let refused = race(&|| engine.load_adapter("mine", &folder).map(drop));
        assert!(refused.iter().all(|e| matches!(e, AdapterError::Duplicate { .. })), "{refused:?}");
        assert_eq!(engine.adapter_count(), 3);
        tokens(engine, engine.find_adapter("mine"));
        let refused = race(&|| engine.unload_adapter("mine")?.wait().map(drop));
        assert!(refused.iter().all(|e| matches!(e, AdapterError::Unknown { .. })), "{refused:?}");
        assert_eq!((engine.adapter_count(), engine.host_bytes()), (2, before));
    }
    logged.replays();
}

/// Loads and unloads of one name over HTTP, all at once: whatever their order, a load finds the name free and an unload
/// finds it taken.
#[test]
fn of_sixty_four_loads_over_http_one_succeeds_at_a_time() {
    const LOAD: &str = "/v1/load_lora_adapter";
    const UNLOAD: &str = "/v1/unload_lora_adapter";
    let dir = tempfile::tempdir().unwrap();
    let folder = peft_folder(dir.path(), "a", 2, 1);
    let loaded = Loaded::load(settings(2, 2)).unwrap();
    let server = LocalServer::start(&loaded, 2, None).unwrap();
    let (url, engine) = (server.url(), server.engine());
    let before = engine.host_bytes();
    server.block_on(async {
        let mut answers: HashMap<(&str, u16), usize> = HashMap::new();
        for unloads in [0, 16, 64] {
            let calls = (0..64 + unloads).map(|i| {
                // Unloads stand among the loads.
                let path = if i % 2 == 1 && i / 2 < unloads { UNLOAD } else { LOAD };
                let (url, body) = (url.clone(), json!({"lora_name": "mine", "lora_path": folder}));
                tokio::spawn(async move { (path, post(&url, path, body).await) })
            });
            let mut made = HashMap::from([(LOAD, 0), (UNLOAD, 0)]);
            for call in calls.collect::<Vec<_>>() {
                let (path, (status, said)) = call.await.unwrap();
                let refusal = if path == LOAD { 400 } else { 404 };
                assert!(status == 200 || status == refusal, "{path}: {status} {said}");
                *made.entry(path).or_default() += usize::from(status == 200);
                *answers.entry((path, status)).or_default() += 1;
            }
            let there = usize::from(engine.find_adapter("mine").is_some());
            assert_eq!(made[LOAD], made[UNLOAD] + there, "{unloads} unloads");
            assert!(made[LOAD] > 0 && (unloads > 0 || made[LOAD] == 1), "{made:?}");
            assert_eq!(engine.adapter_count(), 2 + there);
            if there > 0 {
                assert_eq!(post(&url, UNLOAD, json!({"lora_name": "mine"})).await.0, 200);
                *answers.entry((UNLOAD, 200)).or_default() += 1;
            }
            assert_eq!((engine.adapter_count(), engine.host_bytes()), (2, before), "{unloads} unloads");
        }
        let metrics = reqwest::get(format!("{url}/metrics")).await.unwrap().text().await.unwrap();
        for ((path, status), count) in answers {
            let name = "lora_hbm:http_responses_total{model_name=\"tiny\"";
            let line = format!("{name},path=\"{path}\",status=\"{status}\"}} {count}\n");
            assert!(metrics.contains(&line), "{line}: {metrics}");
        }
        assert!(metrics.contains("lora_hbm:adapters{model_name=\"tiny\"} 2\n"), "{metrics}");
    });
    server.stop();
}

/// Unloads of one run.
const ENOUGH: usize = 12;

/// Callers that load, use and unload four names as they like, 64 at once, beside others that only generate.
fn loads_and_unloads_under_traffic(settings: EngineSettings) {
    let dir = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..4).map(|i| peft_folder(dir.path(), &format!("f{i}"), 1 + i % 4, i)).collect();
    let said = format!("{} {:?}", settings.swap_mode, settings.host_loras);
    let logged = Logged::start(settings);
    let engine = &logged.engine;
    let before = (engine.host_bytes(), engine.adapter_count());
    let expected: Vec<_> = (0..4).map(|i| tokens(engine, Some(AdapterId(i)))).collect();
    let done = AtomicBool::new(false);
    let [loads, unloads, used, gone] = [const { AtomicUsize::new(0) }; 4];
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..4)
            .map(|i| {
                let (expected, done) = (&expected[i], &done);
                scope.spawn(move || {
                    let mut served = 0;
                    while !done.load(Ordering::SeqCst) || served == 0 {
                        assert_eq!(&tokens(engine, Some(AdapterId(i as u32))), expected, "another's output");
                        served += 1;
                    }
                })
            })
            .collect();
        let callers: Vec<_> = (0..64)
            .map(|i| {
                let (folders, loads, unloads, used, gone) = (&folders, &loads, &unloads, &used, &gone);
                scope.spawn(move || {
                    // Until enough has happened, however fast this machine is.
                    for round in 0.. {
                        if unloads.load(Ordering::SeqCst) >= ENOUGH {
                            break;
                        }
                        std::thread::sleep(Duration::from_micros(200));
                        let name = format!("n{}", (i + round) % 4);
                        match engine.load_adapter(&name, &folders[(i * 5 + round) % 4]) {
                            Ok(_) => _ = loads.fetch_add(1, Ordering::SeqCst),
                            Err(AdapterError::Duplicate { .. } | AdapterError::Leaving { .. }) => {}
                            Err(other) => panic!("{other}"),
                        }
                        if let Some(id) = engine.find_adapter(&name) {
                            match engine.submit(ask(Some(id), 10, 4)).map(|h| h.wait()) {
                                Ok(Ok(out)) => {
                                    assert_eq!((out.finish, out.tokens.len()), (Finish::Length, 4));
                                    used.fetch_add(1, Ordering::SeqCst);
                                }
                                // Unloaded between the look and the request.
                                Ok(Err(SubmitError::Refused(EventError::UnknownAdapter(_))))
                                | Err(SubmitError::Refused(EventError::UnknownAdapter(_))) => {
                                    gone.fetch_add(1, Ordering::SeqCst);
                                }
                                other => panic!("{other:?}"),
                            }
                        }
                        if (i + round) % 3 > 0 {
                            match engine.unload_adapter(&name).map(|p| p.wait()) {
                                Ok(Ok(_)) => _ = unloads.fetch_add(1, Ordering::SeqCst),
                                Err(AdapterError::Unknown { .. }) => {}
                                other => panic!("{other:?}"),
                            }
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = callers.into_iter().map(|c| c.join()).collect();
        done.store(true, Ordering::SeqCst);
        for result in results.into_iter().chain(others.into_iter().map(|o| o.join())) {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let [loads, unloads, used] = [loads, unloads, used].map(AtomicUsize::into_inner);
    assert!(loads >= unloads && unloads >= ENOUGH && used > 0, "{said}: {loads}, {unloads}, {used}");
    assert_eq!(engine.adapter_count(), before.1 + loads - unloads, "{said}");
    for i in 0..4 {
        // Those that nobody has unloaded.
        if let Ok(pending) = engine.unload_adapter(&format!("n{i}")) {
            pending.wait().unwrap();
        }
    }
    assert_eq!(engine.adapter_count(), before.1, "{said}");
    if engine.scheduler_config().host_loras.is_none() {
        assert_eq!(engine.host_bytes(), before.0, "{said}");
    }
    let requests: u64 = engine.adapters().iter().map(|a| a.requests).sum();
    let stats = engine.stats();
    assert!(requests < stats.accepted, "{said}: those of the unloaded adapters are gone with them");
    assert_eq!((stats.failed, stats.cancelled), (0, 0), "{said}");
    let report = logged.replays();
    assert!(report.steps > 100 && report.swaps > 4, "{said}: {report:?}");
}

#[test]
fn others_do_not_notice_loads_and_unloads() {
    for swap_mode in [SwapMode::Layered, SwapMode::Overlap, SwapMode::Blocking] {
        loads_and_unloads_under_traffic(EngineSettings { swap_mode, ..settings(4, 3) });
    }
    loads_and_unloads_under_traffic(EngineSettings { host_loras: Some(3), prefetch: 2, ..settings(4, 3) });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emulated_engine_lists_and_pins_and_takes_no_files() {
    use crate::support::{config, options, site};
    let site = site(config(), options(), 1, 1).await;
    let dir = tempfile::tempdir().unwrap();
    let body = json!({"lora_name": "x", "lora_path": dir.path()});
    let (status, said) = post(&site.url, "/v1/load_lora_adapter", body).await;
    assert!(status == 400 && said.contains("emulates"), "{status} {said}");
    assert_eq!(post(&site.url, "/adapters/lora-2/pin", json!(null)).await.0, 200);
    assert_eq!(post(&site.url, "/v1/unload_lora_adapter", json!({"lora_name": "lora-0"})).await.0, 200);
    let listed = get(&site.url, "/adapters").await;
    let names: Vec<_> =
        listed["data"].as_array().unwrap().iter().map(|a| a["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["lora-1", "lora-2", "lora-3"]);
}
