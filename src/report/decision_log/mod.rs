//! The decision log: everything that a scheduler was told, and everything that it decided.
//!
//! JSONL: a [`LogHeader`], then one [`LogLine`] an event in and one a decision out. Every time is in
//! nanoseconds on the engine's clock, and no two events or plans have the same one, so that a replay
//! knows their order. A decision's line is written when what it asked for has ended (its measured times
//! are in it): replay orders decisions by `formed` and `decided`, not by their place in the file.

mod format;

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;

pub use format::{LogHeader, LogLine, LoggedConfig, LoggedEnd, LoggedSeq, SCHEMA};

/// Batches of lines (one a turn of the step loop) that may wait for the writer before the loop does.
const BUFFERED_BATCHES: usize = 1 << 14;

/// Why a log cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system refuses.
    #[error("decision log {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: std::io::Error,
    },
    /// A line that is not one of a decision log.
    #[error("decision log {path}, line {line}: {source}; name a file that `serve --decision-log` wrote")]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A log of another version.
    #[error("decision log {path} has format version {found}; this program reads versions 1 to {SCHEMA}")]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// No header.
    #[error("decision log {path} is empty: name a file that `serve --decision-log` wrote")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a whole log.
///
/// # Errors
/// If the file cannot be read, is of another version, or a line (other than an unfinished last one,
/// which a killed process leaves) is not a log's.
pub fn read(path: &Path) -> Result<(LogHeader, Vec<LogLine>), LogError> {
    let io = |source| LogError::Io { path: path.to_owned(), source };
    let mut lines = BufReader::new(File::open(path).map_err(io)?).lines();
    let first = lines.next().ok_or_else(|| LogError::Empty { path: path.to_owned() })?.map_err(io)?;
    let bad = |line, source| LogError::Line { path: path.to_owned(), line, source };
    let header: LogHeader = serde_json::from_str(&first).map_err(|e| bad(1, e))?;
    if !(1..=SCHEMA).contains(&header.schema) {
        return Err(LogError::Schema { path: path.to_owned(), found: header.schema });
    }
    let mut out = Vec::new();
    let mut lines = lines.enumerate().peekable();
    while let Some((i, line)) = lines.next() {
        match serde_json::from_str(&line.map_err(io)?) {
            Ok(line) => out.push(line),
            Err(e) if e.is_eof() && lines.peek().is_none() => break,
            Err(e) => return Err(bad(i + 2, e)),
        }
    }
    Ok((header, out))
}

/// Where the step loop puts its lines.
#[derive(Debug)]
pub struct DecisionLog(Sink);

#[derive(Debug)]
enum Sink {
    Memory(Arc<Mutex<Vec<LogLine>>>),
    File { lines: Option<SyncSender<Vec<LogLine>>>, writer: Option<JoinHandle<Result<(), LogError>>> },
}

impl DecisionLog {
    /// A log in memory, and the lines as they come.
    pub fn in_memory() -> (Self, Arc<Mutex<Vec<LogLine>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        (Self(Sink::Memory(lines.clone())), lines)
    }

    /// A log in a new file, written by its own thread so that the step loop never waits for a disk
    /// that is less than 16,384 turns behind.
    ///
    /// # Errors
    /// If the file cannot be created or the header not be written.
    pub fn to_file(path: &Path, header: &LogHeader) -> Result<Self, LogError> {
        let path = path.to_owned();
        let io = |source| LogError::Io { path: path.clone(), source };
        let mut out = BufWriter::new(File::create(&path).map_err(io)?);
        write_line(&mut out, header).and_then(|()| out.flush()).map_err(io)?;
        let (sender, receiver) = sync_channel::<Vec<LogLine>>(BUFFERED_BATCHES);
        let name = path.clone();
        let writer = std::thread::Builder::new()
            .name("decision-log".into())
            .spawn(move || {
                let io = |source| LogError::Io { path: name.clone(), source };
                while let Ok(batch) = receiver.recv() {
                    for line in batch.into_iter().chain(receiver.try_iter().flatten()) {
                        write_line(&mut out, &line).map_err(io)?;
                    }
                    out.flush().map_err(io)?;
                }
                Ok(())
            })
            .map_err(io)?;
        Ok(Self(Sink::File { lines: Some(sender), writer: Some(writer) }))
    }

