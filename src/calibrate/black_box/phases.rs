//! What is timed, one thing after the other, on a server that has nothing else to do.

use rand::seq::SliceRandom as _;

use super::asker::{Ask, Asker, decode_step_s};
use super::{BlackBoxError, BlackBoxSample};
use crate::workload::streams::stream;

/// Output of requests whose decodes are timed.
const DECODED: u32 = 48;
/// Prompt of the same.
const SHORT_PROMPT: u32 = 32;
/// How often a batch is made, at most, whose sequences do not decode together for long enough.
const TRIES: u32 = 3;

/// Prompt lengths from 16 to `longest`, each half as long again as the one before, and whether the fit sees
/// them: every third is held out, the ends never.
pub(super) fn lengths(longest: u32) -> Vec<(u32, bool)> {
    let mut lengths: Vec<u32> =
        std::iter::successors(Some(16u32), |n| Some(n * 3 / 2)).take_while(|n| *n < longest).collect();
    lengths.push(longest);
    let last = lengths.len() - 1;
    lengths.into_iter().enumerate().map(|(i, n)| (n, i % 3 == 2 && i != last)).collect()
}

/// One adapter, in its slot throughout, with prompts of every length.
pub(super) async fn resident(
    asker: &mut Asker<'_>,
    samples: &mut Vec<BlackBoxSample>,
    mut progress: impl FnMut(f64),
) -> Result<(), BlackBoxError> {
    let options = asker.options();
    let each = lengths(options.longest);
    let mut order: Vec<(u32, bool)> = (0..options.repeats).flat_map(|_| each.iter().copied()).collect();
    // A drift of the machine must not look like an effect of the length.
    order.shuffle(&mut stream(options.seed, "black-box"));
    let last = options.gpu_loras - 1;
    // Whatever came before, from here on it is resident.
    asker.one("a resident adapter", Ask { adapter: last, prompt: 16, output: 1 }).await?;
    for (i, &(prompt, held_out)) in order.iter().enumerate() {
        let seen = asker.one("a resident adapter", Ask { adapter: last, prompt, output: 1 }).await?;
        samples.push(BlackBoxSample::Resident {
            held_out,
            prompt_tokens: seen.prompt_tokens,
            ttft_ns: seen.ttft_s * 1e9,
        });
        progress(i as f64 / order.len() as f64);
    }
    Ok(())
}

/// In turn through all adapters: under LRU, and under FIFO, each has been evicted when its turn comes.
pub(super) async fn not_resident(
    asker: &mut Asker<'_>,
    samples: &mut Vec<BlackBoxSample>,
    mut progress: impl FnMut(f64),
) -> Result<(), BlackBoxError> {
    let options = asker.options();
    let seen_lengths: Vec<u32> = lengths(options.longest).iter().filter(|l| !l.1).map(|l| l.0).collect();
    let shortest = seen_lengths[0];
    let prompts = [shortest, seen_lengths[seen_lengths.len() / 2]];
    // One round to bring the server's order in line with ours, then those that count.
    let rotation = options.total_loras.min(2 * options.gpu_loras + 2);
    let count = (4 * options.repeats).max(rotation);
    for i in 0..rotation + count {
        let ask = Ask { adapter: i % rotation, prompt: prompts[i as usize % 2], output: 1 };
        let seen = asker.one("an adapter that is not resident", ask).await?;
        if i >= rotation {
            samples.push(BlackBoxSample::NotResident {
                prompt_tokens: seen.prompt_tokens,
                ttft_ns: seen.ttft_s * 1e9,
            });
        }
        progress(f64::from(i) / f64::from(rotation + count));
    }
    Ok(())
}

/// Batches of several sizes and contexts.
pub(super) async fn decodes(
    asker: &mut Asker<'_>,
    samples: &mut Vec<BlackBoxSample>,
    mut progress: impl FnMut(f64),
) -> Result<(), BlackBoxError> {
    let options = asker.options();
    let mut batches: Vec<u32> =
        std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < options.max_num_seqs).collect();
    batches.push(options.max_num_seqs);
    let last = batches.len() - 1;
    // Batches of short contexts, each third held out, and a few of one long context and one adapter.
    let slots = options.gpu_loras;
    let mut grid: Vec<(u32, u32, u32, bool)> = batches
        .iter()
        .enumerate()
        .map(|(i, &batch)| (batch, SHORT_PROMPT, batch.min(slots), i % 3 == 1 && i != last))
        .collect();
    let long = (options.longest / 2).max(SHORT_PROMPT);
    grid.push((1, long, 1, false));
    grid.push((batches[last / 2], long, 1, false));
    grid.push((options.max_num_seqs, SHORT_PROMPT, 1, false));
    let rounds = options.repeats.clamp(1, 3);
    let total = grid.len() * rounds as usize;
    for i in 0..total {
        let (batch, prompt, adapters, held_out) = grid[i % grid.len()];
        // All of them resident before the batch, so that no swap falls into it.
        for adapter in 0..adapters {
            asker.one("a resident adapter", Ask { adapter, prompt: 16, output: 1 }).await?;
        }
        let asks: Vec<Ask> =
            (0..batch).map(|n| Ask { adapter: n % adapters, prompt, output: DECODED }).collect();
        let what = format!("a batch of {batch}");
        let mut seen = None;
        for _ in 0..TRIES {
            // A delay of the client's or the server's can keep one sequence apart from the others.
            seen = decode_step_s(&asker.together(&what, &asks).await?);
            if seen.is_some() {
                break;
            }
        }
        let (step_s, context) = seen.ok_or(BlackBoxError::TooFewMessages { batch })?;
        samples.push(BlackBoxSample::Decode { held_out, batch, context, adapters, step_ns: step_s * 1e9 });
        progress(i as f64 / total as f64);
    }
    Ok(())
}
