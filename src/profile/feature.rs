//! What a step's cost is a sum of: counts of its composition, by name.

use std::fmt;
use std::str::FromStr;

use super::StepShape;

/// A count of a step's composition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// One a step.
    Step,
    /// The tokens of the step that lie between `from` and `to`: `tokens:64-512` is how far the
    /// count reaches into that range. A set of adjoining ranges makes a piecewise-linear function,
    /// monotone when no coefficient is negative.
    Tokens {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// The tokens of a step with prefills, rounded up to a multiple of 64 rows, likewise in a range: what a
    /// device computes that runs such steps in a finite set of shapes.
    PaddedTokens {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// The rows that a GPU computes of a step, [`rounded_rows`](super::rounded_rows) of its tokens, likewise in a
    /// range.
    Rows {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// One a step with prefills.
    Mixed,
    /// One a step in which some sequence has an adapter.
    Lora,
    /// One a step with prefills in which some sequence has an adapter.
    MixedLora,
    /// The rows of a step in which some sequence has an adapter, likewise in a range: the kernels of its adapters have
    /// room for as many.
    LoraRows {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// One a step with prefills and decodes in which some sequence has an adapter: the two have kernels of their own.
    LoraBoth,
    /// The rows of a step with prefills, each as many times as [`StepShape::recent`] reaches into a range: what a
    /// device takes longer for that has computed much of late.
    HotRows {
        /// Lower end, in hundreds of tokens a second.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::prefill_span`].
    PrefillSpan,
    /// [`StepShape::prefills`] between `from` and `to`, likewise.
    Prefills {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::prefill_pairs`].
    PrefillPairs,
    /// [`StepShape::decodes`] between `from` and `to`, likewise.
    Decodes {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::decode_context`] between `from` and `to`, likewise: keys and values of a large
    /// batch do not fit where those of a small one do.
    DecodeContext {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::samples`].
    Samples,
    /// [`StepShape::adapters`].
    Adapters,
    /// [`StepShape::adapter_ranks`].
    AdapterRanks,
    /// [`StepShape::lora_tokens`] between `from` and `to`, likewise: adapters of many rows have kernels of their own.
    LoraTokens {
        /// Lower end.
        from: u64,
        /// Upper end; none is unbounded.
        to: Option<u64>,
    },
    /// [`StepShape::lora_token_ranks`].
    LoraTokenRanks,
}

/// A name that is no feature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown step feature '{0}' in the profile: it is from another version of this program")]
pub struct FeatureError(String);

impl Feature {
    /// Its value for a step.
    pub fn of(self, shape: &StepShape) -> u64 {
        let (count, from, to) = self.range();
        let counts = shape.counts();
        within(counts[count], from, to) * counts[self.times()]
    }

    /// Which of the shape's counts that is multiplied by.
    pub(super) fn times(self) -> usize {
        if matches!(self, Self::HotRows { .. }) { StepShape::ROWS } else { StepShape::ONE }
    }

    /// Which of the shape's counts it looks at, and between which values.
    pub(super) fn range(self) -> (usize, u64, u64) {
        let (count, from, to) = match self {
            Self::Step => (StepShape::ONE, 0, None),
            Self::Tokens { from, to } => (StepShape::TOKENS, from, to),
            Self::PaddedTokens { from, to } => (StepShape::PADDED_TOKENS, from, to),
            Self::Rows { from, to } => (StepShape::ROWS, from, to),
            Self::Mixed => (StepShape::MIXED, 0, None),
            Self::Lora => (StepShape::LORA, 0, None),
            Self::MixedLora => (StepShape::MIXED_LORA, 0, None),
            Self::LoraRows { from, to } => (StepShape::LORA_ROWS, from, to),
            Self::LoraBoth => (StepShape::LORA_BOTH, 0, None),
            Self::HotRows { from, to } => (StepShape::RECENT, from, to),
            Self::PrefillSpan => (StepShape::PREFILL_SPAN, 0, None),
            Self::Prefills { from, to } => (StepShape::PREFILLS, from, to),
            Self::PrefillPairs => (StepShape::PREFILL_PAIRS, 0, None),
            Self::Decodes { from, to } => (StepShape::DECODES, from, to),
            Self::DecodeContext { from, to } => (StepShape::DECODE_CONTEXT, from, to),
            Self::Samples => (StepShape::SAMPLES, 0, None),
            Self::Adapters => (StepShape::ADAPTERS, 0, None),
            Self::AdapterRanks => (StepShape::ADAPTER_RANKS, 0, None),
            Self::LoraTokens { from, to } => (StepShape::LORA_TOKENS, from, to),
            Self::LoraTokenRanks => (StepShape::LORA_TOKEN_RANKS, 0, None),
        };
        (count, from, to.unwrap_or(u64::MAX))
    }
}

/// Rows that [`Feature::PaddedTokens`] rounds up to a multiple of.
pub const PADDED_TO: u64 = 64;

/// How far `count` reaches into a range.
pub(super) fn within(count: u64, from: u64, to: u64) -> u64 {
    count.min(to).saturating_sub(from)
}

const NAMES: [(Feature, &str); 11] = [
    (Feature::Step, "step"),
    (Feature::Mixed, "mixed"),
    (Feature::Lora, "lora"),
    (Feature::MixedLora, "mixed_lora"),
    (Feature::LoraBoth, "lora_both"),
    (Feature::PrefillSpan, "prefill_span"),
    (Feature::PrefillPairs, "prefill_pairs"),
    (Feature::Samples, "samples"),
    (Feature::Adapters, "adapters"),
    (Feature::AdapterRanks, "adapter_ranks"),
    (Feature::LoraTokenRanks, "lora_token_ranks"),
];

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = match self {
            Self::Tokens { from, to } => Some(("tokens", from, to)),
            Self::PaddedTokens { from, to } => Some(("padded_tokens", from, to)),
            Self::Rows { from, to } => Some(("rows", from, to)),
            Self::DecodeContext { from, to } => Some(("decode_context", from, to)),
            Self::Prefills { from, to } => Some(("prefills", from, to)),
            Self::Decodes { from, to } => Some(("decodes", from, to)),
            Self::LoraTokens { from, to } => Some(("lora_tokens", from, to)),
            Self::LoraRows { from, to } => Some(("lora_rows", from, to)),
            Self::HotRows { from, to } => Some(("hot_rows", from, to)),
            _ => None,
        };
        if let Some((name, from, to)) = range {
            write!(f, "{name}:{from}-")?;
            return to.map_or(Ok(()), |to| write!(f, "{to}"));
        }
        NAMES.iter().find(|n| n.0 == *self).map_or(Ok(()), |n| f.write_str(n.1))
    }
}

impl FromStr for Feature {
    type Err = FeatureError;

    fn from_str(s: &str) -> Result<Self, FeatureError> {
        let unknown = || FeatureError(s.to_owned());
        if let Some((name, range)) = s.split_once(':') {
            let (from, to) = range.split_once('-').ok_or_else(unknown)?;
            let from = from.parse().map_err(|_| unknown())?;
            let to = if to.is_empty() { None } else { Some(to.parse().map_err(|_| unknown())?) };
            return match name {
                "tokens" => Ok(Self::Tokens { from, to }),
                "padded_tokens" => Ok(Self::PaddedTokens { from, to }),
                "rows" => Ok(Self::Rows { from, to }),
                "decode_context" => Ok(Self::DecodeContext { from, to }),
                "prefills" => Ok(Self::Prefills { from, to }),
                "decodes" => Ok(Self::Decodes { from, to }),
                "lora_tokens" => Ok(Self::LoraTokens { from, to }),
                "lora_rows" => Ok(Self::LoraRows { from, to }),
                "hot_rows" => Ok(Self::HotRows { from, to }),
                _ => Err(unknown()),
            };
        }
        // As profiles had them before they had ranges.
        if ["lora_tokens", "prefills", "decodes"].contains(&s) {
            return format!("{s}:0-").parse();
        }
        NAMES.iter().find(|n| n.1 == s).map(|n| n.0).ok_or_else(unknown)
    }
}

/// Which steps a term is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steps {
    /// All.
    All,
    /// Those of decodes alone.
    Decode,
    /// Those with prefills.
    Mixed,
}

/// One term of a step's cost: a feature, in all steps or in one kind of them. A kind with terms of its own is
/// fitted apart: what hides behind something else in one kind (launches behind arithmetic) costs nothing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// Where it counts.
    pub steps: Steps,
    /// What is counted.
    pub feature: Feature,
}

const KINDS: [(Steps, &str); 2] = [(Steps::Decode, "decode/"), (Steps::Mixed, "mixed/")];

impl Term {
    /// Its value for a step.
    pub fn of(self, shape: &StepShape) -> u64 {
        if self.counts_in(shape.prefills > 0) { self.feature.of(shape) } else { 0 }
    }

    /// Whether it counts in steps with prefills, or in those without.
    pub(super) fn counts_in(self, mixed: bool) -> bool {
        match self.steps {
            Steps::All => true,
            Steps::Decode => !mixed,
            Steps::Mixed => mixed,
        }
    }
}

impl From<Feature> for Term {
    fn from(feature: Feature) -> Self {
        Self { steps: Steps::All, feature }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = KINDS.iter().find(|k| k.0 == self.steps).map_or("", |k| k.1);
        write!(f, "{kind}{}", self.feature)
    }
}

impl FromStr for Term {
    type Err = FeatureError;

    fn from_str(s: &str) -> Result<Self, FeatureError> {
        let of_kind = KINDS.iter().find_map(|(steps, prefix)| Some((*steps, s.strip_prefix(prefix)?)));
        let (steps, name) = of_kind.unwrap_or((Steps::All, s));
        let feature = name.parse().map_err(|_| FeatureError(s.to_owned()))?;
        Ok(Self { steps, feature })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_have_names_that_read_back() {
        let ranges = [
            Feature::Tokens { from: 0, to: Some(64) },
            Feature::PaddedTokens { from: 64, to: Some(128) },
            Feature::Rows { from: 16, to: Some(24) },
            Feature::DecodeContext { from: 64, to: None },
            Feature::LoraTokens { from: 0, to: None },
            Feature::Prefills { from: 4, to: Some(5) },
            Feature::Decodes { from: 0, to: Some(1) },
            Feature::LoraRows { from: 4, to: Some(8) },
            Feature::HotRows { from: 100, to: None },
        ];
        assert_eq!("lora_tokens".parse(), Ok(ranges[4]));
        assert_eq!("prefills".parse(), Ok(Feature::Prefills { from: 0, to: None }));
        for feature in NAMES.map(|n| n.0).into_iter().chain(ranges) {
            for steps in [Steps::All, Steps::Decode, Steps::Mixed] {
                let term = Term { steps, feature };
                assert_eq!(term.to_string().parse(), Ok(term));
            }
        }
        for unknown in ["tokens:a-b", "luck:1-2", "prefill/step", "decode/decode/step"] {
            assert!(unknown.parse::<Term>().unwrap_err().to_string().contains(unknown));
        }
    }

    #[test]
    fn token_ranges_make_a_piecewise_linear_function() {
        let ranges = [Feature::Tokens { from: 0, to: Some(64) }, Feature::Tokens { from: 64, to: None }];
        let at = |tokens| ranges.map(|r| r.of(&StepShape { tokens, ..StepShape::default() }));
        assert_eq!(at(10), [10, 0]);
        assert_eq!(at(64), [64, 0]);
        assert_eq!(at(100), [64, 36]);
    }

    #[test]
    fn steps_with_prefills_are_padded() {
        let feature = Feature::PaddedTokens { from: 64, to: Some(512) };
        let at = |tokens, prefills| feature.of(&StepShape { tokens, prefills, ..StepShape::default() });
        assert_eq!([at(64, 1), at(65, 1), at(500, 2), at(900, 1)], [0, 64, 448, 448]);
        assert_eq!(at(500, 0), 0);
    }

    #[test]
    fn rows_are_hot_as_far_as_the_recent_rate_reaches() {
        let hot = Feature::HotRows { from: 100, to: Some(200) };
        let at = |recent| hot.of(&StepShape { tokens: 65, prefills: 1, recent, ..StepShape::default() });
        assert_eq!([at(0), at(100), at(101), at(300)], [0, 0, 128, 12_800]);
    }

    #[test]
    fn a_term_of_one_kind_of_steps_is_nothing_in_the_other() {
        let rows = Feature::Rows { from: 0, to: None };
        let at = |steps, prefills| {
            Term { steps, feature: rows }.of(&StepShape { tokens: 65, prefills, ..StepShape::default() })
        };
        assert_eq!([at(Steps::All, 0), at(Steps::Decode, 0), at(Steps::Mixed, 0)], [128, 128, 0]);
        assert_eq!([at(Steps::All, 1), at(Steps::Decode, 1), at(Steps::Mixed, 1)], [128, 0, 128]);
    }
}