    /// Adds lines, which are moved out of `lines`. A writer that has failed is told of once, in the
    /// program's log, and lines after that are dropped.
    pub fn append(&mut self, lines: &mut Vec<LogLine>) {
        if lines.is_empty() {
            return;
        }
        match &mut self.0 {
            Sink::Memory(all) => all.lock().unwrap_or_else(PoisonError::into_inner).append(lines),
            Sink::File { lines: sender, writer } => {
                let batch = std::mem::take(lines);
                if sender.as_ref().is_some_and(|s| s.send(batch).is_err()) {
                    *sender = None;
                    report(writer.take());
                }
            }
        }
    }
}

impl Drop for DecisionLog {
    /// Waits until every line is written.
    fn drop(&mut self) {
        if let Sink::File { lines, writer } = &mut self.0 {
            *lines = None;
            report(writer.take());
        }
    }
}

fn report(writer: Option<JoinHandle<Result<(), LogError>>>) {
    match writer.map(JoinHandle::join) {
        Some(Ok(Err(e))) => tracing::error!("{e}: the log ends here"),
        Some(Err(_)) => tracing::error!("the decision log's writer died: the log is not complete"),
        Some(Ok(Ok(()))) | None => {}
    }
}

/// Whole lines only: a reader of a growing log sees no half of one before the buffer is flushed.
fn write_line(out: &mut impl Write, line: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use lora_sched::Config;

    use super::*;

    fn lines() -> Vec<LogLine> {
        vec![
            LogLine::Arrive {
                t: 5,
                id: 0,
                adapter: Some(3),
                received: 2,
                prompt_tokens: 7,
                max_tokens: 2,
                refused: None,
            },
            LogLine::Step {
                step: 0,
                formed: 6,
                submitted: 7,
                started: 8,
                ended: 19,
                done: 20,
                seqs: vec![LoggedSeq(0, Some(3), Some(1), 0, 7, false, true, 1)],
                loading: vec![1],
                waited: false,
            },
            LogLine::StepDone { t: 20, step: 0, stopped: vec![0], stalled: vec![(1, 4)] },
            LogLine::First { t: 20, id: 0, parts: [3, 1, 0, 0, 4, 10] },
            LogLine::Ended { t: 20, id: 0, why: LoggedEnd::Stop },
            LogLine::Idle { t: 21 },
            LogLine::AddAdapter { t: 22, adapter: 4, rank: 8, bytes: 1000 },
            LogLine::PinAdapter { t: 23, adapter: 4, pinned: true },
            LogLine::FetchDone { t: 24, adapter: 4, failed: true },
            LogLine::RemoveAdapter { t: 25, adapter: 4 },
            LogLine::AdapterGone { t: 25, adapter: 4 },
        ]
    }

    fn header() -> LogHeader {
        LogHeader::new("tiny", 7, &Config::with_adapters(4, 2, 8, 1000))
    }

    #[test]
    fn a_log_reads_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = DecisionLog::to_file(&path, &header()).unwrap();
        let mut all = lines();
        let mut rest = all.split_off(2);
        log.append(&mut all);
        log.append(&mut rest);
        drop(log);
        let (read_header, read_lines) = read(&path).unwrap();
        assert_eq!(read_header, header());
        assert_eq!(read_lines, lines());
        assert_eq!(Config::try_from(&read_header.config).unwrap(), Config::with_adapters(4, 2, 8, 1000));
    }

    #[test]
    fn an_unfinished_last_line_is_left_out_and_one_in_the_middle_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let head = serde_json::to_string(&header()).unwrap();
        std::fs::write(&path, format!("{head}\n{{\"line\":\"idle\",\"t\":1}}\n{{\"line\":\"id")).unwrap();
        assert_eq!(read(&path).unwrap().1, vec![LogLine::Idle { t: 1 }]);
        std::fs::write(&path, format!("{head}\nnonsense\n{{\"line\":\"idle\",\"t\":1}}\n")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let text = serde_json::to_string(&LogHeader { schema: 9, ..header() }).unwrap();
        std::fs::write(&path, text).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("version 9"));
    }
}
