//! Dummy values drawn on the device, bit for bit those of another implementation of ChaCha8.

mod common;

use common::{device, download, poisoned};
use lora_kernels::twins::draw::uniform;
use lora_kernels::{CudaError, Draw, Uniform, bf16};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// What the host draws.
fn on_host(from: &Uniform, len: usize) -> Vec<bf16> {
    let mut rng = ChaCha8Rng::from_seed(from.key);
    // The stream is entered at words of two values.
    rng.set_word_pos(from.skip as u128 / 2);
    let mut bytes = vec![0; 2 * (from.skip % 2 + len)];
    rng.fill_bytes(&mut bytes);
    uniform(&bytes[2 * (from.skip % 2)..], from.bound, from.centre)
}

#[test]
fn the_hosts_stream_can_be_entered_anywhere() {
    let from = |skip| Uniform { key: [7; 32], skip, bound: 0.5, centre: 0.0 };
    let whole = on_host(&from(0), 5000);
    for skip in [1, 2, 31, 32, 33, 4097] {
        assert_eq!(on_host(&from(skip), 10), whole[skip..skip + 10], "{skip}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn values_are_the_hosts_bit_for_bit() -> Result<(), CudaError> {
    const GUARD: usize = 40;
    let (device, stream) = device();
    let draw = Draw::load(&device)?;
    // The last two: the counter's high word, and the border before it.
    let skips = [0usize, 1, 2, 30, 31, 32, 33, 4094, 1 << 33, (1 << 37) + 6, (1 << 37) - 40];
    let scales = [(0.02f32, 0.0f32), (1.0, 0.0), (0.1, 1.0), (0.3, -2.0)];
    for (i, skip) in skips.into_iter().enumerate() {
        for (j, len) in [1usize, 2, 31, 32, 33, 4096, 4097, 100_003].into_iter().enumerate() {
            let key = std::array::from_fn(|b| (b * 37 + i * 11 + j * 5 + 1) as u8);
            let (bound, centre) = scales[(i + j) % scales.len()];
            let from = Uniform { key, skip, bound, centre };
            let mut out = poisoned(&device, &stream, len + GUARD);
            draw.fill(&stream, &from, out.view_mut().slice(0..len))?;
            let got = download(&stream, &out);
            for (at, (got, want)) in got.iter().zip(&on_host(&from, len)).enumerate() {
                assert!(
                    got.to_bits() == want.to_bits(),
                    "{len} values after {skip}, ± {bound} around {centre}: value {at} is {got}, expected {want}"
                );
            }
            assert!(got[len..].iter().all(|v| v.is_nan()), "{len} values after {skip}: wrote past them");
        }
    }
    // Nothing is nothing.
    let mut out = poisoned(&device, &stream, 4);
    let from = Uniform { key: [1; 32], skip: 0, bound: 1.0, centre: 0.0 };
    draw.fill(&stream, &from, out.view_mut().slice(2..2))?;
    assert!(download(&stream, &out).iter().all(|v| v.is_nan()));
    Ok(())
}
