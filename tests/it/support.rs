//! An engine whose device waits as long as a test says, and a server in front of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lora_hbm::engine::emulated::EmulatedExecutor;
use lora_hbm::engine::executor::Executor;
use lora_hbm::engine::model::SamplingDefaults;
use lora_hbm::engine::server::{Ended, Limits, Server, ServerInfo, ServerOptions, chat_template};
use lora_hbm::engine::{Engine, EngineConfig, EngineStats, GenerateParams, GenerateRequest};
use lora_hbm::report::decision_log::DecisionLog;
use lora_hbm::workload::tokenizer::Tokenizer;
use lora_sched::{AdapterId, Config, RequestId, StepPlan, SwapPlan};
use tokio::sync::mpsc;

/// Nanoseconds in a millisecond.
pub const MS: u64 = 1_000_000;

/// What has not come by then never comes, however busy the machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A step's time at which the device breaks.
pub const BROKEN: u64 = u64::MAX;

/// How long steps and swaps take, changeable while they run. A step or a swap that has begun keeps its time.
#[derive(Debug, Default)]
pub struct Times {
    /// A step, nanoseconds.
    pub step: AtomicU64,
    /// A swap, nanoseconds.
    pub swap: AtomicU64,
}

/// Four adapters, two slots, up to four sequences of 512 tokens.
pub fn config() -> Config {
    Config {
        max_num_seqs: 4,
        max_num_batched_tokens: 256,
        max_model_len: 512,
        kv_blocks: 128,
        ..Config::with_adapters(4, 2, 8, 1000)
    }
}

/// The letter that the emulated model says at a position: a to z, different for each request.
pub fn letter(id: RequestId, at: u32) -> u32 {
    3 + u32::from(b'a') + (id.0 as u32 * 7 + at) % 26
}

/// An engine of emulated steps and swaps.
pub fn engine(config: Config, step_ms: u64, swap_ms: u64, log: Option<DecisionLog>) -> (Engine, Arc<Times>) {
    let times = Arc::new(Times { step: (step_ms * MS).into(), swap: (swap_ms * MS).into() });
    let (a, b) = (times.clone(), times.clone());
    let costs = (
        move |_: &StepPlan| match a.step.load(Ordering::Relaxed) {
            BROKEN => panic!("the device is broken, as the test wants it"),
            ns => ns,
        },
        move |_: &SwapPlan| b.swap.load(Ordering::Relaxed),
    );
    let executor = EmulatedExecutor::new(costs, letter, 4).unwrap();
    (on(Box::new(executor), config, log), times)
}

/// An engine on a device.
pub fn on(executor: Box<dyn Executor>, config: Config, log: Option<DecisionLog>) -> Engine {
    let config = EngineConfig {
        scheduler: config,
        adapters: None,
        vocab_size: 259,
        eos: vec![2],
        seed: 1,
        warm_up: false,
        log,
    };
    Engine::start(config, executor, Tokenizer::byte_level()).unwrap()
}

/// A request of `prompt` bytes.
pub fn request(prompt: usize, adapter: Option<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: vec![3 + u32::from(b'x'); prompt].into(),
        adapter: adapter.map(AdapterId),
        params: GenerateParams { max_tokens, temperature: 0.0, ..GenerateParams::default() },
        received: None,
    }
}

/// Waits until the engine's state is as wanted; fails with the state when patience ends.
pub fn until(engine: &Engine, what: &str, ok: impl Fn(&EngineStats) -> bool) {
    let begun = Instant::now();
    loop {
        let stats = engine.stats();
        if ok(&stats) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "never {what}: {stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether nothing is left of any request.
pub fn idle(stats: &EngineStats) -> bool {
    (stats.waiting, stats.running, stats.kv_used) == (0, 0, 0)
}

/// Everything that a request can hold.
pub fn held(s: &EngineStats) -> [u64; 7] {
    [s.waiting, s.running, s.kv_used, s.places_used, s.pins, s.swaps_open, s.tracked]
}

/// A server in front of an emulated engine.
pub struct Site {
    pub engine: Arc<Engine>,
    /// How long its steps and swaps take.
    pub times: Arc<Times>,
    pub url: String,
    pub address: std::net::SocketAddr,
    pub stop: mpsc::Sender<()>,
    pub running: tokio::task::JoinHandle<Ended>,
}

/// Options of a server on any free port.
pub fn options() -> ServerOptions {
    ServerOptions {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: None,
        shutdown_timeout: Duration::from_secs(20),
        limits: Limits::default(),
    }
}

/// What the server says about its engine.
pub fn info(config: &Config) -> ServerInfo {
    ServerInfo {
        model: "emulated".into(),
        total_loras: config.adapters.len(),
        gpu_loras: config.gpu_loras,
        dtype: "float32".into(),
        max_num_seqs: config.max_num_seqs,
        max_model_len: config.max_model_len,
        device: "emulated".into(),
        policy: config.policy.to_string(),
        evict: config.evict.to_string(),
        swap_mode: config.swap_mode.to_string(),
        tokenizer: "byte-level".into(),
        ranks: config.adapters.iter().map(|a| a.rank).collect(),
        max_r: 8,
        sampling: SamplingDefaults::default(),
        template: chat_template(&Tokenizer::byte_level()),
    }
}

/// Starts a server whose steps and swaps take this long.
pub async fn site(config: Config, options: ServerOptions, step_ms: u64, swap_ms: u64) -> Site {
    let server = Server::bind(options).await.unwrap();
    let address = server.address();
    let info = info(&config);
    let (engine, times) = engine(config, step_ms, swap_ms, None);
    let engine = Arc::new(engine);
    server.handle().ready(engine.clone(), info);
    let (stop, stops) = mpsc::channel(2);
    let running = tokio::spawn(server.run(stops));
    Site { engine, times, url: format!("http://{address}"), address, stop, running }
}
