//! Requests JSONL: one request a line, no header.

use std::path::{Path, PathBuf};

use super::files::{self, FileError};
use super::record::RequestRecord;

/// A requests file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RequestsError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// A line that is no request.
    #[error("{} line {line} is not a request: {source}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A request that JSON cannot hold, such as one with a time that is no number.
    #[error("cannot write request {id} to {}: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// The request's number.
        id: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Appends whole lines in one write; creates the file where it is missing.
pub fn append_requests(path: impl AsRef<Path>, records: &[RequestRecord]) -> Result<(), RequestsError> {
    let path = path.as_ref();
    let mut text = Vec::new();
    for record in records {
        serde_json::to_writer(&mut text, record).map_err(|source| RequestsError::Encode {
            path: path.to_owned(),
            id: record.id,
            source,
        })?;
        text.push(b'\n');
    }
    Ok(files::append(path, &text)?)
}

/// All requests of a file, in its order; empty lines and `#` lines are skipped.
pub fn read_requests(path: impl AsRef<Path>) -> Result<Vec<RequestRecord>, RequestsError> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|(i, line)| {
            serde_json::from_str(line).map_err(|source| RequestsError::Line {
                path: path.to_owned(),
                line: i + 1,
                source,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::record::{PartsS, Status};

    fn record(id: u64) -> RequestRecord {
        RequestRecord {
            id,
            adapter: Some(3),
            rank: Some(8),
            prompt_tokens: 300,
            output_tokens: 16,
            scheduled_s: 0.5,
            sent_s: 0.51,
            first_s: Some(0.6),
            last_s: Some(0.8),
            ttft_s: Some(0.08),
            latency_s: Some(0.29),
            status: Status::Ok,
            parts: Some(PartsS { prefill: 0.08, ..PartsS::default() }),
            error: None,
        }
    }

    #[test]
    fn what_is_appended_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        append_requests(&path, &[record(0), record(1)]).unwrap();
        append_requests(&path, &[record(2)]).unwrap();
        assert_eq!(read_requests(&path).unwrap(), vec![record(0), record(1), record(2)]);
    }

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        append_requests(&path, &[record(0)]).unwrap();
        files::append(&path, b"{\"id\": 1}\n").unwrap();
        let error = read_requests(&path).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("missing field"), "{error}");
    }
}
