//! The CUDA engine against transformers and peft, with the CPU engine's fixtures. All need a GPU:
//! `cargo test --features cuda --test it -- --ignored gpu`.

use lora_hbm::engine::executor::{Completion, Executor};

use crate::rig::{EVERYONE, Reference, Rig, Share, relative_distance};

const FAMILIES: [&str; 2] = ["llama", "opt"];

/// Of a row of logits, ‖difference‖ / ‖reference‖: weights and activations are bf16 here.
const TOLERANCE: f32 = 1e-2;

/// Holds a row to its reference and keeps the worst.
struct Worst {
    name: String,
    off: f32,
    rows: usize,
}

impl Worst {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), off: 0.0, rows: 0 }
    }

    fn check(&mut self, what: &dyn std::fmt::Debug, position: usize, got: &[f32], want: &[f32]) {
        let off = relative_distance(got, want);
        assert!(off < TOLERANCE, "{} {what:?} position {position}: off by {off}", self.name);
        self.off = self.off.max(off);
        self.rows += 1;
    }
}

impl Drop for Worst {
    fn drop(&mut self) {
        println!("{}: {} rows, worst {:.2e}", self.name, self.rows, self.off);
    }
}

fn check_chunks(rig: &mut Rig, reference: &Reference, who: Option<usize>, chunk: usize, worst: &mut Worst) {
    let (tokens, want) = (reference.ids("tokens", who), reference.logits(who));
    let mut start = 0;
    for piece in tokens.chunks(chunk) {
        rig.step(&[Share { place: 3, who, start, tokens: Some(piece) }]);
        start += piece.len();
        worst.check(&(who, chunk), start - 1, rig.executor.logits(0).unwrap(), &want[start - 1]);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn prefill_whole_chunked_and_token_by_token_gives_the_reference_logits() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::on_gpu(family, 4), Reference::open(family));
        for chunk in [1, 3, 7, 16, 17, 41] {
            let mut worst = Worst::new(&format!("{family}, chunks of {chunk}"));
            for who in EVERYONE {
                check_chunks(&mut rig, &reference, who, chunk, &mut worst);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn batches_of_mixed_adapters_ranks_and_lengths_give_the_reference_logits() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::on_gpu(family, 4), Reference::open(family));
        let mut worst = Worst::new(&format!("{family}, mixed batches"));
        let tokens: Vec<_> = EVERYONE.iter().map(|who| reference.ids("tokens", *who)).collect();
        let want: Vec<_> = EVERYONE.iter().map(|who| reference.logits(*who)).collect();
        let who = [None, Some(0), Some(1), Some(2), Some(3), Some(1)];
        let source = [0, 1, 2, 3, 4, 2];
        let pace = [5, 1, 9, 2, 23, 1];
        let mut at = [0usize; 6];
        while at.iter().zip(source).any(|(at, s)| *at < tokens[s].len()) {
            let running: Vec<usize> = (0..6).filter(|i| at[*i] < tokens[source[*i]].len()).collect();
            let shares: Vec<_> = running
                .iter()
                .map(|&i| {
                    let all = &tokens[source[i]];
                    let end = all.len().min(at[i] + pace[i]);
                    Share { place: i as u32, who: who[i], start: at[i], tokens: Some(&all[at[i]..end]) }
                })
                .collect();
            rig.step(&shares);
            for (index, &i) in running.iter().enumerate() {
                at[i] = tokens[source[i]].len().min(at[i] + pace[i]);
                let want = &want[source[i]][at[i] - 1];
                worst.check(&who[i], at[i] - 1, rig.executor.logits(index).unwrap(), want);
            }
        }
    }
}

/// The reference's greedy tokens are far from ties, so bf16 chooses them too: decodes run as graphs here.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn greedy_tokens_of_a_mixed_batch_are_those_of_each_alone() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::on_gpu(family, 4), Reference::open(family));
        let prompts: Vec<_> = EVERYONE.iter().map(|who| reference.ids("prompt", *who)).collect();
        let want: Vec<_> = EVERYONE.iter().map(|who| reference.ids("greedy", *who)).collect();
        let n = want[0].len();
        let mixed = rig.greedy(&EVERYONE, &prompts, n);
        for (i, who) in EVERYONE.iter().enumerate() {
            let margins = reference.values("margin", *who);
            let alone = rig.greedy(&[*who], &prompts[i..=i], n);
            for (name, got) in [("mixed", &mixed[i]), ("alone", &alone[0])] {
                // From the first near tie on, another token is as right.
                let sure = margins.iter().position(|m| *m < 0.1).unwrap_or(n);
                assert!(sure > 0, "{family} {who:?}: the reference nearly ties at once");
                assert_eq!(got[..sure], want[i][..sure], "{family} {who:?} {name}: {sure} sure tokens of {n}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_slot_serves_what_was_last_copied_into_it() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::on_gpu(family, 1), Reference::open(family));
        let mut worst = Worst::new(&format!("{family}, one slot"));
        for adapter in [0, 2, 3, 1, 2, 0] {
            rig.swap(adapter, 0);
            check_chunks(&mut rig, &reference, Some(adapter), 41, &mut worst);
            check_chunks(&mut rig, &reference, None, 41, &mut worst);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_layered_step_waits_for_each_layer_of_the_adapters_that_are_still_loading() {
    // Many copies ahead of the two that matter: a step that did not wait would read too early.
    const AHEAD: u32 = 60;
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::on_gpu(family, 2 + AHEAD as usize), Reference::open(family));
        let mut worst = Worst::new(&format!("{family}, layered"));
        let tokens: Vec<_> = [2, 3].map(|a| reference.ids("tokens", Some(a))).into();
        let want: Vec<Vec<Vec<f32>>> = [2, 3].map(|a| reference.logits(Some(a))).into();
        for _ in 0..10 {
            rig.swap(0, 0);
            rig.swap(1, 1);
            (2..2 + AHEAD).for_each(|slot| rig.submit_swap(2, slot));
            rig.submit_swap(2, 0);
            rig.submit_swap(3, 1);
            let share =
                |i: usize| Share { place: i as u32, who: Some(i + 2), start: 0, tokens: Some(&tokens[i]) };
            let done = rig.step_while_loading(&[share(0), share(1)], &[0, 1]);
            let steps = done.iter().filter(|c| matches!(c, Completion::Step { .. })).count();
            assert_eq!((steps, done.len()), (1, 3 + AHEAD as usize));
            let stalled: Vec<_> = rig.executor.step_result().stalled.iter().map(|(s, _)| s.0).collect();
            assert_eq!(stalled, [0, 1]);
            for (i, want) in want.iter().enumerate() {
                worst.check(&i, 40, rig.executor.logits(i).unwrap(), &want[40]);
            }
        }
    }
}
