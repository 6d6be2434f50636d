//! What every device asks of an executor's options.

use crate::engine::batch::BatchLimits;
use crate::engine::model::{Family, ModelSpec};

/// Why no device can run the model with these, if so.
pub(in crate::engine) fn check_options(
    spec: &ModelSpec,
    limits: &BatchLimits,
    allowed_tokens: Option<&[bool]>,
) -> Result<(), String> {
    if spec.family == Family::Opt && limits.max_model_len > spec.max_positions {
        return Err(format!(
            "max_model_len {} is over {}'s {} learned positions: lower it",
            limits.max_model_len, spec.name, spec.max_positions
        ));
    }
    match allowed_tokens {
        Some(mask) if mask.len() != spec.vocab_size => {
            Err(format!("a mask of {} tokens for a vocabulary of {}", mask.len(), spec.vocab_size))
        }
        Some(mask) if !mask.contains(&true) => Err("no token may be sampled".into()),
        _ => Ok(()),
    }
}
