//! A list of arrivals: what the load generator sends and what the simulator replays.
//!
//! On disk it is JSONL: a header line, then a line a request. Reading streams; writing goes to a
//! temporary file that is then renamed.

use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic::write_atomically;

/// The version of the format that is written and read.
pub const SCHEMA: u32 = 1;

/// [`TraceHeader::popularity`] of a trace whose requests have no adapters yet.
pub const NO_ADAPTERS: &str = "none";

/// One arrival.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Its number, from 0.
    pub id: u64,
    /// Seconds from the trace's start.
    pub arrival_s: f64,
    /// Prompt length in the model's tokens, BOS included.
    pub prompt_tokens: u32,
    /// Output length.
    pub output_tokens: u32,
    /// The adapter; none is the base model.
    pub adapter: Option<u32>,
    /// The adapter's rank, where the trace knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// The text, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
}

/// The first line of a trace file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceHeader {
    /// Version of the format: [`SCHEMA`].
    pub schema: u32,
    /// Where lengths and arrivals come from, with the attribution that their licence asks for.
    pub source: String,
    /// The seed that it was made with.
    pub seed: u64,
    /// How adapters were drawn (`uniform`, `zipf:1`, `trace`, `none`): synthetic unless it says `trace`.
    pub popularity: String,
}

/// Arrivals in order of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Where it comes from.
    pub header: TraceHeader,
    /// The arrivals; times never go back.
    pub requests: Vec<TraceRequest>,
}

/// A trace that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file system said no.
    #[error("cannot {what} the trace {}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The first line is no header.
    #[error(
        "{}: line 1 is not a trace's header ({{\"schema\":1,\"source\":…,\"seed\":…,\"popularity\":…}}): {message}; \
         other formats are taken in with `lora-hbm trace import`", path.display()
    )]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A request that makes no sense.
    #[error("{}: line {line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        message: String,
    },
    /// Nothing in it.
    #[error("the trace {} has no requests", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Trace {
    /// Reads a whole file. An empty trace is an error.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let mut reader = TraceReader::open(path)?;
        let header = reader.header().clone();
        let requests = reader.by_ref().collect::<Result<Vec<_>, _>>()?;
        if requests.is_empty() {
            return Err(TraceError::Empty { path: path.to_owned() });
        }
        Ok(Self { header, requests })
    }

    /// Writes a whole file, all of it or nothing.
    pub fn write(&self, path: &Path) -> Result<(), TraceError> {
        write_atomically(path, |out| {
            serde_json::to_writer(&mut *out, &self.header)?;
            out.write_all(b"\n")?;
            for request in &self.requests {
                serde_json::to_writer(&mut *out, request)?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })
        .map_err(|source| TraceError::Io { what: "write", path: path.to_owned(), source })
    }

    /// Seconds from the trace's start to its last arrival.
    pub fn duration_s(&self) -> f64 {
        self.requests.last().map_or(0.0, |r| r.arrival_s)
    }

    /// Arrivals a second over the trace's duration; none for fewer than two arrivals or no duration.
    pub fn mean_rate(&self) -> Option<f64> {
        let duration = self.duration_s();
        (self.requests.len() > 1 && duration > 0.0).then(|| self.requests.len() as f64 / duration)
    }

    /// The output tokens of every request, if all have the same.
    pub fn common_output_tokens(&self) -> Option<u32> {
        let first = self.requests.first()?.output_tokens;
        self.requests.iter().all(|r| r.output_tokens == first).then_some(first)
    }

    /// One more than the highest adapter, as far as it can be counted; 0 if no request names one.
    pub fn adapters(&self) -> u32 {
        self.requests.iter().filter_map(|r| r.adapter).max().map_or(0, |a| a.saturating_add(1))
    }
}

/// Reads a trace file one request at a time. Blank lines and lines that begin with `#` are skipped.
#[derive(Debug)]
pub struct TraceReader<R = BufReader<File>> {
    input: R,
    path: PathBuf,
    header: TraceHeader,
    line: u64,
    text: String,
    last: Option<(u64, f64)>,
    failed: bool,
}

impl TraceReader {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let file = File::open(path).map_err(|source| TraceError::Io {
            what: "read",
            path: path.to_owned(),
            source,
        })?;
        Self::new(BufReader::with_capacity(1 << 16, file), path)
    }
}

impl<R: BufRead> TraceReader<R> {
    /// Reads from `input`; `path` is what errors call it.
    pub fn new(input: R, path: &Path) -> Result<Self, TraceError> {
        let header =
            TraceHeader { schema: SCHEMA, source: String::new(), seed: 0, popularity: String::new() };
        let path = path.to_owned();
        let mut reader =
            Self { input, path, header, line: 0, text: String::new(), last: None, failed: false };
        let refused =
            |reader: &Self, message: String| TraceError::Header { path: reader.path.clone(), message };
        if !reader.next_line()? {
            return Err(refused(&reader, "the file is empty".to_owned()));
        }
        let header: TraceHeader =
            serde_json::from_str(&reader.text).map_err(|e| refused(&reader, e.to_string()))?;
        if header.schema != SCHEMA {
            let message = format!("its schema is {} and this version reads schema {SCHEMA}", header.schema);
            return Err(refused(&reader, message));
        }
        reader.header = header;
        Ok(reader)
    }

