//! The prompts that a workload draws from: lengths, and texts where there are any.

use rand::seq::SliceRandom as _;

use super::lengths;
use super::regime::Regime;
use super::streams::stream;

/// A prompt's length, and its text where it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolPrompt {
    /// Length in tokens, BOS included.
    pub tokens: u32,
    /// The text.
    pub text: Option<String>,
}

/// Prompts of one regime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptPool {
    /// Where they come from, for headers and results.
    pub source: String,
    /// The prompts, in the order of their source.
    pub prompts: Vec<PoolPrompt>,
}

impl PromptPool {
    /// The embedded lengths of real prompts, without texts.
    pub fn embedded(regime: Regime) -> Self {
        let prompts =
            lengths::in_regime(regime).map(|l| PoolPrompt { tokens: l.prompt_tokens, text: None }).collect();
        Self { source: lengths::SOURCE.to_owned(), prompts }
    }

    /// Indices of prompts in the order that a workload of this seed uses them: shuffled. A workload that
    /// needs more goes over them again.
    pub fn order(&self, seed: u64) -> Vec<u32> {
        let mut order: Vec<usize> = (0..self.prompts.len()).collect();
        order.shuffle(&mut stream(seed, "lengths"));
        order.into_iter().map(|i| i as u32).collect()
    }
}
