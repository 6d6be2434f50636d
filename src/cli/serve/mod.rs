//! `lora-hbm serve`.

mod flags;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::failure::Failure;
use super::settings::Context;
use crate::engine::Engine;
use crate::engine::emulation::Emulation;
use crate::engine::server::{Ended, Limits, Server, ServerInfo, ServerOptions};
use crate::engine::setup::{EngineSettings, Loaded, SetupError};
use crate::report::decision_log::DecisionLog;
use crate::report::files::{check_writable, is_begun};
pub use flags::ServeArgs;
use flags::{ServeSettings, seconds};

/// Open files that are asked for; the system's hard limit is never passed.
const OPEN_FILES: u64 = 1 << 16;

pub fn run(args: &ServeArgs, ctx: &Context) -> Result<(), Failure> {
    let mut settings: ServeSettings = ctx.resolve("serve", args)?;
    if args.api_key.is_none() {
        // Settings from the environment are read as what they look like; a key is always text.
        settings.api_key = std::env::var("LORA_HBM_API_KEY").ok().or(settings.api_key);
    }
    let what = match &settings.emulate {
        Some(profile) => What::Emulated(Box::new(settings.emulated(profile)?)),
        None => {
            let engine = settings.engine()?;
            engine.check().map_err(Failure::usage)?;
            What::Engine(Box::new(engine))
        }
    };
    if let Some(path) = &settings.decision_log {
        check_new(path)?;
    }
    let options = ServerOptions {
        host: settings.host.clone(),
        port: settings.port,
        api_key: settings.api_key.clone(),
        shutdown_timeout: seconds("--shutdown-timeout", settings.shutdown_timeout)?,
        limits: Limits::default(),
    };
    // A connection is an open file, and many systems begin with room for a thousand.
    match rlimit::increase_nofile_limit(OPEN_FILES) {
        Ok(files) => tracing::debug!("up to {files} open files"),
        Err(e) => tracing::warn!("the limit on open files stays as it is: {e}"),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(serve(options, what, settings.decision_log.clone()));
    // Tokenising that is under way is nobody's any more.
    runtime.shutdown_background();
    ended
}

/// A decision log is one run's: an earlier one is kept. Asked before a model is loaded.
fn check_new(log: &Path) -> Result<(), Failure> {
    check_writable(log).map_err(|e| Failure::Failed(e.into()))?;
    if is_begun(log) {
        return Err(Failure::usage(format!(
            "--decision-log {}: there is something in it already; name another file, or remove this one",
            log.display()
        )));
    }
    Ok(())
}

/// What serves.
enum What {
    /// A model on a device.
    Engine(Box<EngineSettings>),
    /// A profile: steps that wait.
    Emulated(Box<Emulation>),
}

/// Binds, loads, serves, drains.
async fn serve(options: ServerOptions, what: What, decision_log: Option<PathBuf>) -> Result<(), Failure> {
    let server = Server::bind(options).await.map_err(|e| Failure::Failed(e.into()))?;
    let address = server.address();
    let handle = server.handle();
    let (stop, stops) = mpsc::channel(2);
    let mut signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let (loading, mut loaded) = mpsc::channel(1);
    // Not a task: a model that is half loaded must not hold up the end of the program.
    std::thread::Builder::new().name("load".into()).spawn(move || {
        // Nobody listens any more when a signal came first.
        let _ = loading.blocking_send(match what {
            What::Engine(settings) => load(*settings, decision_log.as_deref()),
            What::Emulated(emulation) => emulate(*emulation, decision_log.as_deref()),
        });
    })?;
    let serving = server.run(stops);
    tokio::pin!(serving);
    let mut engine: Option<Arc<Engine>> = None;
    let ended = loop {
        let [terminate, interrupt] = &mut signals;
        tokio::select! {
            ended = &mut serving => break ended,
            Some(outcome) = loaded.recv() => {
                let (loaded, info) = outcome?;
                let loaded = Arc::new(loaded);
                handle.ready(loaded.clone(), info);
                engine = Some(loaded);
                tracing::info!("serving on http://{address}");
            }
            _ = terminate.recv() => { let _ = stop.try_send(()); }
            _ = interrupt.recv() => { let _ = stop.try_send(()); }
        }
    };
    if let Some(engine) = engine {
        end(engine);
    }
    match ended {
        Ended::Cut(requests) => Err(Failure::failed(format!("{requests} requests were cut off"))),
        Ended::Drained => Ok(()),
    }
}

/// Joins the engine's threads and writes the decision log out; a step that takes longer than is left to a
/// program that was told to stop is not waited for.
fn end(engine: Arc<Engine>) {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        engine.shutdown();
        // Nobody listens any more if it took too long.
        let _ = done.send(());
    });
    if ended.recv_timeout(Duration::from_secs(2)).is_err() {
        tracing::warn!("a step is still running: not waited for");
    }
}

/// Starts an engine without a device, saying whose times it keeps.
fn emulate(
    emulation: Emulation,
    decision_log: Option<&std::path::Path>,
) -> Result<(Engine, ServerInfo), Failure> {
    let profile = emulation.profile();
    tracing::warn!(
        "emulating {} on {} as profiled {}: nothing is computed, and the text means nothing",
        profile.model,
        profile.engine.device,
        profile.created
    );
    let log = match decision_log {
        Some(path) => {
            Some(DecisionLog::to_file(path, &emulation.log_header()).map_err(|e| Failure::Failed(e.into()))?)
        }
        None => None,
    };
    let info = emulation.info();
    Ok((emulation.start(log).map_err(|e| Failure::Failed(e.into()))?, info))
}

/// Loads the model and starts the engine, saying what it is made of.
fn load(
    settings: EngineSettings,
    decision_log: Option<&std::path::Path>,
) -> Result<(Engine, ServerInfo), Failure> {
    let failure = |e: SetupError| if e.is_usage() { Failure::usage(e) } else { Failure::Failed(e.into()) };
    let loaded = Loaded::load(settings).map_err(failure)?;
    let (s, spec) = (loaded.settings(), loaded.spec());
    let gpu_loras = s.gpu_loras;
    tracing::info!(
        "model {}: {:.1} M parameters, {} layers; {}",
        spec.name,
        spec.parameters() as f64 * 1e-6,
        spec.layers,
        loaded.weights_said
    );
    tracing::info!("device: {}", loaded.device_said());
    tracing::info!("tokenizer: {}", loaded.tokenizer_said);
    let info = ServerInfo::of(&loaded, gpu_loras);
    match &info.template {
        Ok(template) => tracing::info!("chat template: {}", template.said()),
        Err(e) => tracing::warn!("no chat: {e}"),
    }
    tracing::info!(
        "{} adapters of rank up to {}, {gpu_loras} slots; policy {}, eviction {}, swaps {}",
        s.total_loras,
        s.max_r,
        s.policy,
        s.evict,
        s.swap_mode
    );
    for field in loaded.generation_ignored() {
        tracing::warn!("generation_config.json asks for {field}, which is not implemented");
    }
    tracing::info!("memory:\n{}", loaded.memory_table(gpu_loras));
    let log = match decision_log {
        Some(path) => {
            let log = DecisionLog::to_file(path, &loaded.log_header(gpu_loras));
            Some(log.map_err(|e| Failure::Failed(e.into()))?)
        }
        None => None,
    };
    let engine = loaded.start(gpu_loras, log).map_err(failure)?;
    tracing::info!("adapters 0 to {} are in their slots; warm", gpu_loras - 1);
    Ok((engine, info))
}
