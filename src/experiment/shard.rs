//! Splitting an experiment's cells over machines that do not talk to each other.

use std::fmt;
use std::str::FromStr;

/// Part `index` of `count`, counted from 1; as text `1/4`. A cell belongs to exactly one part,
/// which follows from its key alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: u64,
    count: u64,
}

impl Shard {
    /// Whether a cell with this key belongs to this part.
    pub fn contains(self, key: &str) -> bool {
        u64::from_str_radix(key, 16).is_ok_and(|hash| hash % self.count == self.index - 1)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = UnknownShard;

    fn from_str(text: &str) -> Result<Self, UnknownShard> {
        text.split_once('/')
            .and_then(|(index, count)| Some(Self { index: index.parse().ok()?, count: count.parse().ok()? }))
            .filter(|s| s.index >= 1 && s.index <= s.count)
            .ok_or_else(|| UnknownShard(text.to_owned()))
    }
}

/// Text that is no part of a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a shard: write I/N with I from 1 to N, such as 1/4")]
pub struct UnknownShard(String);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_only_parts_of_a_whole() {
        assert_eq!("2/4".parse::<Shard>().unwrap().to_string(), "2/4");
        for bad in ["0/4", "5/4", "1/0", "1", "a/b", "-1/4"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_cell_is_in_exactly_one_part(hash: u64, count in 1u64..20) {
            let key = format!("{hash:016x}");
            let parts = (1..=count).filter(|i| format!("{i}/{count}").parse::<Shard>().unwrap().contains(&key));
            prop_assert_eq!(parts.count(), 1);
        }
    }
}
