//! The CPU engine against transformers and peft: `scripts/make_fixtures.py` made the references.

use lora_hbm::engine::executor::{Completion, Executor};

use crate::rig::{EVERYONE, Reference, Rig, Share, distance};

const FAMILIES: [&str; 2] = ["llama", "opt"];

/// Absolute, in f32.
const TOLERANCE: f32 = 1e-4;

/// Feeds `tokens` in chunks and compares the logits at every chunk's end.
fn check_chunks(rig: &mut Rig, reference: &Reference, who: Option<usize>, chunk: usize) {
    let family = reference.family();
    rig.in_chunks(reference, who, chunk, |position, got, want| {
        let off = distance(got, want);
        assert!(off < TOLERANCE, "{family} {who:?}, chunks of {chunk}, position {position}: off by {off}");
    });
}

#[test]
fn prefill_whole_chunked_and_token_by_token_gives_the_reference_logits() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::new(family, 4, 1), Reference::open(family));
        for who in EVERYONE {
            for chunk in [1, 3, 7, 16, 41] {
                check_chunks(&mut rig, &reference, who, chunk);
            }
        }
    }
}

#[test]
fn two_threads_give_the_same_logits() {
    let (mut rig, reference) = (Rig::new("llama", 4, 2), Reference::open("llama"));
    check_chunks(&mut rig, &reference, Some(2), 41);
}

#[test]
fn batches_of_mixed_adapters_ranks_and_lengths_give_the_reference_logits() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::new(family, 4, 1), Reference::open(family));
        rig.in_mixed_batches(&reference, [5, 1, 9, 2, 13, 1], |who, position, got, want| {
            let off = distance(got, want);
            assert!(off < TOLERANCE, "{family} {who:?} position {position}: off by {off}");
        });
    }
}

#[test]
fn greedy_tokens_of_a_mixed_batch_are_those_of_each_alone_and_of_the_reference() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::new(family, 4, 1), Reference::open(family));
        let prompts: Vec<_> = EVERYONE.iter().map(|who| reference.ids("prompt", *who)).collect();
        let want: Vec<_> = EVERYONE.iter().map(|who| reference.ids("greedy", *who)).collect();
        for who in EVERYONE {
            let least = reference.values("margin", who).into_iter().fold(f32::INFINITY, f32::min);
            assert!(least > 10.0 * TOLERANCE, "{family} {who:?}: the reference nearly ties ({least})");
        }
        let n = want[0].len();
        assert_eq!(rig.greedy(&EVERYONE, &prompts, n), want, "{family}: mixed batch");
        for (i, who) in EVERYONE.iter().enumerate() {
            let alone = rig.greedy(&[*who], &prompts[i..=i], n);
            assert_eq!(alone[0], want[i], "{family} {who:?}: alone");
        }
    }
}

#[test]
fn a_slot_serves_what_was_last_copied_into_it() {
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::new(family, 1, 1), Reference::open(family));
        // Ranks go up and down, so that a smaller adapter lies over the rest of a larger one.
        for adapter in [0, 2, 3, 1, 2, 0] {
            rig.swap(adapter, 0);
            check_chunks(&mut rig, &reference, Some(adapter), 41);
            check_chunks(&mut rig, &reference, None, 41);
        }
    }
}

#[test]
fn a_running_sequence_goes_on_after_its_adapter_moved_to_another_slot() {
    let (mut rig, reference) = (Rig::new("llama", 2, 1), Reference::open("llama"));
    let (tokens, want) = (reference.ids("tokens", Some(0)), reference.logits(Some(0)));
    rig.step(&[Share { place: 0, who: Some(0), start: 0, tokens: Some(&tokens[..20]) }]);
    rig.swap(3, 0);
    rig.swap(0, 1);
    rig.step(&[Share { place: 0, who: Some(0), start: 20, tokens: Some(&tokens[20..]) }]);
    assert!(distance(rig.executor.logits(0).unwrap(), &want[40]) < TOLERANCE);
}

#[test]
fn a_layered_step_waits_for_each_layer_of_the_adapters_that_are_still_loading() {
    // Many copies ahead of the two that matter: a step that did not wait would read too early.
    const AHEAD: u32 = 60;
    for family in FAMILIES {
        let (mut rig, reference) = (Rig::new(family, 2 + AHEAD as usize, 1), Reference::open(family));
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
                assert!(distance(rig.executor.logits(i).unwrap(), &want[40]) < TOLERANCE);
            }
        }
    }
}
