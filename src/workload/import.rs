//! Traces of other formats: Azure's CSV and Mooncake's JSONL (which vLLM's timed traces share).
//!
//! Neither names adapters as a rule: a trace without any says so in its header, and they are drawn
//! when it is used.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use chrono::{DateTime, NaiveDateTime};
use serde::Deserialize;
use serde_json::Value;

use super::arrivals::round_ns;
use super::trace::{NO_ADAPTERS, SCHEMA, Trace, TraceHeader, TraceRequest, check};

/// A file that cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file system said no.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line that makes no sense.
    #[error("{}: line {line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        message: String,
    },
    /// None of the formats.
    #[error(
        "{} is none of the known trace formats: Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens) or Mooncake's \
         JSONL (timestamp, input_length, output_length), or this program's own JSONL", path.display()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("{} has no requests", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// A trace and what was left out of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// The trace; its first arrival is at 0.
    pub trace: Trace,
    /// Requests without prompt or output tokens, which no engine can serve.
    pub skipped_empty: u64,
    /// The number that each adapter got which the file names and does not number, in order of first appearance.
    pub numbered: Vec<(String, u32)>,
}

impl Imported {
    /// Which numbers stand for which names; none where nothing had to be numbered.
    pub fn numbered_said(&self) -> Option<String> {
        const SHOWN: usize = 8;
        let names = self.numbered.iter().take(SHOWN).map(|(name, number)| format!("'{name}' is {number}"));
        let more = match self.numbered.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let names: Vec<String> = names.collect();
        (!names.is_empty())
            .then(|| format!("adapters are numbered as their names first appear: {}{more}", names.join(", ")))
    }
}

/// The unit of JSONL's `timestamp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timestamps {
    /// Milliseconds, as in Mooncake's traces.
    Ms,
    /// Seconds, as in vLLM's timed traces.
    S,
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Azure's LLM inference traces: CSV.
    Azure,
    /// Mooncake's traces: JSONL.
    Mooncake,
}

/// Reads a trace of any known format, this program's own included; also tells how many requests
/// were left out because they are empty.
pub fn read_any(path: &Path) -> anyhow::Result<(Trace, u64)> {
    let first = Lines::open(path)?.next_line()?.map(|l| l.1).unwrap_or_default();
    if first.starts_with('{') && first.contains("\"schema\"") {
        return Ok((Trace::read(path)?, 0));
    }
    let imported = import(path, sniff(path)?, Timestamps::Ms)?;
    if let Some(said) = imported.numbered_said() {
        tracing::info!("{}: {said}", path.display());
    }
    Ok((imported.trace, imported.skipped_empty))
}

/// Tells a file's format by its first line.
pub fn sniff(path: &Path) -> Result<Format, ImportError> {
    let first = Lines::open(path)?.next_line()?.map(|l| l.1).unwrap_or_default();
    if first.starts_with('{') && first.contains("\"input_length\"") {
        Ok(Format::Mooncake)
    } else if columns(&first).is_some() {
        Ok(Format::Azure)
    } else {
        Err(ImportError::Unknown { path: path.to_owned() })
    }
}

/// Reads a file of either format. `timestamps` is the unit of Mooncake's; Azure's are dates.
pub fn import(path: &Path, format: Format, timestamps: Timestamps) -> Result<Imported, ImportError> {
    match format {
        Format::Azure => azure(path),
        Format::Mooncake => mooncake(path, timestamps),
    }
}

/// Azure's CSV: `TIMESTAMP,ContextTokens,GeneratedTokens` in any order, times of day with fractions.
fn azure(path: &Path) -> Result<Imported, ImportError> {
    let mut lines = Lines::open(path)?;
    let columns = lines
        .next_line()?
        .and_then(|(_, header)| columns(&header))
        .ok_or_else(|| ImportError::Unknown { path: path.to_owned() })?;
    let mut build = Builder::new(path, "Azure LLM inference trace (Azure Public Dataset, CC-BY-4.0)");
    while let Some((number, line)) = lines.next_line()? {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let wrong = |message| ImportError::Line { path: path.to_owned(), line: number, message };
        let field = |i: usize, name| {
            fields.get(i).copied().ok_or_else(|| wrong(format!("the column {name} is missing")))
        };
        let tokens = |i, name| {
            let text = field(i, name)?;
            text.parse::<u32>().map_err(|_| wrong(format!("{name} is '{text}', not a number of tokens")))
        };
        let time = field(columns[0], "TIMESTAMP")?;
        let at_s = seconds(time).ok_or_else(|| wrong(format!("TIMESTAMP is '{time}', not a time")))?;
        let prompt = tokens(columns[1], "ContextTokens")?;
        let output = tokens(columns[2], "GeneratedTokens")?;
        build.push(number, at_s, prompt, output, None, None)?;
    }
    build.finish()
}

