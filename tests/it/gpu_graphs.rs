//! Steps that are replayed as graphs, against the same steps launched kernel by kernel. All need a GPU:
//! `cargo test --features cuda --test it -- --ignored gpu_graphs`.

use lora_hbm::engine::adapters::HostPool;
use lora_hbm::engine::batch::BatchLimits;
use lora_hbm::engine::cuda::CudaDevice;
use lora_hbm::engine::executor::Executor as _;
use lora_hbm::engine::model::{GenerationConfig, Model, ModelSpec, Weights, preset};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::rig::{Reference, Rig, Share, relative_distance};

const LIMITS: BatchLimits = BatchLimits {
    max_num_seqs: 40,
    max_num_batched_tokens: 1024,
    max_model_len: 1400,
    block_size: 16,
    // What all sequences may need, and no multiple of the rig's stride.
    kv_blocks: 40 * 88 + 1,
};
const ADAPTERS: usize = 6;
const RANKS: [usize; 3] = [8, 16, 64];

/// Llama-2-7B with its heads and fewer and narrower layers, the kernels' every path within them.
fn narrow_llama(kv_heads: usize) -> ModelSpec {
    let spec = preset("meta-llama/Llama-2-7b-hf").unwrap();
    ModelSpec { hidden: 1024, layers: 3, heads: 8, kv_heads, intermediate: 2816, vocab_size: 4000, ..spec }
}

fn drawn(device: &CudaDevice, spec: ModelSpec, limits: BatchLimits, graphs: bool) -> Rig {
    let weights = Weights::Dummy { seed: 3 };
    let model = Model { spec, weights, generation: GenerationConfig::default(), home: None };
    Rig::on_gpu_of(device, model, ADAPTERS, limits, graphs, |slabs, spec| {
        HostPool::empty_in(slabs, spec, 64).generated(ADAPTERS, &RANKS, 5)
    })
}

/// A sequence of the test.
struct Seq {
    who: Option<usize>,
    tokens: Vec<u32>,
    done: usize,
}

/// What steps are made of: the most chunks and single rows, the most rows of a chunk, how many of the adapters.
#[derive(Clone, Copy, Debug)]
struct Kind {
    chunks: usize,
    singles: usize,
    longest: usize,
    adapters: usize,
}

const KINDS: [Kind; 9] = [
    Kind { chunks: 1, singles: 0, longest: 1024, adapters: 1 },
    Kind { chunks: 4, singles: 0, longest: 300, adapters: 0 },
    Kind { chunks: 4, singles: 0, longest: 300, adapters: 6 },
    Kind { chunks: 2, singles: 12, longest: 150, adapters: 0 },
    Kind { chunks: 2, singles: 12, longest: 150, adapters: 6 },
    // Single rows of one adapter, more than a small segment takes.
    Kind { chunks: 3, singles: 37, longest: 60, adapters: 1 },
    Kind { chunks: 2, singles: 8, longest: 10, adapters: 6 },
    Kind { chunks: 0, singles: 40, longest: 1, adapters: 1 },
    // More chunks than graphs are made for.
    Kind { chunks: 8, singles: 8, longest: 60, adapters: 6 },
];

