//! Drives the scheduler on a virtual clock: 32 adapters, 8 slots, one request a millisecond.
//!
//! ```sh
//! cargo run -p lora-sched --example drive
//! ```

use lora_sched::{AdapterId, Arrival, Config, Event, Notice, Outbox, RequestId, Scheduler, StepPlan};

const STEP_NS: u64 = 700_000;
const REQUESTS: u64 = 1000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut scheduler = Scheduler::new(Config::with_adapters(32, 8, 8, 40 << 20))?;
    let (mut plan, mut out) = (StepPlan::default(), Outbox::default());
    let (mut arrived, mut step_end, mut swaps, mut ttft) = (0, None, 0, 0);
    loop {
        // The next event: an arrival each millisecond, or the end of the step. Swaps take no time.
        let arrival = (arrived < REQUESTS).then_some(arrived * 1_000_000);
        let Some(now) = [arrival, step_end].into_iter().flatten().min() else { break };
        if arrival == Some(now) {
            let adapter = Some(AdapterId((arrived * 17 % 32) as u32));
            let id = RequestId(arrived);
            let arrival = Arrival { id, adapter, received: now, prompt_tokens: 500, max_tokens: 16 };
            scheduler.handle(now, Event::Arrive(arrival), &mut out)?;
            arrived += 1;
        } else {
            step_end = None;
            scheduler.handle(now, Event::StepDone { stopped: &[], stalled: &[] }, &mut out)?;
        }
        if scheduler.plan(now, &mut plan, &mut out) {
            step_end = Some(now + STEP_NS);
        }
        while let Some(swap) = out.swaps.pop() {
            swaps += 1;
            scheduler.handle(now, Event::SwapDone(swap.slot), &mut out)?;
        }
        for notice in out.notices.drain(..) {
            if let Notice::FirstToken { parts, .. } = notice {
                ttft += parts.total();
            }
        }
    }
    println!("{REQUESTS} requests, {swaps} swaps, mean TTFT {:.2} ms", ttft as f64 / REQUESTS as f64 / 1e6);
    Ok(())
}