/// Places of the three columns in an Azure header line.
fn columns(header: &str) -> Option<[usize; 3]> {
    let names: Vec<String> =
        header.trim_start_matches('\u{feff}').split(',').map(|n| n.trim().to_lowercase()).collect();
    let place = |name| names.iter().position(|n| n == name);
    Some([place("timestamp")?, place("contexttokens")?, place("generatedtokens")?])
}

/// Seconds of a time of day with date, as nanoseconds allow, from a fixed origin; with an offset or without.
fn seconds(text: &str) -> Option<At> {
    let utc = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f")
        .or_else(|_| DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%:z").map(|t| t.naive_utc()))
        .ok()?
        .and_utc();
    Some(At { s: utc.timestamp(), ns: utc.timestamp_subsec_nanos() })
}

/// A moment; a difference of two keeps all digits, which one `f64` of seconds since 1970 would not.
#[derive(Clone, Copy, Debug)]
struct At {
    s: i64,
    ns: u32,
}

impl At {
    fn since(self, first: Self) -> f64 {
        round_ns((self.s - first.s) as f64 + (f64::from(self.ns) - f64::from(first.ns)) / 1e9)
    }
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    adapter: Value,
    #[serde(default)]
    prompt: Option<String>,
}

/// How a line names its adapter.
#[derive(Clone, Debug, PartialEq)]
enum Adapter {
    Number(u32),
    Name(String),
}

impl Adapter {
    /// A number, a generated adapter's name, which is as good as its number, or another name; none if null.
    fn of(value: Value) -> Result<Option<Self>, String> {
        match value {
            Value::Null => Ok(None),
            Value::String(name) if !name.is_empty() => {
                let number = name.strip_prefix("lora-").and_then(|n| n.parse().ok());
                // lora-007 is a name like any other.
                let number = number.filter(|n: &u32| name == format!("lora-{n}"));
                Ok(Some(number.map_or(Self::Name(name), Self::Number)))
            }
            other => match other.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(number) => Ok(Some(Self::Number(number))),
                None => Err(format!("adapter is {other}: it must be a number, 0 or more, or a name")),
            },
        }
    }
}

/// Mooncake's JSONL: `timestamp`, `input_length`, `output_length`, optionally `adapter` and `prompt`.
fn mooncake(path: &Path, timestamps: Timestamps) -> Result<Imported, ImportError> {
    let (unit, a_second, ns) = match timestamps {
        Timestamps::Ms => ("milliseconds", 1e3, 1e6),
        Timestamps::S => ("seconds", 1.0, 1e9),
    };
    let mut lines = Lines::open(path)?;
    let mut build = Builder::new(path, "Mooncake-style trace");
    while let Some((number, line)) = lines.next_line()? {
        let wrong = |message| ImportError::Line { path: path.to_owned(), line: number, message };
        let r: MooncakeLine =
            serde_json::from_str(&line).map_err(|e| wrong(format!("not a request: {e}")))?;
        if !r.timestamp.is_finite() || r.timestamp < 0.0 {
            return Err(wrong(format!("timestamp is {}: it must be {unit}, 0 or more", r.timestamp)));
        }
        let (s, rest) = ((r.timestamp / a_second).floor(), r.timestamp.rem_euclid(a_second));
        let at = At { s: s as i64, ns: (rest * ns).round() as u32 };
        let adapter = Adapter::of(r.adapter).map_err(wrong)?;
        build.push(number, at, r.input_length, r.output_length, adapter, r.prompt)?;
    }
    build.finish()
}

/// Collects requests, with times from the first.
struct Builder<'a> {
    path: &'a Path,
    source: String,
    first: Option<At>,
    requests: Vec<TraceRequest>,
    /// Names of adapters without a number, and the places of their requests.
    names: Vec<(String, Vec<usize>)>,
    /// Where a name stands among them.
    places: HashMap<String, usize>,
    skipped_empty: u64,
}

