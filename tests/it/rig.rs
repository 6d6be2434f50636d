//! A CPU executor over a fixture, and a driver that plans by hand.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lora_hbm::engine::adapters::HostPool;
#[cfg(feature = "cuda")]
use lora_hbm::engine::adapters::{PoolError, SlabMaker};
use lora_hbm::engine::batch::BatchLimits;
use lora_hbm::engine::cpu::{CpuOptions, cpu_executor};
#[cfg(feature = "cuda")]
use lora_hbm::engine::cuda::{CudaDevice, CudaOptions};
use lora_hbm::engine::device::DeviceExecutor;
use lora_hbm::engine::executor::{Completion, Executor, ExecutorError, Sampling, StepFeed};
#[cfg(feature = "cuda")]
use lora_hbm::engine::model::ModelSpec;
use lora_hbm::engine::model::{DummyWeights, Model, resolve};
use lora_sched::{AdapterId, PlaceId, RequestId, SeqStep, SlotId, StepPlan, SwapKind, SwapMode, SwapPlan};

/// Adapters of the fixtures in id order (the pool's order is the folders').
pub const ADAPTERS: [&str; 4] = ["a-r4", "b-r8", "c-r16", "d-r3"];

/// The base model and every adapter.
pub const EVERYONE: [Option<usize>; 5] = [None, Some(0), Some(1), Some(2), Some(3)];

const LIMITS: BatchLimits = BatchLimits {
    max_num_seqs: 6,
    max_num_batched_tokens: 256,
    max_model_len: 96,
    block_size: 8,
    kv_blocks: 80,
};

/// What transformers and peft gave: a fixture's, or of a folder that `scripts/reference.py` made.
pub struct Reference {
    family: String,
    /// Names of the adapters, by id.
    adapters: Vec<String>,
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    pub fn open(family: &str) -> Self {
        Self::read(family, &fixture(family), ADAPTERS.map(str::to_owned).into())
    }

    /// The reference in `folder`.
    #[cfg(feature = "cuda")]
    pub fn open_in(folder: &Path) -> Self {
        let name = |f: &PathBuf| f.file_name().unwrap().to_str().unwrap().to_owned();
        let names = adapter_folders(folder).iter().map(name).collect();
        Self::read(&folder.display().to_string(), folder, names)
    }

    /// The reference in the folder `inside` a family's fixture, of these adapters.
    pub fn open_inside(family: &str, inside: &str, adapters: &[&str]) -> Self {
        Self::read(family, &fixture(family).join(inside), adapters.iter().map(|a| (*a).to_owned()).collect())
    }

    fn read(family: &str, folder: &Path, adapters: Vec<String>) -> Self {
        let path = folder.join("reference.safetensors");
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { family: family.to_owned(), adapters, tensors }
    }

    /// The base model and every adapter.
    #[cfg(feature = "cuda")]
    pub fn everyone(&self) -> Vec<Option<usize>> {
        std::iter::once(None).chain((0..self.adapters.len()).map(Some)).collect()
    }

    pub fn name(&self, who: Option<usize>) -> &str {
        who.map_or("base", |a| &self.adapters[a])
    }

    /// Rows of `what`, `[rows][vocab]`; none if it was left out.
    #[cfg(feature = "cuda")]
    pub fn rows(&self, what: &str, who: Option<usize>) -> Option<Vec<Vec<f32>>> {
        let tensor = self.tensors.get(&format!("{what}.{}", self.name(who)))?;
        Some(tensor.to_dtype(DType::F32).unwrap().to_vec2().unwrap())
    }

    pub fn family(&self) -> &str {
        &self.family
    }

    fn tensor(&self, what: &str, who: Option<usize>) -> &Tensor {
        &self.tensors[&format!("{what}.{}", self.name(who))]
    }

    pub fn ids(&self, what: &str, who: Option<usize>) -> Vec<u32> {
        self.tensor(what, who).to_dtype(DType::U32).unwrap().to_vec1().unwrap()
    }

    pub fn values(&self, what: &str, who: Option<usize>) -> Vec<f32> {
        self.tensor(what, who).to_vec1().unwrap()
    }

    /// `[len][vocab]`.
    pub fn logits(&self, who: Option<usize>) -> Vec<Vec<f32>> {
        self.tensor("logits", who).to_vec2().unwrap()
    }
}

