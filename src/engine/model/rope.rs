//! How rotary frequencies are slowed for contexts longer than the model was first trained on.

use std::f64::consts::TAU;

use serde_json::Value;

/// What becomes of the rotary frequencies.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Nothing.
    #[default]
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// See above.
        factor: f64,
    },
    /// Llama 3's: slow frequencies are divided by `factor`, fast ones are kept, those between are mixed.
    Llama3 {
        /// See above.
        factor: f64,
        /// Frequencies that turn fewer times than this within `original_positions` are slow.
        low_freq_factor: f64,
        /// Those that turn more often than this are fast.
        high_freq_factor: f64,
        /// Positions of the first training.
        original_positions: f64,
    },
    /// `[head_dim / 2]` what each frequency is divided by, as GGUF files have it.
    Divisors(Vec<f32>),
}

/// A scaling that cannot be used.
#[derive(Debug, PartialEq)]
pub(super) enum RopeError {
    /// Of a type that is not implemented.
    Unsupported(String),
    /// A field that is missing or out of range.
    Field(&'static str),
}

impl RopeScaling {
    /// Reads `rope_scaling` or `rope_parameters` of a `config.json`.
    pub(super) fn parse(value: &Value) -> Result<Self, RopeError> {
        let number = |field| {
            let found = value.get(field).and_then(Value::as_f64);
            found.filter(|v| v.is_finite() && *v > 0.0).ok_or(RopeError::Field(field))
        };
        let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: number("factor")? }),
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if high <= low {
                    return Err(RopeError::Field("high_freq_factor"));
                }
                Ok(Self::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions: number("original_max_position_embeddings")?,
                })
            }
            Some(other) => Err(RopeError::Unsupported(other.to_owned())),
        }
    }

    /// What the `index`-th frequency, `frequency` radians a position unscaled, becomes.
    pub fn scale(&self, index: usize, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Divisors(divisors) => frequency / divisors.get(index).map_or(1.0, |d| f64::from(*d)),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let turns = original_positions * frequency / TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;
    use serde_json::json;

    #[test]
    fn linear_divides_every_frequency() {
        let linear = RopeScaling::parse(&json!({"type": "linear", "factor": 4.0})).unwrap();
        assert_eq!(linear.scale(3, 0.5), 0.125);
        assert_eq!(
            RopeScaling::parse(&json!({"rope_type": "default", "rope_theta": 1e4})),
            Ok(RopeScaling::None)
        );
    }

    /// `ROPE_INIT_FUNCTIONS["llama3"]` of transformers 5.23 with theta 500000 and heads of 64: two fast
    /// ones, three between, two slow ones.
    const LLAMA3: [(u32, f64); 7] = [
        (3, 0.2922278344631195),
        (13, 0.00483942124992609),
        (15, 0.0012905480107292533),
        (16, 0.000429556705057621),
        (17, 9.708286233944818e-05),
        (18, 1.9461638657958247e-05),
        (30, 1.4192720243499934e-07),
    ];

    #[test]
    fn llama3_gives_the_frequencies_of_transformers() {
        let scaling = RopeScaling::parse(&json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }))
        .unwrap();
        for (index, expected) in LLAMA3 {
            let frequency = 500_000f64.powf(-2.0 * f64::from(index) / 64.0);
            assert_relative_eq!(scaling.scale(index as usize, frequency), expected, max_relative = 1e-5);
        }
    }

    #[test]
    fn what_is_missing_or_not_implemented_is_named() {
        let parse = |value| RopeScaling::parse(&value).unwrap_err();
        assert_eq!(parse(json!({"type": "linear"})), RopeError::Field("factor"));
        assert_eq!(parse(json!({"type": "linear", "factor": 0})), RopeError::Field("factor"));
        assert_eq!(parse(json!({"rope_type": "yarn", "factor": 2})), RopeError::Unsupported("yarn".into()));
        let llama3 =
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0});
        assert_eq!(parse(llama3), RopeError::Field("high_freq_factor"));
    }
}
