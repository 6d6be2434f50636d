//! Reading and appending the results CSV.

use std::path::{Path, PathBuf};

use super::super::files::{self, FileError};
use super::{HEADER, ResultRow};

/// A results file that could not be read or added to.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another program's columns, or another version's.
    #[error("{} has another header: {difference}; write the results to another file", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The first column that differs.
        difference: String,
    },
    /// A file from before the last column, which reads but takes no more rows.
    #[error(
        "{path} has no column '{column}', which rows have by now: rewrite it with `lora-hbm merge {path} -o {path}`, or \
         write the results to another file",
        path = path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
    },
    /// A file with no header line.
    #[error("{} has no header line: it is not a results CSV", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Its last row was cut off by an interruption.
    #[error("the last line of {} is incomplete (line {line}): remove that line and try again", path.display())]
    Cut {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// A row that is none.
    #[error("{} line {line}: {message}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Counted from 1, comments included.
        line: u64,
        /// What is wrong with it.
        message: String,
    },
    /// A row that CSV cannot hold.
    #[error("cannot write a row to {}: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: csv::Error,
    },
}

/// Appends whole rows in one write; a new file gets the header first. A file with another header, or
/// whose last row was cut off, is left as it is and refused.
pub fn append_rows(path: impl AsRef<Path>, rows: &[ResultRow]) -> Result<(), ResultsError> {
    let path = path.as_ref();
    let mut text = encode(path, rows)?;
    match std::fs::read_to_string(path) {
        Ok(old) if !old.is_empty() => {
            if check_header(path, &old)? == Header::WithoutSettings {
                return Err(ResultsError::Older { path: path.to_owned(), column: SETTINGS });
            }
            if !old.ends_with('\n') {
                check_last_line(path, &old)?;
                text.insert(0, '\n');
            }
        }
        Ok(_) => text.insert_str(0, &format!("{HEADER}\n")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => text.insert_str(0, &format!("{HEADER}\n")),
        Err(e) => return Err(FileError::read(path, e).into()),
    }
    Ok(files::append(path, text.as_bytes())?)
}

/// Whether a file that there is takes rows: asked before the work whose rows go there, not after it. Makes no file.
pub fn check_takes_rows(path: impl AsRef<Path>) -> Result<(), ResultsError> {
    // No rows are appended: it is a look at what stands there.
    if files::is_begun(&path) { append_rows(path, &[]) } else { Ok(()) }
}

/// The last column, which older files lack.
const SETTINGS: &str = "settings";

/// What a file's header line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Header {
    /// [`HEADER`].
    Whole,
    /// The same without the last column.
    WithoutSettings,
}

/// All rows of a file, in its order; `#` lines are skipped. A file without the column `settings` is read too.
pub fn read_rows(path: impl AsRef<Path>) -> Result<Vec<ResultRow>, ResultsError> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    check_header(path, &text)?;
    let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(text.as_bytes());
    reader
        .deserialize()
        .map(|row| {
            row.map_err(|e: csv::Error| {
                let line = e.position().map_or(0, csv::Position::line);
                ResultsError::Row { path: path.to_owned(), line, message: describe(&e) }
            })
        })
        .collect()
}

/// A whole file: `comments` as `#` lines, the header, the rows.
pub fn to_csv(
    path: impl AsRef<Path>,
    comments: &[String],
    rows: &[ResultRow],
) -> Result<String, ResultsError> {
    let comments: String = comments.iter().map(|c| format!("# {c}\n")).collect();
    Ok(format!("{comments}{HEADER}\n{}", encode(path.as_ref(), rows)?))
}

fn encode(path: &Path, rows: &[ResultRow]) -> Result<String, ResultsError> {
    let failed = |source| ResultsError::Encode { path: path.to_owned(), source };
    let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
    for row in rows {
        writer.serialize(row).map_err(failed)?;
    }
    let bytes = writer.into_inner().map_err(|e| failed(e.into_error().into()))?;
    // The writer was given only UTF-8, and quotes and commas keep it so.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn check_header(path: &Path, text: &str) -> Result<Header, ResultsError> {
    let header = text
        .lines()
        .find(|line| !line.starts_with('#') && !line.trim().is_empty())
        .ok_or_else(|| ResultsError::Empty { path: path.to_owned() })?;
    if header == HEADER {
        return Ok(Header::Whole);
    }
    if HEADER.strip_suffix(SETTINGS).and_then(|before| before.strip_suffix(',')) == Some(header) {
        return Ok(Header::WithoutSettings);
    }
    let (mut theirs, mut ours) = (header.split(','), HEADER.split(','));
    let mut number = 0;
    let difference = loop {
        number += 1;
        match (theirs.next(), ours.next()) {
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) => break format!("column {number} is '{a}', expected '{b}'"),
            (Some(a), None) => break format!("column {number}, '{a}', is one too many"),
            (None, Some(b)) => break format!("column {number}, '{b}', is missing"),
            (None, None) => return Ok(Header::Whole),
        }
    };
    Err(ResultsError::Header { path: path.to_owned(), difference })
}

