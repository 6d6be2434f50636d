//! More adapters than host memory holds: what is read from disk is what it was, or is refused.

use lora_hbm::engine::adapters::Tier;
use lora_hbm::engine::server::LocalServer;
use lora_hbm::engine::setup::{EngineSettings, Loaded};
use lora_hbm::engine::{Finish, SubmitError};
use lora_hbm::report::decision_log::DecisionLog;
use lora_hbm::sim::{Recorded, replay};
use lora_sched::{AdapterId, Config, EventError, SwapMode};
use serde_json::json;

use crate::adapter_life::{Logged, ask, peft_folder, post, settings, tokens, view};
use crate::support::{idle, until};

#[test]
fn more_adapters_than_host_memory_holds_are_served_from_disk() {
    let whole = Loaded::load(settings(12, 2)).unwrap().start(2, None).unwrap();
    let expected: Vec<_> = (0..12).map(|i| tokens(&whole, Some(AdapterId(i)))).collect();
    for swap_mode in [SwapMode::Layered, SwapMode::Overlap, SwapMode::Blocking] {
        let logged = Logged::start(EngineSettings { host_loras: Some(3), swap_mode, ..settings(12, 2) });
        let engine = &logged.engine;
        let tiers = |tier| engine.adapters().iter().filter(|a| a.tier == tier).count();
        assert_eq!((tiers(Tier::Slot), tiers(Tier::Host), tiers(Tier::Disk)), (2, 1, 9));
        let bytes = engine.host_bytes();
        // All at once, then again in another order.
        for stride in [1, 5] {
            let order: Vec<_> = (0..24).map(|i| AdapterId(i * stride % 12)).collect();
            let handles: Vec<_> =
                order.iter().map(|&a| engine.submit(ask(Some(a), 24, 12)).unwrap()).collect();
            for (adapter, handle) in order.iter().zip(handles) {
                let out = handle.wait().unwrap();
                assert_eq!(out.tokens, expected[adapter.0 as usize], "{swap_mode}: adapter {adapter}");
                let first = out.first.unwrap();
                assert_eq!(first.parts.total(), first.at - out.received);
            }
            assert!(engine.host_bytes() <= bytes, "never more than three in host memory");
        }
        let stats = engine.stats();
        assert!(stats.fetches >= 9 && stats.fetches_failed == 0, "{stats:?}");
        assert!(stats.fetch_ns > 0 && stats.fetch_bytes == stats.fetches * bytes / 3, "{stats:?}");
        let report = logged.replays();
        assert_eq!(report.fetches as u64, stats.fetches, "{swap_mode}");
    }
}

#[test]
fn a_file_that_has_changed_fails_its_requests_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..4 {
        peft_folder(dir.path(), &format!("p{i}"), 2, i);
    }
    let loaded = Loaded::load(EngineSettings {
        adapters: Some(dir.path().into()),
        host_loras: Some(1),
        ..settings(4, 1)
    });
    let loaded = loaded.unwrap();
    let header = loaded.log_header(1);
    let (log, lines) = DecisionLog::in_memory();
    let server = LocalServer::start(&loaded, 1, Some(log)).unwrap();
    let (url, engine) = (server.url(), server.engine());
    peft_folder(dir.path(), "p2", 2, 99);
    let bad = engine.submit(ask(Some(AdapterId(2)), 24, 12)).unwrap();
    let good = engine.submit(ask(Some(AdapterId(3)), 24, 12)).unwrap();
    let out = bad.wait().unwrap();
    let why = out.failure.unwrap();
    assert!(out.finish == Finish::Abort && out.tokens.is_empty());
    assert!(why.contains("p2") && why.contains("checksum") && why.contains("load it again"), "{why}");
    assert_eq!(good.wait().unwrap().finish, Finish::Length, "others go on");
    assert!(view(engine, "p2").unwrap().failure.is_some_and(|f| f == why));
    let refused = engine.submit(ask(Some(AdapterId(2)), 24, 12)).unwrap().wait().unwrap_err();
    assert_eq!(refused, SubmitError::Refused(EventError::AdapterFailed(AdapterId(2))));
    std::fs::remove_file(dir.path().join("p1/adapter_model.safetensors")).unwrap();
    server.block_on(async {
        let ask = |id: u32| json!({"prompt": "hi", "model_id": id, "max_tokens": 2});
        let (status, said) = post(&url, "/generate", ask(1)).await;
        assert!(status == 500 && said.contains("p1") && said.contains("missing"), "{status} {said}");
        // As it is now, it is an adapter like any other.
        let name = json!({"lora_name": "p2", "lora_path": dir.path().join("p2")});
        assert_eq!(post(&url, "/v1/unload_lora_adapter", name.clone()).await.0, 200);
        assert_eq!(post(&url, "/v1/load_lora_adapter", name).await.0, 200);
        let (status, said) = post(&url, "/generate", ask(4)).await;
        assert_eq!(status, 200, "{said}");
    });
    let stats = engine.stats();
    assert_eq!((stats.failed, stats.fetches_failed), (2, 2), "{stats:?}");
    assert_eq!(stats.refused, 0, "the queue was never full");
    until(engine, "idle", |s| idle(s) && s.fetches_open == 0);
    server.stop();
    let lines = std::mem::take(&mut *lines.lock().unwrap());
    let recorded = Recorded::new(&header, &lines).unwrap();
    let report = replay(&recorded, Config::try_from(&header.config).unwrap()).unwrap();
    assert!(report.holds() && report.fetches >= 4, "{report:#?}");
}
