//! ShareGPT conversations, streamed from the JSON array that they are published as.
//!
//! The copy that package registries carry is cut off in the middle of a record. Its whole records
//! are kept and the reader says what it dropped; anything else that is wrong is an error, with the
//! record's number and the byte where it is. Memory is that of one record.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A record longer than this many bytes is no conversation but a file gone wrong.
const LONGEST_RECORD: usize = 64 << 20;

/// What was in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareGptReport {
    /// Whole records.
    pub records: u64,
    /// Whole records with a human turn.
    pub with_human_turn: u64,
    /// Bytes after the last whole record of a file that was cut off; none if the array was closed.
    pub dropped_bytes: Option<u64>,
}

impl ShareGptReport {
    /// What was dropped, to be shown; none if nothing was.
    pub fn said(&self) -> Option<String> {
        self.dropped_bytes.map(|bytes| {
            format!(
                "the file is cut off in record {}: kept {} whole records and dropped the last {bytes} bytes",
                self.records + 1,
                self.records
            )
        })
    }
}

/// A file that is not ShareGPT's.
#[derive(Debug, thiserror::Error)]
pub enum ShareGptError {
    /// The file system said no.
    #[error("cannot read the dataset {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something that is neither a conversation nor the cut-off end of one.
    #[error("the dataset {} is malformed at byte {byte} (record {record}): {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where, from 0.
        byte: u64,
        /// In which record, from 1.
        record: u64,
        /// What is wrong.
        message: String,
    },
}

#[derive(Deserialize)]
struct Record<'a> {
    #[serde(borrow, default)]
    conversations: Vec<Turn<'a>>,
}

#[derive(Deserialize)]
struct Turn<'a> {
    #[serde(borrow, default)]
    from: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    value: Option<Cow<'a, str>>,
}

/// Reads one conversation at a time: an iterator over first human turns, `None` for a record without one.
#[derive(Debug)]
pub struct ShareGptReader<R = BufReader<File>> {
    input: R,
    path: PathBuf,
    /// Bytes consumed.
    at: u64,
    record: Vec<u8>,
    state: State,
    report: ShareGptReport,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before `[`.
    Start,
    /// Between records: after `[` (a record may follow at once) or after a record (a comma must come first).
    Between { comma: bool },
    /// At the end, or after an error.
    Done,
}

impl ShareGptReader {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, ShareGptError> {
        let file = File::open(path).map_err(|source| ShareGptError::Io { path: path.to_owned(), source })?;
        Ok(Self::new(BufReader::with_capacity(1 << 18, file), path))
    }
}

impl<R: BufRead> ShareGptReader<R> {
    /// Reads from `input`; `path` is what errors call it.
    pub fn new(input: R, path: &Path) -> Self {
        Self {
            input,
            path: path.to_owned(),
            at: 0,
            record: Vec::new(),
            state: State::Start,
            report: ShareGptReport::default(),
        }
    }

    /// What has been read so far; whole once the iterator has ended.
    pub fn report(&self) -> ShareGptReport {
        self.report
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.at
    }

    fn malformed(&self, byte: u64, message: impl Into<String>) -> ShareGptError {
        let record = self.report.records + 1;
        ShareGptError::Malformed { path: self.path.clone(), byte, record, message: message.into() }
    }

    fn fill(&mut self) -> Result<&[u8], ShareGptError> {
        self.input.fill_buf().map_err(|source| ShareGptError::Io { path: self.path.clone(), source })
    }

