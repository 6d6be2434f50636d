//! What-if copies: the same engine on a machine with other rates.

use super::{Feature, FeatureError, Kind, Profile, Term};

/// How many times as fast a machine would be; 1 is as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Arithmetic: what grows with the tokens of a step.
    pub compute: f64,
    /// Device memory: what a step reads whatever its tokens (weights), cached context, adapters.
    pub bandwidth: f64,
    /// Copies from host memory.
    pub copy: f64,
    /// The host: step loop, front end, delivery, a swap's fixed cost.
    pub host: f64,
}

/// A factor that is none.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScaleError {
    /// Zero, negative or not a number.
    #[error("{what} is scaled by {value}: give how many times as fast, more than 0")]
    Factor {
        /// Which.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A feature of another version.
    #[error(transparent)]
    Feature(#[from] FeatureError),
}

impl Profile {
    /// A copy with each cost divided by the factor of what bounds it. It is marked as scaled and names
    /// what it was made from. Which bound holds is taken from the feature: what grows with tokens is
    /// arithmetic, and the rest of a step is memory traffic; where a step of few tokens is bound by
    /// memory although its cost is booked by tokens, the copy is off.
    pub fn scaled(&self, by: Scale) -> Result<Self, ScaleError> {
        for (what, value) in
            [("compute", by.compute), ("bandwidth", by.bandwidth), ("copy", by.copy), ("host", by.host)]
        {
            if !(value.is_finite() && value > 0.0) {
                return Err(ScaleError::Factor { what, value });
            }
        }
        let mut copy = self.clone();
        for (name, coef) in copy.step.features.iter_mut().zip(&mut copy.step.coef_ns) {
            let mut term = name.parse::<Term>()?;
            if let Feature::HotRows { from, to } = &mut term.feature {
                // What is hot is a share of what the device can do: the rates in the profile grow with it.
                let scaled = |rate: u64| (rate as f64 * by.compute).round() as u64;
                (*from, *to) = (scaled(*from), to.map(scaled));
                *coef /= by.compute;
                *name = term.to_string();
            }
            *coef /= match term.feature {
                Feature::Step
                | Feature::Decodes { .. }
                | Feature::DecodeContext { .. }
                | Feature::Samples
                | Feature::Adapters
                | Feature::AdapterRanks
                | Feature::Mixed
                | Feature::Lora
                | Feature::LoraRows { .. }
                | Feature::LoraBoth
                | Feature::MixedLora => by.bandwidth,
                Feature::Tokens { .. }
                | Feature::PaddedTokens { .. }
                | Feature::Rows { .. }
                | Feature::HotRows { .. }
                | Feature::PrefillSpan
                | Feature::Prefills { .. }
                | Feature::PrefillPairs
                | Feature::LoraTokens { .. }
                | Feature::LoraTokenRanks => by.compute,
            };
        }
        copy.swap.bytes_per_s *= by.copy;
        copy.swap.busy_bytes_per_s *= by.copy;
        copy.swap.fixed_s /= by.host;
        // Kernels that look whether a layer is there instead of running beside one another.
        copy.swap.reading_s /= by.compute;
        copy.host.loop_s /= by.host;
        copy.host.front_s /= by.host;
        copy.host.tokenize_s_per_byte /= by.host;
        copy.host.handover_s /= by.host;
        copy.host.deliver_s /= by.host;
        copy.kind = Kind::Scaled;
        copy.machine = serde_json::json!({
            "what_if": { "compute": by.compute, "bandwidth": by.bandwidth, "copy": by.copy, "host": by.host },
            "of_profile": self.sha256,
            "of_machine": self.machine,
        });
        Ok(copy.signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::tests::round;

    const SAME: Scale = Scale { compute: 1.0, bandwidth: 1.0, copy: 1.0, host: 1.0 };

    #[test]
    fn each_cost_follows_what_bounds_it() {
        let mut profile = round();
        profile.host.loop_s = 4e-5;
        profile.swap.reading_s = 1e-4;
        let profile = profile.signed();
        let twice = profile.scaled(Scale { bandwidth: 2.0, ..SAME }).unwrap();
        assert_eq!(twice.step.coef_ns, [5e5, 2e4]);
        let half = profile.scaled(Scale { compute: 0.5, copy: 4.0, host: 2.0, ..SAME }).unwrap();
        assert_eq!(half.step.coef_ns, [1e6, 4e4]);
        assert_eq!((half.swap.bytes_per_s, half.host.loop_s, half.swap.reading_s), (4e9, 2e-5, 2e-4));
    }

    #[test]
    fn a_faster_device_is_busy_at_a_higher_rate() {
        let mut profile = round();
        profile.step.features.push("mixed/hot_rows:200-400".to_owned());
        profile.step.coef_ns.push(8.0);
        let twice = profile.signed().scaled(Scale { compute: 2.0, ..SAME }).unwrap();
        assert_eq!(twice.step.features.last().unwrap(), "mixed/hot_rows:400-800");
        assert_eq!(twice.step.coef_ns.last(), Some(&2.0));
    }

    #[test]
    fn a_copy_is_marked_names_its_origin_and_reads_back() {
        let copy = round().scaled(Scale { compute: 2.0, ..SAME }).unwrap();
        assert_eq!(copy.kind, Kind::Scaled);
        assert_eq!(copy.machine["of_profile"], round().sha256);
        let text = serde_json::to_string(&copy).unwrap();
        assert_eq!(Profile::parse("copy", &text).unwrap(), copy);
    }

    #[test]
    fn impossible_factors_are_refused() {
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = round().scaled(Scale { copy: value, ..SAME }).unwrap_err().to_string();
            assert!(error.contains("copy"), "{error}");
        }
    }
}