/// Runs a step while adapter `late` of its is copied into its slot, which held another one's matrices before.
fn step(rig: &mut Rig, shares: &[Share<'_>], late: Option<usize>) -> Vec<u32> {
    let mut loading = Vec::new();
    if let Some(adapter) = late {
        let (slots, slot) = (rig.slots.clone(), rig.slots[&adapter]);
        rig.swap((adapter + 1) % ADAPTERS, slot);
        rig.submit_swap(adapter, slot);
        // The other one has its own slot still.
        rig.slots = slots;
        loading.push(slot);
    }
    rig.step_while_loading(shares, &loading);
    rig.executor.step_result().tokens.iter().map(|t| t.unwrap()).collect()
}

/// Runs random steps of every kind on two executors, as graphs and kernel by kernel, on what earlier steps have left
/// in the buffers and the cache. Now and then an adapter is still on its way when its step begins.
fn same_bits(spec: ModelSpec, rounds: usize) {
    let name = format!("{} kv heads of {}", spec.kv_heads, spec.head_dim);
    let (vocab, limits) = (spec.vocab_size as u32, LIMITS);
    // One device, so that both compute their products in the same way.
    let device = CudaDevice::open().unwrap();
    let mut rig = drawn(&device, spec.clone(), limits, true);
    let mut by_kernel = drawn(&device, spec, limits, false);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let fresh = |rng: &mut ChaCha8Rng, kind: &Kind| Seq {
        who: rng.random_range(0..=kind.adapters).checked_sub(1),
        tokens: (0..limits.max_model_len).map(|_| rng.random_range(3..vocab)).collect(),
        done: 0,
    };
    let mut seqs: Vec<Seq> = (0..limits.max_num_seqs).map(|_| fresh(&mut rng, &KINDS[0])).collect();
    let (mut steps, mut rows) = (0, 0);
    for round in 0..rounds {
        for kind in KINDS {
            // The adapters of a place change with the kind, so its sequence begins anew now and then.
            let mut parts = Vec::new();
            let mut left = limits.max_num_batched_tokens;
            let chunks = rng.random_range(kind.chunks.min(1)..=kind.chunks);
            let singles = if kind.singles > 0 { rng.random_range(1..=kind.singles) } else { 0 };
            let first = rng.random_range(0..limits.max_num_seqs);
            for i in 0..(chunks + singles).min(limits.max_num_seqs) {
                let place = (first + i) % limits.max_num_seqs;
                let longest = kind.longest.min(left);
                let len = if i < chunks && longest >= 2 { rng.random_range(2..=longest) } else { 1 };
                if len > left {
                    break;
                }
                let seq = &mut seqs[place];
                if seq.done + len > limits.max_model_len || seq.who.is_some_and(|a| a >= kind.adapters) {
                    *seq = fresh(&mut rng, &kind);
                }
                left -= len;
                parts.push((place, len));
            }
            let share = |&(place, len): &(usize, usize)| {
                let seq = &seqs[place];
                let tokens = Some(&seq.tokens[seq.done..seq.done + len]);
                Share { place: place as u32, who: seq.who, start: seq.done, tokens }
            };
            let shares: Vec<_> = parts.iter().map(share).collect();
            let late = (round % 3 == 0).then(|| shares.iter().find_map(|s| s.who)).flatten();
            let replayed_ids = step(&mut rig, &shares, late);
            let ids = step(&mut by_kernel, &shares, late);
            let bits = |rig: &Rig| -> Vec<Vec<u32>> {
                let row = |at| rig.executor.logits(at).unwrap().iter().map(|v| v.to_bits()).collect();
                (0..shares.len()).map(row).collect()
            };
            let replayed = bits(&rig);
            let finite = replayed.iter().flatten().all(|v| f32::from_bits(*v).is_finite());
            assert!(finite, "{name}, round {round}, {kind:?}: a logit is not finite");
            for (at, (graph, kernels)) in replayed.iter().zip(bits(&by_kernel)).enumerate() {
                let differ = graph.iter().zip(&kernels).filter(|(a, b)| a != b).count();
                let (place, len) = parts[at];
                assert_eq!(
                    differ, 0,
                    "{name}, round {round}, {kind:?}: logits of place {place} ({len} rows of {parts:?}) differ"
                );
            }
            assert_eq!(replayed_ids, ids, "{name}, round {round}, {kind:?}: tokens differ");
            steps += 1;
            rows += parts.iter().map(|p| p.1).sum::<usize>();
            parts.iter().for_each(|(place, len)| seqs[*place].done += len);
        }
    }
    println!("{name}: {steps} steps of {rows} rows together");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_replayed_step_gives_the_bits_of_the_same_step_launched_kernel_by_kernel() {
    same_bits(narrow_llama(8), 40);
    same_bits(narrow_llama(2), 20);
    let opt = preset("facebook/opt-125m").unwrap();
    same_bits(ModelSpec { layers: 3, vocab_size: 4000, ..opt }, 20);
}

/// More sequences of one adapter than a small segment has rows, decoding and beside a chunk.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn many_single_rows_of_one_adapter_give_the_reference_logits() {
    const SEQS: usize = 24;
    const TOLERANCE: f32 = 1e-2;
    for family in ["llama", "opt"] {
        let limits = BatchLimits {
            max_num_seqs: SEQS,
            max_num_batched_tokens: 256,
            max_model_len: 96,
            block_size: 8,
            kv_blocks: SEQS * 12 + 1,
        };
        let (mut rig, reference) = (Rig::wide_on_gpu(family, limits), Reference::open(family));
        let who = Some(2);
        let (tokens, want) = (reference.ids("tokens", who), reference.logits(who));
        // Were the adapter left out, rows would be further off than they may be.
        rig.step(&[Share { place: 0, who: None, start: 0, tokens: Some(&tokens[..21]) }]);
        let without = relative_distance(rig.executor.logits(0).unwrap(), &want[20]);
        assert!(without > 5.0 * TOLERANCE, "{family}: the adapter changes a row by {without}");
        let share = |place: usize, start: usize, end: usize| Share {
            place: place as u32,
            who,
            start,
            tokens: Some(&tokens[start..end]),
        };
        for place in 0..SEQS {
            rig.step(&[share(place, 0, 20)]);
        }
        let check = |rig: &Rig, what: &str, at: usize, position: usize| {
            let off = relative_distance(rig.executor.logits(at).unwrap(), &want[position]);
            assert!(off < TOLERANCE, "{family}, {what}, sequence {at}: off by {off}");
        };
        rig.step(&(0..SEQS).map(|place| share(place, 20, 21)).collect::<Vec<_>>());
        (0..SEQS).for_each(|at| check(&rig, "decode", at, 20));
        // The last one goes on by a chunk.
        let end = |place: usize| if place == SEQS - 1 { 41 } else { 22 };
        rig.step(&(0..SEQS).map(|place| share(place, 21, end(place))).collect::<Vec<_>>());
        (0..SEQS).for_each(|at| check(&rig, "beside a chunk", at, end(at) - 1));
    }
}