impl<'a> Builder<'a> {
    fn new(path: &'a Path, what: &str) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let source = format!("{what}: {name}");
        Self {
            path,
            source,
            first: None,
            requests: Vec::new(),
            names: Vec::new(),
            places: HashMap::new(),
            skipped_empty: 0,
        }
    }

    fn push(
        &mut self,
        line: u64,
        at: At,
        prompt_tokens: u32,
        output_tokens: u32,
        adapter: Option<Adapter>,
        prompt: Option<String>,
    ) -> Result<(), ImportError> {
        if prompt_tokens == 0 || output_tokens == 0 {
            self.skipped_empty += 1;
            return Ok(());
        }
        let arrival_s = at.since(*self.first.get_or_insert(at));
        let id = self.requests.len() as u64;
        let adapter = match adapter {
            Some(Adapter::Number(number)) => Some(number),
            Some(Adapter::Name(name)) => {
                self.named(name);
                None
            }
            None => None,
        };
        let request =
            TraceRequest { id, arrival_s, prompt_tokens, output_tokens, adapter, rank: None, prompt };
        check(&request, self.requests.last().map(|r| (r.id, r.arrival_s)))
            .map_err(|message| ImportError::Line { path: self.path.to_owned(), line, message })?;
        self.requests.push(request);
        Ok(())
    }

    /// The next request's adapter has this name.
    fn named(&mut self, name: String) {
        let place = self.requests.len();
        match self.places.get(&name) {
            Some(&at) => self.names[at].1.push(place),
            None => {
                self.places.insert(name.clone(), self.names.len());
                self.names.push((name, vec![place]));
            }
        }
    }

    /// Gives names numbers that no line has, in the order in which they came.
    fn number_names(&mut self) -> Vec<(String, u32)> {
        let taken: BTreeSet<u32> = self.requests.iter().filter_map(|r| r.adapter).collect();
        let free = (0..).filter(|number| !taken.contains(number));
        let mut numbered = Vec::with_capacity(self.names.len());
        for ((name, places), number) in std::mem::take(&mut self.names).into_iter().zip(free) {
            for place in places {
                self.requests[place].adapter = Some(number);
            }
            numbered.push((name, number));
        }
        numbered
    }

    fn finish(mut self) -> Result<Imported, ImportError> {
        if self.requests.is_empty() {
            return Err(ImportError::Empty { path: self.path.to_owned() });
        }
        let numbered = self.number_names();
        let named = self.requests.iter().any(|r| r.adapter.is_some());
        let popularity = if named { "trace" } else { NO_ADAPTERS }.to_owned();
        let header = TraceHeader { schema: SCHEMA, source: self.source, seed: 0, popularity };
        let trace = Trace { header, requests: self.requests };
        Ok(Imported { trace, skipped_empty: self.skipped_empty, numbered })
    }
}

/// Lines that hold something, with their numbers.
struct Lines {
    input: BufReader<File>,
    path: PathBuf,
    number: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, ImportError> {
        let file = File::open(path).map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
        Ok(Self { input: BufReader::with_capacity(1 << 16, file), path: path.to_owned(), number: 0 })
    }

