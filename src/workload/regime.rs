//! The two ranges of prompt lengths that the experiment compares.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A range of prompt lengths in tokens, BOS and both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Regime {
    /// 256 to 1024 tokens.
    #[default]
    Short,
    /// 2048 to 4096 tokens.
    Long,
}

impl Regime {
    /// Its lengths.
    pub fn tokens(self) -> RangeInclusive<u32> {
        match self {
            Self::Short => 256..=1024,
            Self::Long => 2048..=4096,
        }
    }

    /// The name that users type.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Long => "long",
        }
    }
}

impl fmt::Display for Regime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Regime {
    type Err = UnknownRegime;

    fn from_str(text: &str) -> Result<Self, UnknownRegime> {
        match text {
            "short" => Ok(Self::Short),
            "long" => Ok(Self::Long),
            _ => Err(UnknownRegime(text.to_owned())),
        }
    }
}

/// Neither `short` nor `long`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown prompt regime '{0}': use short (256-1024 tokens) or long (2048-4096 tokens)")]
pub struct UnknownRegime(String);
