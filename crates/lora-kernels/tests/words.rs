//! Host memory read by a kernel, against itself.

mod common;

use common::{device, download, upload};
use lora_kernels::HostWords;

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn reads_what_the_host_wrote_last() {
    let (device, stream) = device();
    let words = HostWords::load(&device).unwrap();
    const ROOM: usize = 100_000;
    const POISON: u32 = 0xdead_beef;
    let mut host = device.pinned::<u32>(ROOM).unwrap();
    // The same memory again and again: what was cached of the last round must not come back.
    for (round, count) in [0usize, 1, 3, 4, 5, 511, 512, 513, 4_097, 99_997, 7].into_iter().enumerate() {
        for (i, word) in host.iter_mut().enumerate() {
            *word = (i as u32).wrapping_mul(0x9e37_79b9) ^ round as u32;
        }
        let mut to = upload(&device, &stream, &vec![POISON; ROOM]);
        // SAFETY: the host's words stay until the download below has waited.
        unsafe { words.read(&stream, &host, count, to.view_mut()) }.unwrap();
        let got = download(&stream, &to);
        for i in 0..ROOM {
            let want = if i < count.next_multiple_of(4) { host[i] } else { POISON };
            assert!(got[i] == want, "round {round}, {count} words: word {i} is {:#x}, not {want:#x}", got[i]);
        }
    }
}
