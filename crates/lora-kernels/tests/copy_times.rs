//! Times of an adapter's copy from page-locked memory, cut into pieces that are counted in a word of device memory:
//! by a write of the stream's own, by a copy of one word, or not at all. Prints only.

mod common;

use std::time::Instant;

use common::device;

/// An adapter of rank 16 for Llama-2-7B, and its layers.
const BYTES: usize = 79_953_920;
const LAYERS: usize = 32;
const CUTS: [&[usize]; 5] = [&[32], &[16, 16], &[1, 3, 9, 19], &[1, 1, 2, 4, 8, 16], &[4; 8]];
const RUNS: usize = 60;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Count {
    No,
    Word,
    Copy,
}

#[test]
#[ignore = "needs an NVIDIA GPU: prints times"]
fn copy_times() {
    let (device, _) = device();
    let stream = device.stream().unwrap();
    let from = device.pinned::<u8>(BYTES).unwrap();
    let to = device.buffer::<u8>(BYTES).unwrap();
    let mut counts = device.pinned::<u32>(LAYERS).unwrap();
    for (layer, count) in counts.iter_mut().enumerate() {
        *count = layer as u32 + 1;
    }
    let counted = device.buffer::<u32>(1).unwrap();
    let at = |layer: usize| layer * (BYTES / LAYERS);
    println!("| pieces | counted | µs: median | least | GB/s |\n| --- | --- | ---: | ---: | ---: |");
    for cut in CUTS {
        let events: Vec<_> = cut.iter().map(|_| device.event(false).unwrap()).collect();
        for count in [Count::No, Count::Word, Count::Copy] {
            let mut us: Vec<f64> = (0..RUNS)
                .map(|_| {
                    let (begun, mut first) = (Instant::now(), 0);
                    for (layers, event) in cut.iter().zip(&events) {
                        let end = first + layers;
                        // SAFETY: both sides have room, and nothing else uses them until the copy has ended.
                        unsafe {
                            let to = to.view().address();
                            stream.copy_in_at(&from[at(first)..at(end)], to + at(first) as u64).unwrap();
                            let word = counted.view().address();
                            match count {
                                Count::No => {}
                                Count::Word => stream.write_word(word, end as u32).unwrap(),
                                Count::Copy => stream.copy_in_at(&counts[end - 1..end], word).unwrap(),
                            }
                        }
                        stream.record(event).unwrap();
                        first = end;
                    }
                    while !events[cut.len() - 1].is_done().unwrap() {
                        std::hint::spin_loop();
                    }
                    begun.elapsed().as_secs_f64() * 1e6
                })
                .collect();
            us.sort_by(f64::total_cmp);
            let median = us[RUNS / 2];
            let rate = BYTES as f64 / median * 1e-3;
            println!("| {cut:?} | {count:?} | {median:.1} | {:.1} | {rate:.2} |", us[0]);
        }
    }
}
