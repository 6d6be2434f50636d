//! Watching before sleeping. A thread that sleeps takes 10 µs to wake, in a virtual machine 80: of a decode's step, which
//! goes to another thread and back, that is some per cent. Whoever waits for something that a GPU is about to bring keeps
//! looking for it instead, where there are cores to spare.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Cores from which on a few threads may look instead of sleeping.
#[cfg(feature = "cuda")]
const CORES: usize = 8;

/// How long threads look for what they wait for before they sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Watch {
    /// They sleep at once: what they wait for needs the cores itself, or cores are few.
    Sleep,
    /// Who waits for a device keeps looking; who waits for another thread looks for [`Watch::SOON`].
    Look,
}

impl Watch {
    /// What another thread does next comes within this time, or not soon: a plan takes some tens of microseconds, and so
    /// does putting an adapter's copies on the stream.
    const SOON: Duration = Duration::from_micros(200);

    /// What this machine's cores allow.
    #[cfg(feature = "cuda")]
    pub(in crate::engine) fn of_machine() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        if cores < CORES { Self::Sleep } else { Self::Look }
    }

    /// Whether who waits for a device keeps looking.
    pub(in crate::engine) fn looks(self) -> bool {
        self == Self::Look
    }

    /// Between two looks. Lets others run on this core: who was just woken by this thread often waits for it, until the
    /// scheduler's next tick if the thread spins, 3 to 4 ms.
    pub(in crate::engine) fn pause() {
        std::thread::yield_now();
    }

    /// What `look` finds soon; none if it is to be waited for asleep.
    pub(in crate::engine) fn soon<T>(self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if let Some(found) = look() {
            return Some(found);
        }
        if !self.looks() {
            return None;
        }
        let until = Instant::now() + Self::SOON;
        while Instant::now() < until {
            Self::pause();
            if let Some(found) = look() {
                return Some(found);
            }
        }
        None
    }
}

/// Tells whoever waits, looking or asleep, that something behind a lock has changed.
#[derive(Default)]
pub(in crate::engine) struct Signal {
    sleepers: Condvar,
    /// How often something was told; changed under the lock.
    told: AtomicU64,
}

impl Signal {
    /// Gives the lock back and tells.
    pub(in crate::engine) fn tell<T>(&self, changed: MutexGuard<'_, T>) {
        self.told.fetch_add(1, Ordering::Release);
        drop(changed);
        self.sleepers.notify_all();
    }

    /// Gives the lock back, waits until something is told, and takes it again.
    pub(in crate::engine) fn wait<'a, T>(
        &self,
        of: &'a Mutex<T>,
        state: MutexGuard<'a, T>,
        looking: bool,
    ) -> MutexGuard<'a, T> {
        if !looking {
            return self.sleepers.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let seen = self.told.load(Ordering::Acquire);
        drop(state);
        while self.told.load(Ordering::Acquire) == seen {
            Watch::pause();
        }
        of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found_either_way() {
        for watch in [Watch::Sleep, Watch::Look] {
            assert_eq!(watch.soon(|| Some(1)), Some(1), "{watch:?}");
            assert_eq!(watch.soon(|| None::<u32>), None, "{watch:?}");
        }
    }

    #[test]
    fn only_who_looks_finds_what_comes_later() {
        let third = |watch: Watch| {
            let mut looks = 0;
            watch.soon(|| {
                looks += 1;
                (looks == 3).then_some(looks)
            })
        };
        assert_eq!(third(Watch::Look), Some(3));
        assert_eq!(third(Watch::Sleep), None);
    }
}