    /// Skips white space; the next byte, not consumed.
    fn peek(&mut self) -> Result<Option<u8>, ShareGptError> {
        loop {
            let buffer = self.fill()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let spaces = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
            let found = buffer.get(spaces).copied();
            self.consume(spaces);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn consume(&mut self, bytes: usize) {
        self.input.consume(bytes);
        self.at += bytes as u64;
    }

    /// The first human turn of the next record; `None` after the last.
    fn advance(&mut self) -> Result<Option<Option<String>>, ShareGptError> {
        if self.state == State::Start {
            match self.peek()? {
                Some(b'[') => self.consume(1),
                Some(_) => return Err(self.malformed(self.at, "it is not a JSON array of conversations")),
                None => return Err(self.malformed(self.at, "it is empty")),
            }
            self.state = State::Between { comma: false };
        }
        let State::Between { comma } = self.state else { return Ok(None) };
        let last_whole = self.at;
        match self.peek()? {
            Some(b']') => {
                self.consume(1);
                self.state = State::Done;
                return match self.peek()? {
                    None => Ok(None),
                    Some(_) => Err(self.malformed(self.at, "something follows the array's end")),
                };
            }
            Some(b',') if comma => self.consume(1),
            Some(_) if !comma => {}
            Some(other) => {
                let message = format!("expected ',' or ']', found '{}'", char::from(other).escape_default());
                return Err(self.malformed(self.at, message));
            }
            None => return Ok(self.cut_off(last_whole)),
        }
        let start = match self.peek()? {
            Some(b'{') => self.at,
            Some(other) => {
                let message =
                    format!("expected a conversation, found '{}'", char::from(other).escape_default());
                return Err(self.malformed(self.at, message));
            }
            None => return Ok(self.cut_off(last_whole)),
        };
        let whole = self.scan_record()?;
        match serde_json::from_slice::<Record<'_>>(&self.record) {
            Ok(record) if whole => {
                let human = record.conversations.into_iter().find(|t| t.from.as_deref() == Some("human"));
                let text = human.and_then(|t| t.value).map(Cow::into_owned);
                self.report.records += 1;
                self.report.with_human_turn += u64::from(text.is_some());
                self.state = State::Between { comma: true };
                Ok(Some(text))
            }
            // The scanner saw no end because the file has none: what there is must be a beginning.
            Err(e) if !whole && e.is_eof() => Ok(self.cut_off(last_whole)),
            Ok(_) => Err(self.malformed(start, "the record's brackets do not match")),
            Err(e) => Err(self.malformed(start + offset_in(&self.record, &e), e.to_string())),
        }
    }

    fn cut_off(&mut self, last_whole: u64) -> Option<Option<String>> {
        self.state = State::Done;
        self.report.dropped_bytes = Some(self.at - last_whole);
        None
    }

    /// Copies the record at the current position into `record`, up to the bracket that closes it.
    /// False if the file ends first.
    fn scan_record(&mut self) -> Result<bool, ShareGptError> {
        self.record.clear();
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        loop {
            let buffer = self
                .input
                .fill_buf()
                .map_err(|source| ShareGptError::Io { path: self.path.clone(), source })?;
            if buffer.is_empty() {
                return Ok(false);
            }
            let mut end = None;
            for (i, &byte) in buffer.iter().enumerate() {
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                    continue;
                }
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            end = Some(i + 1);
                            break;
                        }
                    }
                    _ => {}
                }
            }
            let taken = end.unwrap_or(buffer.len());
            self.record.extend_from_slice(&buffer[..taken]);
            self.consume(taken);
            if end.is_some() {
                return Ok(true);
            }
            if self.record.len() > LONGEST_RECORD {
                let message = format!("a record of more than {LONGEST_RECORD} bytes");
                return Err(self.malformed(self.at - self.record.len() as u64, message));
            }
        }
    }
}

impl<R: BufRead> Iterator for ShareGptReader<R> {
    type Item = Result<Option<String>, ShareGptError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance().transpose();
        if matches!(next, Some(Err(_))) {
            self.state = State::Done;
        }
        next
    }
}

