//! What the server's handlers share.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use lora_sched::AdapterId;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::body::Limits;
use super::error::ApiError;
use super::observed::Observed;
use crate::engine::Engine;
use crate::engine::model::SamplingDefaults;
use crate::engine::setup::Loaded;
use crate::workload::tokenizer::{ChatTemplate, Tokenizer, TokenizerSource};

/// What `/health` and `/v1/models` say about the engine.
#[derive(Clone, Debug, Serialize)]
pub struct ServerInfo {
    /// The base model's name.
    pub model: String,
    /// Adapters.
    pub total_loras: usize,
    /// Slots.
    pub gpu_loras: usize,
    /// Type of weights.
    pub dtype: String,
    /// Running sequences, at most.
    pub max_num_seqs: usize,
    /// Tokens of a request, at most.
    pub max_model_len: usize,
    /// The device.
    pub device: String,
    /// Admission policy.
    pub policy: String,
    /// Eviction rule.
    pub evict: String,
    /// Swap mode.
    pub swap_mode: String,
    /// The tokenizer, by the name that a client on any machine can find it by: what it was asked for
    /// as, or `byte-level`.
    pub tokenizer: String,
    /// Ranks that the adapters cycle through, in order of their numbers.
    pub ranks: Vec<u32>,
    /// The largest rank that a slot holds.
    pub max_r: usize,
    /// What a request of OpenAI's endpoints gets where it says nothing.
    #[serde(skip)]
    pub sampling: SamplingDefaults,
    /// How conversations become prompts, or why they cannot.
    #[serde(skip)]
    pub template: Result<Arc<ChatTemplate>, String>,
}

impl ServerInfo {
    /// Of an engine with `gpu_loras` slots.
    pub fn of(loaded: &Loaded, gpu_loras: usize) -> Self {
        let settings = loaded.settings();
        let config = loaded.scheduler_config(gpu_loras);
        Self {
            model: loaded.spec().name.clone(),
            total_loras: loaded.pool().len(),
            gpu_loras,
            dtype: loaded.dtype().to_string(),
            max_num_seqs: config.max_num_seqs,
            max_model_len: config.max_model_len,
            device: loaded.device_said(),
            policy: settings.policy.to_string(),
            evict: settings.evict.to_string(),
            swap_mode: settings.swap_mode.to_string(),
            tokenizer: match loaded.tokenizer().source() {
                TokenizerSource::ByteLevel => TokenizerSource::ByteLevel.to_string(),
                // Not where the file lies here: elsewhere it lies elsewhere.
                TokenizerSource::File(_) => settings.tokenizer.as_ref().unwrap_or(&settings.model).clone(),
            },
            ranks: cycle(config.adapters.iter().map(|a| a.rank).collect()),
            max_r: settings.max_r,
            sampling: loaded.sampling_defaults(),
            template: chat_template(loaded.tokenizer()),
        }
    }
}

/// How conversations become prompts of this tokenizer, or why they cannot.
pub fn chat_template(tokenizer: &Tokenizer) -> Result<Arc<ChatTemplate>, String> {
    ChatTemplate::of(tokenizer).map(Arc::new).map_err(|e| e.to_string())
}

/// The shortest beginning of `ranks` that gives all of them when it is gone through again and again.
pub(in crate::engine) fn cycle(mut ranks: Vec<u32>) -> Vec<u32> {
    let repeats = |length: &usize| ranks.iter().zip(&ranks[*length..]).all(|(a, b)| a == b);
    if let Some(length) = (1..ranks.len()).find(repeats) {
        ranks.truncate(length);
    }
    ranks
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Where a server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Loading,
    Ready,
    Draining,
    Failed,
}

/// Shared by every connection.
#[derive(Debug)]
pub(super) struct State {
    info: OnceLock<ServerInfo>,
    engine: OnceLock<Arc<Engine>>,
    draining: AtomicBool,
    in_flight: AtomicUsize,
    key: Option<[u8; 32]>,
    /// When the server started, seconds since 1970.
    pub(super) created: u64,
    pub(super) limits: Limits,
    pub(super) observed: Observed,
}