/// Cargo sets the variable for tests that it runs; whoever carries the binary to another machine can too.
fn fixture(family: &str) -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(root).join("tests/fixtures").join(family)
}

/// The adapters' folders of a reference, in the pool's order.
#[cfg(feature = "cuda")]
fn adapter_folders(folder: &Path) -> Vec<PathBuf> {
    let adapters = folder.join("adapters");
    let listed = std::fs::read_dir(&adapters).unwrap_or_else(|e| panic!("{}: {e}", adapters.display()));
    let mut folders: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// The largest rank among the adapters of a reference.
#[cfg(feature = "cuda")]
fn largest_rank(folder: &Path) -> usize {
    let rank = |adapter: &PathBuf| {
        let text = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["r"].as_u64().unwrap() as usize
    };
    adapter_folders(folder).iter().map(rank).max().unwrap()
}

/// One sequence's share of a step.
pub struct Share<'a> {
    pub place: u32,
    /// Adapter, by index; its slot is what the rig last loaded it into.
    pub who: Option<usize>,
    pub start: usize,
    /// The tokens, or none for a decode.
    pub tokens: Option<&'a [u32]>,
}

/// An executor with block tables and slots kept by hand.
pub struct Rig {
    pub executor: DeviceExecutor,
    block_size: usize,
    free: Vec<u32>,
    held: HashMap<u32, Vec<u32>>,
    /// Slot of each adapter.
    pub slots: HashMap<usize, u32>,
    step: u64,
}

impl Rig {
    /// `gpu_loras` slots on the CPU, the first adapters preloaded.
    pub fn new(family: &str, gpu_loras: usize, threads: usize) -> Self {
        let folder = fixture(family);
        let model = Self::model(&folder);
        let pool = HostPool::load(&model.spec, 16, &folder.join("adapters"), None).unwrap();
        Self::of(model, pool, gpu_loras, threads, LIMITS)
    }

    /// `gpu_loras` slots on the CPU for the adapters of `pool`, the first ones preloaded.
    pub fn of(model: Model, pool: HostPool, gpu_loras: usize, threads: usize, limits: BatchLimits) -> Self {
        let preloaded = gpu_loras.min(pool.len());
        let executor = cpu_executor(CpuOptions {
            limits,
            spec: model.spec,
            weights: model.weights,
            loaded: Default::default(),
            adapters: Arc::new(pool),
            gpu_loras,
            swap_mode: SwapMode::Layered,
            threads,
            allowed_tokens: None,
            keep_logits: true,
        });
        Self::over(executor.unwrap(), preloaded, &limits)
    }