/// Where in `record` serde found the error that it tells by line and column.
fn offset_in(record: &[u8], error: &serde_json::Error) -> u64 {
    let lines_before = error.line().saturating_sub(1);
    let line_start = record
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'\n')
        .nth(lines_before.wrapping_sub(1))
        .map_or(0, |(i, _)| i + 1);
    (line_start + error.column().saturating_sub(1)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"[{"id":"a","conversations":[{"from":"gpt","value":"x"},{"from":"human","value":"one \"{[\" \u00f1"}]},
 {"id":"b","conversations":[]},
 {"id":"c","conversations":[{"from":"human","value":"three\\"},{"from":"human","value":"later"}]} ]
"#;

    /// First human turns and the report, read through a buffer so small that everything crosses its edges.
    fn read(text: &[u8]) -> Result<(Vec<Option<String>>, ShareGptReport), ShareGptError> {
        let mut reader = ShareGptReader::new(BufReader::with_capacity(3, text), Path::new("d.json"));
        let turns = reader.by_ref().collect::<Result<Vec<_>, _>>()?;
        Ok((turns, reader.report()))
    }

    #[test]
    fn first_human_turns_are_read() {
        let (turns, report) = read(WHOLE.as_bytes()).unwrap();
        assert_eq!(turns, [Some("one \"{[\" ñ".to_owned()), None, Some("three\\".to_owned())]);
        assert_eq!(report, ShareGptReport { records: 3, with_human_turn: 2, dropped_bytes: None });
        assert_eq!(report.said(), None);
    }

    #[test]
    fn a_file_cut_off_anywhere_keeps_its_whole_records() {
        let ends: Vec<usize> = ["]},\n {\"id\":\"b", "]},\n {\"id\":\"c", "later\"}]} ]"]
            .iter()
            .map(|s| WHOLE.find(s).unwrap())
            .collect();
        let ends = [ends[0] + 2, ends[1] + 2, ends[2] + 9];
        let closed = WHOLE.rfind(']').unwrap();
        for cut in 1..=closed {
            let (turns, report) =
                read(&WHOLE.as_bytes()[..cut]).unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
            let kept = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!((turns.len(), report.records), (kept, kept as u64), "cut at {cut}");
            let last = if kept == 0 { 1 } else { ends[kept - 1] };
            assert_eq!(report.dropped_bytes, Some((cut - last) as u64), "cut at {cut}");
            assert!(report.said().unwrap().contains(&format!("kept {kept} whole records")));
        }
    }

    #[test]
    fn malformed_files_are_errors_with_record_and_byte() {
        let broken = |from: &str, to: &str| WHOLE.replacen(from, to, 1);
        for (text, record, expected) in [
            (String::new(), 1, "empty"),
            (r#"{"conversations":[]}"#.to_owned(), 1, "not a JSON array"),
            (broken("[{\"id\"", "[7,{\"id\""), 1, "expected a conversation"),
            (broken(r#""id":"b","#, r#""id":oops,"#), 2, "expected value"),
            (broken("]},\n {\"id\":\"c", "}],\n {\"id\":\"c"), 2, "expected"),
            (broken("]},\n {\"id\":\"b", "]}\n {\"id\":\"b"), 2, "expected ',' or ']'"),
            (broken("[]},", "5},"), 2, "invalid type"),
            // An unclosed string swallows the rest of the file; that is not a cut-off file.
            (broken(r#""id":"b","#, r#""id":"b,"#), 2, "expected"),
            (format!("{WHOLE} more"), 4, "follows the array's end"),
        ] {
            let error = read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(&format!("record {record}")) && error.contains(expected), "{error}");
            assert!(error.contains("d.json is malformed at byte "), "{error}");
        }
        let text = broken(r#""id":"b","#, r#""id":oops,"#);
        let error = read(text.as_bytes()).unwrap_err().to_string();
        let byte = text.find("oops").unwrap();
        assert!(error.contains(&format!("at byte {byte} ")), "{error}: expected {byte}");
        let mut bad_utf8 = WHOLE.as_bytes().to_vec();
        bad_utf8[WHOLE.find("three").unwrap()] = 0xff;
        assert!(read(&bad_utf8).unwrap_err().to_string().contains("record 3"));
    }
}