/// A last line without a line end is whole if it has every column: then somebody's editor left the
/// line end out. Otherwise a write was interrupted.
fn check_last_line(path: &Path, text: &str) -> Result<(), ResultsError> {
    let Some(last) = text.lines().last() else { return Ok(()) };
    if last.starts_with('#') || last == HEADER {
        return Ok(());
    }
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(last.as_bytes());
    let fields = reader.records().next().and_then(Result::ok).map_or(0, |record| record.len());
    if fields == HEADER.split(',').count() {
        return Ok(());
    }
    Err(ResultsError::Cut { path: path.to_owned(), line: text.lines().count() })
}

/// The error in this file's own terms: which column, what is wrong.
fn describe(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::Deserialize { err, .. } => match err.field() {
            Some(field) => {
                let column = HEADER.split(',').nth(field as usize).unwrap_or("?");
                format!("column '{column}': {}", err.kind())
            }
            None => err.kind().to_string(),
        },
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!(
                "{len} fields where the header has {expected_len}: the row is cut off or not of this file"
            )
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RunContext, Source};
    use super::*;

    fn row(gpu_loras: u32) -> ResultRow {
        let mut run = RunContext::new(Source::Measured, 128, gpu_loras, "short");
        run.model = Some("a, \"quoted\" name".to_owned());
        run.saturated = Some(false);
        run.rho = Some(0.5);
        run.run_timestamp = Some("2026-01-15 10:30:00".to_owned());
        ResultRow::from_records(&[], &run)
    }

    #[test]
    fn the_header_constant_is_what_serialising_gives() {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.serialize(row(2)).unwrap();
        let text = String::from_utf8(writer.into_inner().unwrap()).unwrap();
        assert_eq!(text.lines().next(), Some(HEADER));
    }

    #[test]
    fn what_is_appended_is_read_back_past_comments() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        std::fs::write(&path, format!("# drawn from the trace of conversations\n{HEADER}\n")).unwrap();
        append_rows(&path, &[row(2)]).unwrap();
        files::append(&path, b"# second half\n").unwrap();
        append_rows(&path, &[row(4), row(8)]).unwrap();
        assert_eq!(read_rows(&path).unwrap(), vec![row(2), row(4), row(8)]);
    }

    #[test]
    fn another_header_is_refused_by_its_first_column_and_the_file_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        let other = format!("{}\n1,2\n", HEADER.replace("gpu_loras", "slots"));
        std::fs::write(&path, &other).unwrap();
        let error = append_rows(&path, &[row(2)]).unwrap_err().to_string();
        assert!(error.contains("column 3 is 'slots', expected 'gpu_loras'"), "{error}");
        assert!(read_rows(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        std::fs::write(&path, "run_timestamp,total_loras\n").unwrap();
        let error = append_rows(&path, &[row(2)]).unwrap_err().to_string();
        assert!(error.contains("column 3, 'gpu_loras', is missing"), "{error}");
    }

    #[test]
    fn a_file_from_before_the_settings_is_read_and_takes_no_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        append_rows(&path, &[row(2)]).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        let old = whole.replace(",settings\n", "\n").replace(",\n", "\n");
        assert_eq!(old.lines().next(), HEADER.strip_suffix(",settings"));
        std::fs::write(&path, &old).unwrap();
        assert_eq!(read_rows(&path).unwrap(), [row(2)]);
        let error = append_rows(&path, &[row(4)]).unwrap_err().to_string();
        assert!(error.contains("no column 'settings'") && error.contains("lora-hbm merge"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), old);
    }

    #[test]
    fn a_cut_off_row_is_refused_and_a_missing_line_end_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        append_rows(&path, &[row(2)]).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole.trim_end()).unwrap();
        append_rows(&path, &[row(4)]).unwrap();
        assert_eq!(read_rows(&path).unwrap().len(), 2);
        std::fs::write(&path, &whole[..whole.len() - 20]).unwrap();
        let error = append_rows(&path, &[row(4)]).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_bad_value_is_named_by_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.csv");
        append_rows(&path, &[row(2)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace(",128,2,", ",128,two,")).unwrap();
        let error = read_rows(&path).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("gpu_loras"), "{error}");
    }
}