    fn next_line(&mut self) -> Result<Option<(u64, String)>, ImportError> {
        loop {
            let mut text = String::new();
            self.number += 1;
            match self.input.read_line(&mut text) {
                Ok(0) => return Ok(None),
                Ok(_) if text.trim().is_empty() || text.starts_with('#') => {}
                Ok(_) => return Ok(Some((self.number, text.trim().to_owned()))),
                Err(source) => return Err(ImportError::Io { path: self.path.clone(), source }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(name: &str, text: &str) -> Result<Imported, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        import(&path, sniff(&path)?, Timestamps::Ms)
    }

    #[test]
    fn azure_times_count_from_the_first_and_keep_their_digits() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.9799600,4808,10\r\n\
                    2023-11-17 00:00:00.0319600,3180,8\r\n2023-11-17 00:00:00.0319600,0,8\r\n2023-11-17 00:00:01,7,0";
        let imported = take("code.csv", text).unwrap();
        let times: Vec<f64> = imported.trace.requests.iter().map(|r| r.arrival_s).collect();
        assert_eq!(times, [0.0, 0.052]);
        assert_eq!(imported.skipped_empty, 2);
        assert_eq!(imported.trace.header.popularity, NO_ADAPTERS);
        assert!(imported.trace.header.source.contains("CC-BY-4.0"));
        let zoned = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n\
                     2024-05-10 00:00:00.017335+00:00,2399,6\n";
        let requests = take("2024.csv", zoned).unwrap().trace.requests;
        assert_eq!((requests[1].arrival_s, requests[1].prompt_tokens), (0.007405, 2399));
    }

    #[test]
    fn mooncake_times_are_milliseconds() {
        let text = r#"{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535.5, "input_length": 6472, "output_length": 26, "adapter": 3, "prompt": "Hello"}"#;
        let trace = take("m.jsonl", text).unwrap().trace;
        assert_eq!(trace.requests[1].arrival_s, 3.0535);
        assert_eq!((trace.requests[0].adapter, trace.requests[1].adapter), (None, Some(3)));
        assert_eq!(trace.requests[1].prompt.as_deref(), Some("Hello"));
        assert_eq!(trace.header.popularity, "trace");
    }

    #[test]
    fn timestamps_are_seconds_where_that_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vllm.jsonl");
        let line = |at: f64| format!("{{\"timestamp\": {at}, \"input_length\": 5, \"output_length\": 2}}\n");
        std::fs::write(&path, [0.5, 1.25, 61.000_000_5].map(line).concat()).unwrap();
        let times = |unit| -> Vec<f64> {
            let trace = import(&path, Format::Mooncake, unit).unwrap().trace;
            trace.requests.iter().map(|r| r.arrival_s).collect()
        };
        assert_eq!(times(Timestamps::S), [0.0, 0.75, 60.500_000_5]);
        assert_eq!(times(Timestamps::Ms)[..2], [0.0, 0.000_75]);
        std::fs::write(&path, line(-1.0)).unwrap();
        let error = import(&path, Format::Mooncake, Timestamps::S).unwrap_err().to_string();
        assert!(error.contains("must be seconds"), "{error}");
    }

    #[test]
    fn adapters_have_numbers_or_names() {
        let line = |adapter: &str| {
            format!("{{\"timestamp\":1,\"input_length\":1,\"output_length\":1,\"adapter\":{adapter}}}\n")
        };
        let lines = ["\"sql\"", "1", "\"lora-3\"", "null", "\"chat\"", "\"sql\"", "0", "\"lora-03\""];
        let imported = take("m.jsonl", &lines.map(line).concat()).unwrap();
        let adapters: Vec<_> = imported.trace.requests.iter().map(|r| r.adapter).collect();
        assert_eq!(adapters, [Some(2), Some(1), Some(3), None, Some(4), Some(2), Some(0), Some(5)]);
        let said = imported.numbered_said().unwrap();
        assert!(said.ends_with("'sql' is 2, 'chat' is 4, 'lora-03' is 5"), "{said}");
        assert_eq!(take("m.jsonl", &line("\"lora-7\"")).unwrap().numbered_said(), None);
        for wrong in ["-1", "1.5", "true", "\"\"", "[1]", "4294967296"] {
            let error = take("m.jsonl", &line(wrong)).unwrap_err().to_string();
            assert!(error.contains("line 1") && error.contains("a number, 0 or more, or a name"), "{error}");
        }
    }

    #[test]
    fn errors_name_the_line_and_the_value() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,374,44\n";
        for (line, expected) in [
            ("noon,1,1", "'noon'"),
            ("2023-11-16 18:15:47,many,1", "'many'"),
            ("2023-11-16 18:15:47,1", "GeneratedTokens is missing"),
            ("2023-11-16 18:15:45,1,1", "sort the file"),
        ] {
            let error = take("a.csv", &format!("{azure}{line}\n")).unwrap_err().to_string();
            assert!(error.contains("line 3") && error.contains(expected), "{error}");
        }
        let error = take("m.jsonl", "{\"timestamp\":1,\"input_length\":-4,\"output_length\":1}").unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
        for (text, expected) in
            [("a,b\n1,2\n", "none of the known"), (&azure[..40], "no requests"), ("", "none of")]
        {
            let error = take("x.csv", text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