    /// As [`Rig::new`], on the first GPU.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(family: &str, gpu_loras: usize) -> Self {
        Self::on_gpu_in(&fixture(family), gpu_loras, 16, LIMITS)
    }

    /// A reference of a real size on the first GPU, every adapter in a slot; see [`Reference::open_in`].
    #[cfg(feature = "cuda")]
    pub fn large_on_gpu(folder: &Path, limits: BatchLimits) -> Self {
        Self::on_gpu_in(folder, adapter_folders(folder).len(), largest_rank(folder), limits)
    }

    /// A fixture on the first GPU with other limits, every adapter in a slot.
    #[cfg(feature = "cuda")]
    pub fn wide_on_gpu(family: &str, limits: BatchLimits) -> Self {
        Self::on_gpu_in(&fixture(family), ADAPTERS.len(), 16, limits)
    }

    #[cfg(feature = "cuda")]
    fn on_gpu_in(folder: &Path, gpu_loras: usize, max_rank: usize, limits: BatchLimits) -> Self {
        let adapters = folder.join("adapters");
        let device = CudaDevice::open().unwrap();
        Self::on_gpu_of(&device, Self::model(folder), gpu_loras, limits, true, |slabs, spec| {
            HostPool::load_in(slabs, spec, max_rank, &adapters, None)
        })
    }

    /// A model on a GPU with a pool of its slabs; without `graphs` steps are launched kernel by kernel.
    #[cfg(feature = "cuda")]
    pub fn on_gpu_of(
        device: &CudaDevice,
        model: Model,
        gpu_loras: usize,
        limits: BatchLimits,
        graphs: bool,
        pool: impl FnOnce(Arc<dyn SlabMaker>, &ModelSpec) -> Result<HostPool, PoolError>,
    ) -> Self {
        let slabs = device.slabs(lora_hbm::engine::setup::HostMemory::Pinned).unwrap();
        let pool = pool(slabs, &model.spec).unwrap();
        let preloaded = gpu_loras.min(pool.len());
        let executor = device.executor(CudaOptions {
            limits,
            spec: model.spec,
            weights: model.weights,
            adapters: Arc::new(pool),
            gpu_loras,
            swap_mode: SwapMode::Layered,
            allowed_tokens: None,
            keep_logits: true,
            graphs,
        });
        Self::over(executor.unwrap(), preloaded, &limits)
    }

    fn model(folder: &Path) -> Model {
        let name = folder.join("model");
        resolve(name.to_str().unwrap(), DummyWeights::Never, 0).unwrap()
    }

    /// Adapters `0..preloaded` in the slots of their numbers.
    fn over(mut executor: DeviceExecutor, preloaded: usize, limits: &BatchLimits) -> Self {
        let BatchLimits { kv_blocks, block_size, .. } = *limits;
        let ids: Vec<_> = (0..preloaded as u32).map(AdapterId).collect();
        executor.preload(&ids).unwrap();
        // A stride that is prime to the number of blocks shuffles them.
        let free = (0..kv_blocks as u32).map(|i| (i * 37 + 11) % kv_blocks as u32).collect();
        let slots = (0..preloaded).map(|i| (i, i as u32)).collect();
        Self { executor, block_size, free, held: HashMap::new(), slots, step: 0 }
    }

    fn plan(&mut self, shares: &[Share<'_>]) -> (StepPlan, StepFeed) {
        let mut plan = StepPlan { step: self.step, ..StepPlan::default() };
        let mut feed = StepFeed::default();
        self.step += 1;
        for share in shares {
            let held = self.held.entry(share.place).or_default();
            if share.start == 0 {
                self.free.append(held);
                feed.begins.push((PlaceId(share.place), Sampling::default()));
            }
            let len = share.tokens.map_or(1, <[u32]>::len);
            let first = plan.blocks.len() as u32;
            while held.len() * self.block_size < share.start + len {
                let block = self.free.remove(0);
                held.push(block);
                plan.blocks.push(block);
            }
            feed.tokens.extend_from_slice(share.tokens.unwrap_or(&[]));
            plan.seqs.push(SeqStep {
                id: RequestId(u64::from(share.place)),
                place: PlaceId(share.place),
                adapter: share.who.map(|a| (AdapterId(a as u32), SlotId(self.slots[&a]))),
                start: share.start as u32,
                len: len as u32,
                decode: share.tokens.is_none(),
                samples: true,
                new_blocks: first..plan.blocks.len() as u32,
            });
        }
        (plan, feed)
    }

    /// Submits a step and does not wait.
    pub fn submit(&mut self, shares: &[Share<'_>]) -> u64 {
        let (plan, feed) = self.plan(shares);
        self.executor.submit_step(&plan, &feed).unwrap();
        plan.step
    }

    /// Runs a step and gives what it ended with.
    pub fn try_step(&mut self, shares: &[Share<'_>]) -> Result<Completion, ExecutorError> {
        self.submit(shares);
        self.executor.wait()
    }

    /// Runs a step and gives the token that each share sampled.
    pub fn step(&mut self, shares: &[Share<'_>]) -> Vec<u32> {
        let submitted = self.submit(shares);
        match self.executor.wait().unwrap() {
            Completion::Step { step, started, ended } => {
                assert_eq!(step, submitted);
                assert!(started <= ended);
            }
            other => panic!("{other:?}"),
        }
        self.executor.step_result().tokens.iter().map(|t| t.unwrap()).collect()
    }

    /// Submits a swap of `adapter` into `slot`.
    pub fn submit_swap(&mut self, adapter: usize, slot: u32) {
        self.slots.retain(|_, s| *s != slot);
        self.slots.insert(adapter, slot);
        let swap = SwapPlan {
            adapter: AdapterId(adapter as u32),
            slot: SlotId(slot),
            evicted: None,
            bytes: 0,
            kind: SwapKind::Demand,
        };
        self.executor.submit_swap(&swap).unwrap();
    }

    /// Swaps and waits.
    pub fn swap(&mut self, adapter: usize, slot: u32) {
        self.submit_swap(adapter, slot);
        match self.executor.wait().unwrap() {
            Completion::Swap { slot: s, adapter: a, .. } => {
                assert_eq!((s.0, a.0), (slot, adapter as u32));
            }
            other => panic!("{other:?}"),
        }
    }

    /// Runs a step that starts while slots `loading` are still being copied, and waits for everything
    /// that is in flight.
    pub fn step_while_loading(&mut self, shares: &[Share<'_>], loading: &[u32]) -> Vec<Completion> {
        let (mut plan, feed) = self.plan(shares);
        plan.loading = loading.iter().map(|s| SlotId(*s)).collect();
        self.executor.submit_step(&plan, &feed).unwrap();
        self.drain()
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self) -> Vec<Completion> {
        std::iter::from_fn(|| self.executor.wait().ok()).collect()
    }

    /// Runs the reference's tokens of `who` in chunks. `row` gets each chunk's last position, its logits and the
    /// reference's.
    pub fn in_chunks(
        &mut self,
        reference: &Reference,
        who: Option<usize>,
        chunk: usize,
        mut row: impl FnMut(usize, &[f32], &[f32]),
    ) {
        let (tokens, want) = (reference.ids("tokens", who), reference.logits(who));
        let mut start = 0;
        for piece in tokens.chunks(chunk) {
            self.step(&[Share { place: 3, who, start, tokens: Some(piece) }]);
            start += piece.len();
            row(start - 1, self.executor.logits(0).unwrap(), &want[start - 1]);
        }
    }

    /// Runs the reference's tokens of everyone at once, each sequence going on by its own `pace`, so that single
    /// tokens and chunks of all adapters meet in one step; a sixth sequence is of an adapter that another one has
    /// already. `row` gets whose row it is, its position, its logits and the reference's.
    pub fn in_mixed_batches(
        &mut self,
        reference: &Reference,
        pace: [usize; 6],
        mut row: impl FnMut(Option<usize>, usize, &[f32], &[f32]),
    ) {
        let who = [None, Some(0), Some(1), Some(2), Some(3), Some(1)];
        let tokens = who.map(|who| reference.ids("tokens", who));
        let want = who.map(|who| reference.logits(who));
        let mut at = [0usize; 6];
        loop {
            let running: Vec<usize> = (0..6).filter(|i| at[*i] < tokens[*i].len()).collect();
            if running.is_empty() {
                return;
            }
            let end = |i: usize| tokens[i].len().min(at[i] + pace[i]);
            let share = |&i: &usize| Share {
                place: i as u32,
                who: who[i],
                start: at[i],
                tokens: Some(&tokens[i][at[i]..end(i)]),
            };
            self.step(&running.iter().map(share).collect::<Vec<_>>());
            for (index, &i) in running.iter().enumerate() {
                at[i] = tokens[i].len().min(at[i] + pace[i]);
                row(who[i], at[i] - 1, self.executor.logits(index).unwrap(), &want[i][at[i] - 1]);
            }
        }
    }

    /// The greedy continuation of one prompt alone, or of several in one batch.
    pub fn greedy(&mut self, who: &[Option<usize>], prompts: &[Vec<u32>], n: usize) -> Vec<Vec<u32>> {
        let shares = |start: &dyn Fn(usize) -> usize, first: bool| -> Vec<Share<'_>> {
            who.iter()
                .zip(prompts)
                .enumerate()
                .map(|(i, (who, prompt))| Share {
                    place: i as u32,
                    who: *who,
                    start: start(i),
                    tokens: first.then_some(prompt.as_slice()),
                })
                .collect()
        };
        let mut out: Vec<Vec<u32>> = self.step(&shares(&|_| 0, true)).iter().map(|t| vec![*t]).collect();
        for done in 0..n - 1 {
            let tokens = self.step(&shares(&|i| prompts[i].len() + done, false));
            out.iter_mut().zip(tokens).for_each(|(out, token)| out.push(token));
        }
        out
    }
}

/// ‖a − b‖ / ‖b‖: of a row of logits.
#[cfg(feature = "cuda")]
pub fn relative_distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// The largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
