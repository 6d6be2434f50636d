//! Identifiers and units.

use std::fmt;

/// Nanoseconds on the driver's clock: monotonic wall time in an engine, virtual time in a simulator.
pub type Nanos = u64;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A request, numbered by the driver. Ids must rise from one arrival to the next; gaps are fine.
    RequestId(u64)
);
id!(
    /// An adapter: its index in [`Config::adapters`](crate::Config::adapters).
    AdapterId(u32)
);
id!(
    /// A slot: device memory for one adapter, `0..gpu_loras`.
    SlotId(u32)
);
id!(
    /// A sequence place, `0..max_num_seqs`: where an executor keeps one running sequence's state.
    PlaceId(u32)
);
