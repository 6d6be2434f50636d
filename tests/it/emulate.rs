//! `serve --emulate`: an engine whose steps and swaps last what a profile says, decided as the
//! simulator decides.

use std::time::Duration;

use lora_hbm::engine::emulation::Emulation;
use lora_hbm::engine::server::ServerInfo;
use lora_hbm::profile::{CostModel, StepShape};
use lora_hbm::report::decision_log::{DecisionLog, LogLine};
use lora_hbm::sim::{Recorded, replay};
use lora_hbm::workload::tokenizer::Tokenizer;
use lora_sched::{Config, SwapMode};

use crate::oracles::machine;
use crate::support::{idle, request, until};

/// Steps of 1 ms and 10 µs a token, swaps of 3 ms.
fn emulation(swap_mode: SwapMode) -> Emulation {
    let profile = machine(&[("step", 1e6), ("tokens:0-", 1e4), ("decode_context:0-", 100.0)], 3_000_000, 0);
    let config = Config {
        max_num_seqs: 4,
        max_num_batched_tokens: 256,
        max_model_len: 512,
        kv_blocks: 128,
        swap_mode,
        ..Config::with_adapters(8, 2, 8, 1)
    };
    Emulation::new(profile, config, Tokenizer::byte_level(), None, 7)
}

#[test]
fn steps_last_what_the_profile_says_and_decisions_replay() {
    for &mode in SwapMode::ALL {
        let emulation = emulation(mode);
        let header = emulation.log_header();
        let cost = CostModel::new(emulation.profile()).unwrap();
        let (log, lines) = DecisionLog::in_memory();
        let engine = emulation.start(Some(log)).unwrap();
        let handles: Vec<_> = (0..24u32)
            .map(|i| {
                std::thread::sleep(Duration::from_millis(u64::from(i % 4)));
                engine.submit(request(30 + i as usize * 17 % 150, Some(i * 5 % 8), 1 + i % 12)).unwrap()
            })
            .collect();
        for handle in handles {
            assert!(!handle.wait().unwrap().text.is_empty());
        }
        until(&engine, "idle", idle);
        engine.shutdown();
        let recorded = Recorded::new(&header, &lines.lock().unwrap()).unwrap();
        // 156 tokens, four a step at most.
        assert!(recorded.steps.len() > 24 && recorded.swaps.len() > 5);
        for line in lines.lock().unwrap().iter() {
            let LogLine::Step { step, started, ended, seqs, .. } = line else { continue };
            let mut shape = StepShape::default();
            for seq in seqs {
                let (start, len, decode) = (seq.3, seq.4, seq.5);
                shape.tokens += u64::from(len);
                shape.decode_context += if decode { u64::from(start) + 1 } else { 0 };
            }
            let stalled: u64 = recorded.steps[*step as usize].stalled.iter().map(|s| s.1).sum();
            assert_eq!(ended - started, stalled + cost.step_ns(&shape), "{mode}: {line:?}");
        }
        assert!(recorded.swaps.iter().all(|s| s.took >= cost.swap_ns(1)), "{mode}");
        let report = replay(&recorded, recorded.config.clone()).unwrap();
        assert!(report.holds(), "{mode}: {report:#?}");
    }
}

#[test]
fn a_server_says_that_it_emulates() {
    let info: ServerInfo = emulation(SwapMode::Layered).info();
    assert_eq!((info.total_loras, info.gpu_loras, info.max_r), (8, 2, 8));
    assert!(info.device.starts_with("emulated"), "{}", info.device);
    assert_eq!(info.tokenizer, "byte-level");
    assert_eq!(info.total_loras, 8);
}
