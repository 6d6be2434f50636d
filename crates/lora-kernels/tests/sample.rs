//! Greedy sampling on the device, against the twin.

mod common;

use common::{Random, device, download, upload};
use lora_kernels::twins::sample::argmax;
use lora_kernels::{Argmax, CudaError, Device, Stream};

/// The vocabularies of the presets, and two that end inside a mask's word.
const VOCABS: [usize; 5] = [320, 333, 32_000, 50_265, 50_272];
const ROWS: usize = 37;

/// What the kernel leaves where nothing may come out.
const NOTHING: u32 = u32::MAX;

struct Case<'a> {
    device: &'a Device,
    stream: &'a Stream,
    argmax: Argmax,
}

impl Case<'_> {
    fn check(&mut self, what: &str, vocab: usize, logits: &[f32], allowed: Option<&[u32]>) {
        let n = logits.len() / vocab;
        let (device, stream) = (self.device, self.stream);
        let on_device = upload(device, stream, logits);
        let mask = allowed.map(|words| upload(device, stream, words));
        // Neither an id nor what stands for none.
        let poison = 0xdead_beef;
        let mut ids = upload(device, stream, &vec![poison; n + 1]);
        let mask = mask.as_ref().map(|m| m.view());
        self.argmax.run(stream, n, vocab, on_device.view(), mask, ids.view_mut()).unwrap();
        let ids = download(stream, &ids);
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            let want = argmax(logits, allowed).unwrap_or(NOTHING);
            let at = |id: u32| logits.get(id as usize);
            assert!(
                ids[row] == want,
                "{what}, vocabulary {vocab}, row {row}: {} ({:?}), expected {want} ({:?})",
                ids[row],
                at(ids[row]),
                at(want)
            );
        }
        assert_eq!(ids[n], poison, "{what}, vocabulary {vocab}: wrote past its rows");
    }
}

/// A bit for about one id in `one_in`, at least one of them.
fn mask(random: &mut Random, vocab: usize, one_in: usize) -> Vec<u32> {
    let mut words = vec![0u32; vocab.div_ceil(32)];
    let mut allow = |id: usize| words[id / 32] |= 1 << (id % 32);
    allow(random.below(vocab));
    (0..vocab).filter(|_| random.below(one_in) == 0).for_each(allow);
    words
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_lowest_of_the_likeliest_ids_that_may_come_out() -> Result<(), CudaError> {
    let (device, stream) = device();
    for vocab in VOCABS {
        let mut random = Random::new(vocab as u64);
        let mut case = Case { device: &device, stream: &stream, argmax: Argmax::load(&device, ROWS)? };
        let logits = random.f32s(ROWS * vocab, 8.0);
        // The same kernel again and again: candidates of the call before must be gone.
        case.check("random", vocab, &logits, None);
        let low: Vec<f32> = logits.iter().map(|v| v - 100.0).collect();
        case.check("all negative, after larger ones", vocab, &low, None);
        for one_in in [2, 40, 100_000] {
            let mask = mask(&mut random, vocab, one_in);
            case.check(&format!("random, one in {one_in} allowed"), vocab, &logits, Some(&mask));
        }

        // Nearly every value comes up often.
        let ties: Vec<f32> = logits.iter().map(|v| v.trunc()).collect();
        case.check("ties", vocab, &ties, None);
        case.check("ties, masked", vocab, &ties, Some(&mask(&mut random, vocab, 3)));
        let mut zeros = vec![0.0; vocab];
        zeros[..vocab / 2].fill(-0.0);
        case.check("zeros of both signs", vocab, &zeros, None);

        // The likeliest at each end and at the borders of blocks and words.
        let mut ends = vec![-1.0; ROWS * vocab];
        for (row, logits) in ends.chunks_exact_mut(vocab).enumerate() {
            let places = [0, 31, 32, 255, 256, vocab - 1];
            logits[places[row % places.len()]] = 1.0;
        }
        case.check("ends", vocab, &ends, None);
        // A full mask changes nothing; bits past the vocabulary are nobody's.
        case.check("ends, all allowed", vocab, &ends, Some(&vec![u32::MAX; vocab.div_ceil(32)]));
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn infinities_count_and_nan_does_not() -> Result<(), CudaError> {
    const LEAST: f32 = f32::NEG_INFINITY;
    let (device, stream) = device();
    for vocab in VOCABS {
        let mut random = Random::new(7 + vocab as u64);
        let mut case = Case { device: &device, stream: &stream, argmax: Argmax::load(&device, ROWS)? };
        case.check("all -inf", vocab, &vec![LEAST; 3 * vocab], None);
        let mut words = vec![0u32; vocab.div_ceil(32)];
        words[vocab / 64] = 0b100;
        case.check("all -inf, one allowed", vocab, &vec![LEAST; 3 * vocab], Some(&words));

        let mut logits = random.f32s(ROWS * vocab, 8.0);
        for logit in &mut logits {
            match random.below(4) {
                0 => *logit = f32::NAN,
                1 => *logit = -f32::NAN,
                2 => *logit = LEAST,
                _ => {}
            }
        }
        case.check("NaN and -inf strewn in", vocab, &logits, None);
        logits[vocab / 2] = f32::INFINITY;
        case.check("one infinity", vocab, &logits, None);

        // Nothing may come out: the host sees an id that is none.
        case.check("all NaN", vocab, &vec![f32::NAN; 2 * vocab], None);
        case.check("none allowed", vocab, &logits, Some(&vec![0; vocab.div_ceil(32)]));
        case.check("random, after nothing", vocab, &random.f32s(ROWS * vocab, 8.0), None);
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn more_rows_than_it_was_made_for_are_refused() -> Result<(), CudaError> {
    let (device, stream) = device();
    let mut argmax = Argmax::load(&device, 2)?;
    let logits = device.buffer::<f32>(3 * 320)?;
    let mut ids = device.buffer::<u32>(3)?;
    let said = argmax.run(&stream, 3, 320, logits.view(), None, ids.view_mut()).unwrap_err().to_string();
    assert!(said.contains("3 rows, 2 at most"), "{said}");
    let mask = device.buffer::<u32>(9)?;
    let masked = argmax.run(&stream, 2, 320, logits.view(), Some(mask.view()), ids.view_mut());
    let said = masked.unwrap_err().to_string();
    assert!(said.contains("fewer than 10 words"), "{said}");
    Ok(())
}
