//! When something was under way.

use lora_sched::Nanos;

/// Disjoint spans of time in order. Built in O(n log n); a question costs O(log n) and what it meets.
#[derive(Debug)]
pub(super) struct Spans(Vec<(Nanos, Nanos)>);

impl Spans {
    /// The union of spans, each from its first to its second time.
    pub(super) fn of(spans: impl IntoIterator<Item = (Nanos, Nanos)>) -> Self {
        let mut all: Vec<_> = spans.into_iter().collect();
        all.sort_unstable();
        let mut union: Vec<(Nanos, Nanos)> = Vec::new();
        for (from, to) in all {
            match union.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => union.push((from, to)),
            }
        }
        Self(union)
    }

    /// How much of the time between `from` and `to` they cover.
    pub(super) fn within(&self, from: Nanos, to: Nanos) -> Nanos {
        let first = self.0.partition_point(|span| span.1 <= from);
        let met = self.0[first..].iter().take_while(|span| span.0 < to);
        met.map(|span| span.1.min(to) - span.0.max(from)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_counts_once_and_what_only_touches_not_at_all() {
        let spans = Spans::of([(50, 60), (10, 20), (15, 30), (12, 14), (30, 35), (70, 70)]);
        let asked = [(0, 100), (0, 10), (35, 50), (34, 51), (12, 13), (60, 100), (20, 20)];
        assert_eq!(asked.map(|(from, to)| spans.within(from, to)), [35, 0, 0, 2, 1, 0, 0]);
    }
}