impl State {
    pub(super) fn new(api_key: Option<&str>, limits: Limits) -> Self {
        let created = unix_seconds();
        Self {
            info: OnceLock::new(),
            engine: OnceLock::new(),
            draining: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            key: api_key.map(|k| Sha256::digest(k).into()),
            created,
            limits,
            observed: Observed::new(),
        }
    }

    /// The engine is there and warm. A second engine is not taken.
    pub(super) fn ready(&self, engine: Arc<Engine>, info: ServerInfo) {
        let _ = self.info.set(info);
        let _ = self.engine.set(engine);
    }

    /// How conversations become prompts.
    pub(super) fn template(&self) -> Result<&Arc<ChatTemplate>, ApiError> {
        let (_, info) = self.loaded()?;
        let no = |why| ApiError::internal(format!("this model takes no conversations: {why}"));
        info.template.as_ref().map_err(no)
    }

    pub(super) fn start_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub(super) fn phase(&self) -> Phase {
        match self.engine.get() {
            _ if self.draining.load(Ordering::SeqCst) => Phase::Draining,
            None => Phase::Loading,
            Some(engine) if engine.failure().is_some() => Phase::Failed,
            Some(_) => Phase::Ready,
        }
    }

    /// The engine and what is said about it, whatever the phase, once there is one.
    pub(super) fn loaded(&self) -> Result<(&Arc<Engine>, &ServerInfo), ApiError> {
        match (self.engine.get(), self.info.get()) {
            (Some(engine), Some(info)) => Ok((engine, info)),
            _ => Err(ApiError::unavailable("the model is being loaded")),
        }
    }

    /// The engine, if it takes requests.
    pub(super) fn serving(&self) -> Result<(&Arc<Engine>, &ServerInfo), ApiError> {
        let loaded = self.loaded()?;
        match self.phase() {
            Phase::Draining => Err(ApiError::unavailable("the server is shutting down")),
            Phase::Failed => Err(ApiError::stopped(loaded.0.failure())),
            Phase::Loading | Phase::Ready => Ok(loaded),
        }
    }

    /// Which adapter a client means by a model's name: none is the base model. No name is the base model,
    /// too.
    pub(super) fn model(&self, name: Option<&str>) -> Result<Option<AdapterId>, ApiError> {
        let (engine, info) = self.loaded()?;
        let Some(name) = name.filter(|&name| name != info.model) else { return Ok(None) };
        let missing = || format!("there is no model '{name}': GET /v1/models lists those that there are");
        let found = engine.find_adapter(name).ok_or_else(|| ApiError::not_found(Some("model"), missing()));
        found.map(Some)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// Whether the header lets its sender in. The time taken says nothing about the key: digests are
    /// compared, to their ends.
    pub(super) fn lets_in(&self, authorization: Option<&[u8]>) -> bool {
        let Some(key) = self.key else { return true };
        const SCHEME: &[u8] = b"Bearer ";
        let given = authorization.and_then(|a| a.split_at_checked(SCHEME.len()));
        let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(SCHEME));
        let given = given.map_or(&[][..], |(_, key)| key);
        let digest: [u8; 32] = Sha256::digest(given).into();
        digest.iter().zip(key).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

/// A request that is being answered; lives as long as the response's body.
#[derive(Debug)]
pub(super) struct InFlight(Arc<State>);

impl InFlight {
    pub(super) fn new(state: &Arc<State>) -> Self {
        state.in_flight.fetch_add(1, Ordering::SeqCst);
        Self(state.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_told_once_a_cycle() {
        assert_eq!(cycle(vec![8; 5]), [8]);
        assert_eq!(cycle(vec![8, 4, 2, 8, 4]), [8, 4, 2]);
        assert_eq!(cycle(vec![8, 4, 8, 8]), [8, 4, 8]);
        assert_eq!(cycle(vec![8, 8, 4]), [8, 8, 4]);
        assert!(cycle(Vec::new()).is_empty());
    }

    #[test]
    fn only_the_key_lets_in() {
        let state = State::new(Some("secret"), Limits::default());
        assert!(state.lets_in(Some(b"Bearer secret")) && state.lets_in(Some(b"bearer secret")));
        for wrong in [None, Some(&b"Bearer secre"[..]), Some(b"secret"), Some(b"Bearer secret ")] {
            assert!(!state.lets_in(wrong));
        }
        assert!(State::new(None, Limits::default()).lets_in(None));
    }
}
