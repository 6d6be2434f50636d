//! How settings and their values are written and ordered in a figure.

/// Text that sorts by value where it is a number and else by when it was first seen, which is the
/// order in which the experiment lists it.
#[derive(Clone, Debug)]
pub struct Natural {
    number: Option<f64>,
    seen: usize,
    /// As it is in the column.
    pub text: String,
}

impl Natural {
    /// `order` collects the texts in the order in which they come.
    pub fn new(text: String, order: &mut Vec<String>) -> Self {
        let seen = order.iter().position(|t| *t == text).unwrap_or_else(|| {
            order.push(text.clone());
            order.len() - 1
        });
        Self { number: text.parse().ok().filter(|n: &f64| n.is_finite()), seen, text }
    }
}

impl PartialEq for Natural {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Natural {}

impl PartialOrd for Natural {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Natural {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let by_number = match (self.number, other.number) {
            (Some(a), Some(b)) => a.total_cmp(&b),
            (a, b) => b.is_some().cmp(&a.is_some()),
        };
        by_number.then(self.seen.cmp(&other.seen))
    }
}

/// A setting's value in words.
pub fn describe(column: &str, value: &str) -> String {
    let value = if value.is_empty() { "unknown" } else { value };
    match column {
        "model" => value.to_owned(),
        "total_loras" => format!("{value} adapters"),
        "prompt_regime" => format!("{value} prompts"),
        "arrival_rate" => format!("{} requests/s", short(value)),
        "rho" => format!("load ρ {value}"),
        "popularity" => format!("{} popularity", proper(value)),
        "arrivals" => format!("{} arrivals", proper(value)),
        "evict" => format!("{} eviction", proper(value)),
        "swap_mode" => format!("{value} swaps"),
        "max_num_seqs" => format!("up to {value} sequences"),
        "num_requests" => format!("{value} requests a run"),
        "max_tokens" => format!("{value} output tokens"),
        _ => format!("{column} {value}"),
    }
}

/// A number to three decimals, which a rate computed from a load has more of.
fn short(value: &str) -> String {
    match value.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.001 => ((number * 1e3).round() / 1e3).to_string(),
        _ => value.to_owned(),
    }
}

/// Names and abbreviations as they are written in text.
fn proper(word: &str) -> String {
    match word.split_once(':') {
        Some((law, parameter)) => format!("{} {parameter}", proper(law)),
        None => match word {
            "poisson" => "Poisson".to_owned(),
            "zipf" => "Zipf".to_owned(),
            "lru" | "lfu" | "fifo" => word.to_uppercase(),
            _ => word.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_by_value_and_words_as_they_came() {
        let mut order = Vec::new();
        let mut values: Vec<_> =
            ["short", "16", "long", "2"].map(|t| Natural::new(t.to_owned(), &mut order)).into();
        values.sort();
        let texts: Vec<_> = values.iter().map(|v| v.text.as_str()).collect();
        assert_eq!(texts, ["2", "16", "short", "long"]);
    }

    #[test]
    fn settings_read_as_words() {
        assert_eq!(describe("popularity", "zipf:1.1"), "Zipf 1.1 popularity");
        assert_eq!(describe("rank", "8+64"), "rank 8+64");
        assert_eq!(describe("policy", ""), "policy unknown");
        assert_eq!(describe("arrival_rate", "6.141610130267201"), "6.142 requests/s");
        assert_eq!(describe("arrival_rate", "2"), "2 requests/s");
        assert_eq!(describe("arrival_rate", "0.0004"), "0.0004 requests/s");
    }
}
