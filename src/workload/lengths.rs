//! Real prompt and output lengths, embedded: conversations of ShareGPT in Llama-2 tokens, without
//! their text (`sharegpt_8k_llama2` of the sarathi-serve repository, Apache-2.0).

use std::sync::OnceLock;

use super::regime::Regime;

const TABLE: &str = include_str!("../../configs/traces/sharegpt-llama2-lengths.csv");

/// What results say where these lengths were used.
pub const SOURCE: &str =
    "ShareGPT lengths in Llama-2 tokens, embedded (sharegpt_8k_llama2 of sarathi-serve, Apache-2.0)";

/// The file that is embedded, for its hash.
pub fn file() -> &'static str {
    TABLE
}

/// One conversation's lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The prompt's, BOS included.
    pub prompt_tokens: u32,
    /// The answer's.
    pub output_tokens: u32,
}

/// The whole table, in the order of its source.
pub fn table() -> &'static [Lengths] {
    static ROWS: OnceLock<Vec<Lengths>> = OnceLock::new();
    ROWS.get_or_init(|| TABLE.lines().filter_map(parse).collect())
}

/// The rows whose prompts are in `regime`.
pub fn in_regime(regime: Regime) -> impl Iterator<Item = Lengths> {
    table().iter().copied().filter(move |l| regime.tokens().contains(&l.prompt_tokens))
}

/// A row; none for comments and the header. The tests hold that no row is lost this way.
fn parse(line: &str) -> Option<Lengths> {
    let (prompt, output) = line.split_once(',')?;
    Some(Lengths { prompt_tokens: prompt.parse().ok()?, output_tokens: output.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole() {
        assert_eq!(table().len(), 30_731);
        assert_eq!(table()[0], Lengths { prompt_tokens: 74, output_tokens: 918 });
        assert!(table().iter().all(|l| l.prompt_tokens > 0 && l.output_tokens > 0));
    }

    #[test]
    fn regimes_include_both_ends() {
        let short: Vec<u32> = in_regime(Regime::Short).map(|l| l.prompt_tokens).collect();
        assert_eq!(short.len(), 5_879);
        assert_eq!((short.iter().min(), short.iter().max()), (Some(&256), Some(&1024)));
        let long: Vec<u32> = in_regime(Regime::Long).map(|l| l.prompt_tokens).collect();
        assert_eq!(long.len(), 7_269);
        assert_eq!((long.iter().min(), long.iter().max()), (Some(&2048), Some(&4096)));
    }
}
