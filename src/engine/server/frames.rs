//! The reference's `/generate` messages, spelled as it spells them. A message repeats prompt and output so
//! far; both are escaped once, when they come.

use std::fmt::Write;

use crate::report::record::PartsS;

/// What the last message adds.
#[derive(Clone, Debug)]
pub(super) struct Summary {
    pub(super) model_id: Option<i64>,
    pub(super) completion_s: f64,
    pub(super) parts: Option<PartsS>,
    pub(super) prompt_tokens: usize,
    /// Of all sequences together.
    pub(super) output_tokens: usize,
    /// One for each sequence.
    pub(super) finish_reasons: Vec<&'static str>,
}

/// The text of each sequence, as the inside of a JSON string.
#[derive(Clone, Debug)]
pub(super) struct Frames {
    texts: Vec<String>,
    ttft_s: Option<f64>,
}

impl Frames {
    /// `n` sequences that go on from `prompt`.
    pub(super) fn new(prompt: &str, n: usize) -> Self {
        Self { texts: vec![escaped(prompt); n], ttft_s: None }
    }

    /// Sequence `i` goes on with `text`.
    pub(super) fn push(&mut self, i: usize, text: &str) {
        self.texts[i].push_str(&escaped(text));
    }

    /// The TTFT; the first one stays.
    pub(super) fn set_ttft(&mut self, seconds: f64) {
        self.ttft_s.get_or_insert(seconds);
    }

    /// One message of a stream, its NUL byte included; the last one has a summary.
    pub(super) fn message(&self, last: Option<&Summary>) -> String {
        let mut out = self.open();
        out.push_str(if last.is_some() { ", \"finished\": true" } else { ", \"finished\": false" });
        if let Some(ttft) = self.ttft_s {
            // Writing into a string cannot fail.
            let _ = write!(out, ", \"ttft\": {ttft}");
        }
        if let Some(summary) = last {
            out.push_str(&format!(", \"completion_time\": {}", summary.completion_s));
            append(&mut out, summary);
        }
        out.push_str("}\0");
        out
    }

    /// The one object of an answer that is not streamed.
    pub(super) fn whole(&self, summary: &Summary) -> String {
        let mut out = self.open();
        let model_id = summary.model_id.map_or_else(|| "null".to_owned(), |id| id.to_string());
        let ttft = self.ttft_s.map_or_else(|| "null".to_owned(), |s| s.to_string());
        let completion = summary.completion_s;
        out.push_str(&format!(
            ", \"model_id\": {model_id}, \"ttft\": {ttft}, \"completion_time\": {completion}"
        ));
        append(&mut out, summary);
        out.push('}');
        out
    }

    fn open(&self) -> String {
        let size = self.texts.iter().map(|t| t.len() + 4).sum::<usize>() + 512;
        let mut out = String::with_capacity(size);
        out.push_str("{\"text\": [");
        for (i, text) in self.texts.iter().enumerate() {
            out.push_str(if i == 0 { "\"" } else { ", \"" });
            out.push_str(text);
            out.push('"');
        }
        out.push(']');
        out
    }
}

fn append(out: &mut String, summary: &Summary) {
    if let Some(p) = summary.parts {
        let PartsS { front, queue, kv, slot, swap, prefill, deliver } = p;
        out.push_str(&format!(
            ", \"ttft_parts\": {{\"front\": {front}, \"queue\": {queue}, \"kv\": {kv}, \"slot\": {slot}, \
             \"swap\": {swap}, \"prefill\": {prefill}, \"deliver\": {deliver}}}"
        ));
    }
    let reasons: Vec<String> = summary.finish_reasons.iter().map(|r| format!("\"{r}\"")).collect();
    out.push_str(&format!(
        ", \"finish_reasons\": [{}], \"prompt_tokens\": {}, \"output_tokens\": {}",
        reasons.join(", "),
        summary.prompt_tokens,
        summary.output_tokens
    ));
}

/// `text` as the inside of a JSON string.
fn escaped(text: &str) -> String {
    let mut quoted = serde_json::Value::from(text).to_string();
    quoted.pop();
    quoted.remove(0);
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            model_id: Some(5),
            completion_s: 0.5,
            parts: Some(PartsS { prefill: 0.25, ..PartsS::default() }),
            prompt_tokens: 3,
            output_tokens: 2,
            finish_reasons: vec!["length"],
        }
    }

    #[test]
    fn stream_messages_are_the_references_byte_for_byte() {
        let mut frames = Frames::new("say \"hi\"\n", 1);
        frames.push(0, " é\u{0}");
        frames.set_ttft(0.0234);
        frames.set_ttft(9.0);
        assert_eq!(
            frames.message(None),
            "{\"text\": [\"say \\\"hi\\\"\\n é\\u0000\"], \"finished\": false, \"ttft\": 0.0234}\0"
        );
        let last = frames.message(Some(&summary()));
        assert!(last.contains("\"finished\": true, \"ttft\": 0.0234, \"completion_time\": 0.5"), "{last}");
        let value: serde_json::Value = serde_json::from_str(last.trim_end_matches('\0')).unwrap();
        assert_eq!(value["text"][0], "say \"hi\"\n é\u{0}");
        assert_eq!(value["ttft_parts"]["prefill"], 0.25);
        assert_eq!(last.matches('\0').count(), 1);
    }

    #[test]
    fn the_whole_answer_has_the_references_keys_first() {
        let mut frames = Frames::new("a", 2);
        frames.push(0, "b");
        frames.push(1, "c");
        frames.set_ttft(0.25);
        let whole = frames.whole(&summary());
        let begins = "{\"text\": [\"ab\", \"ac\"], \"model_id\": 5, \"ttft\": 0.25, \"completion_time\": 0.5";
        assert!(whole.starts_with(begins), "{whole}");
        assert!(serde_json::from_str::<serde_json::Value>(&whole).is_ok());
    }
}