    /// The first line.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Reads the next line that holds something; false at the end.
    fn next_line(&mut self) -> Result<bool, TraceError> {
        loop {
            self.text.clear();
            self.line += 1;
            match self.input.read_line(&mut self.text) {
                Ok(0) => return Ok(false),
                Ok(_) if self.text.trim().is_empty() || self.text.starts_with('#') => {}
                Ok(_) => return Ok(true),
                Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                    return Err(self.wrong("it is not UTF-8".to_owned()));
                }
                Err(source) => {
                    return Err(TraceError::Io { what: "read", path: self.path.clone(), source });
                }
            }
        }
    }

    fn wrong(&self, message: String) -> TraceError {
        TraceError::Line { path: self.path.clone(), line: self.line, message }
    }

    fn next_request(&mut self) -> Result<Option<TraceRequest>, TraceError> {
        if !self.next_line()? {
            return Ok(None);
        }
        let request: TraceRequest =
            serde_json::from_str(&self.text).map_err(|e| self.wrong(format!("not a request: {e}")))?;
        check(&request, self.last).map_err(|message| self.wrong(message))?;
        self.last = Some((request.id, request.arrival_s));
        Ok(Some(request))
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = Result<TraceRequest, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.next_request().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

/// What every request of a trace must satisfy, given the id and the time of the one before it.
pub(super) fn check(request: &TraceRequest, last: Option<(u64, f64)>) -> Result<(), String> {
    if let Some((id, arrival_s)) = last {
        if request.id <= id {
            return Err(format!("id {} comes after id {id}: ids must rise", request.id));
        }
        if request.arrival_s < arrival_s {
            return Err(format!(
                "arrival_s {} is before the previous request's {arrival_s}: sort the file by time",
                request.arrival_s
            ));
        }
    }
    if !request.arrival_s.is_finite() || request.arrival_s < 0.0 {
        return Err(format!("arrival_s is {}: it must be a number of seconds, 0 or more", request.arrival_s));
    }
    if request.prompt_tokens == 0 || request.output_tokens == 0 {
        return Err(format!(
            "prompt_tokens is {} and output_tokens {}: both must be at least 1",
            request.prompt_tokens, request.output_tokens
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<TraceRequest>, TraceError> {
        TraceReader::new(text.as_bytes(), Path::new("t.jsonl"))?.collect()
    }

    const HEADER: &str = r#"{"schema":1,"source":"test","seed":7,"popularity":"uniform"}"#;

    #[test]
    fn a_trace_survives_writing_and_reading() {
        let trace = Trace {
            header: serde_json::from_str(HEADER).unwrap(),
            requests: (0..3)
                .map(|id| TraceRequest {
                    id,
                    arrival_s: id as f64 / 3.0,
                    prompt_tokens: 300,
                    output_tokens: 16,
                    adapter: (id != 1).then_some(5),
                    rank: (id == 2).then_some(8),
                    prompt: (id == 0).then(|| "a\nb".to_owned()),
                })
                .collect(),
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        trace.write(&path).unwrap();
        assert_eq!(Trace::read(&path).unwrap(), trace);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
        assert_eq!(trace.adapters(), 6);
    }

    #[test]
    fn comments_and_blank_lines_are_skipped_and_unknown_fields_ignored() {
        let text = format!(
            "{HEADER}\n\n# later\n{}\n",
            r#"{"id":4,"arrival_s":0,"prompt_tokens":1,"output_tokens":1,"adapter":null,"hash_ids":[1]}"#
        );
        assert_eq!(read(&text).unwrap().len(), 1);
    }

    #[test]
    fn errors_name_the_line() {
        let good = r#"{"id":1,"arrival_s":1,"prompt_tokens":9,"output_tokens":9,"adapter":0}"#;
        for (line, expected) in [
            ("nonsense", "not a request"),
            (r#"{"id":2,"arrival_s":1}"#, "missing field"),
            (r#"{"id":2,"arrival_s":0.5,"prompt_tokens":9,"output_tokens":9,"adapter":0}"#, "before"),
            (r#"{"id":1,"arrival_s":2,"prompt_tokens":9,"output_tokens":9,"adapter":0}"#, "ids must rise"),
            (r#"{"id":2,"arrival_s":2,"prompt_tokens":0,"output_tokens":9,"adapter":0}"#, "at least 1"),
            (r#"{"id":2,"arrival_s":2,"prompt_tokens":4,"output_tokens":9,"adapter":-1}"#, "not a request"),
        ] {
            let error = read(&format!("{HEADER}\n{good}\n{line}\n")).unwrap_err().to_string();
            assert!(error.contains("t.jsonl: line 3") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn times_before_the_start_are_refused() {
        let line = r#"{"id":2,"arrival_s":-2,"prompt_tokens":4,"output_tokens":9,"adapter":0}"#;
        let error = read(&format!("{HEADER}\n{line}\n")).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("0 or more"), "{error}");
    }

    #[test]
    fn other_files_are_refused_with_the_way_to_take_them_in() {
        for text in ["", "TIMESTAMP,ContextTokens\n", r#"{"schema":2,"source":"","seed":0,"popularity":""}"#]
        {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("trace import"), "{error}");
        }
        let missing = Trace::read(Path::new("/nowhere/t.jsonl")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/t.jsonl"), "{missing}");
    }
}
