//! The manifest of a run: what a result was made with, as JSON beside it.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::{canonical_json, sha256};
use super::files::{self, FileError};
use super::machine::{Gpu, Machine, machine};
use super::results::ResultRow;
use crate::profile::{Kind, Profile};

/// The format's version.
pub const SCHEMA_VERSION: u32 = 1;

/// A manifest that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is none.
    #[error("{} is not a run manifest: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Settings that JSON cannot hold.
    #[error("cannot write the run's settings as JSON: {0}")]
    Settings(serde_json::Error),
}

/// The program that made a result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The commit that it was built from, `unknown` outside a repository.
    pub commit: String,
    /// Whether its sources differed from that commit; none where that is unknown.
    pub dirty: Option<bool>,
}

impl Tool {
    /// Name, version and short commit, for captions.
    pub fn describe(&self) -> String {
        let commit = self.commit.get(..7).unwrap_or(&self.commit);
        let modified = if self.dirty == Some(true) { ", modified" } else { "" };
        format!("{} {} ({commit}{modified})", self.name, self.version)
    }

    /// This program.
    pub fn this() -> Self {
        Self {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: env!("BUILD_COMMIT").to_owned(),
            dirty: env!("BUILD_DIRTY").parse().ok(),
        }
    }
}

/// Prompts or a trace that a run was fed with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dataset {
    /// Its file or, for an embedded one, its name.
    pub name: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
}

/// What a result was made with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The program.
    pub tool: Tool,
    /// The subcommand.
    pub command: String,
    /// Its resolved settings. They are written down as they are, but for paths below the working
    /// directory, which are relative to it: leave secrets out.
    pub config: Value,
    /// SHA-256 of the settings' canonical JSON.
    pub config_sha256: String,
    /// Seeds of the traces.
    pub seeds: Vec<u64>,
    /// What the run was fed with.
    pub dataset: Option<Dataset>,
    /// Where it ran.
    pub machine: Machine,
    /// SHA-256 of the profile that a simulation was made with.
    pub profile_sha256: Option<String>,
    /// Where that profile's costs come from; older manifests do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile_kind: Option<Kind>,
    /// Local time with its offset, RFC 3339.
    pub started: String,
    /// The same, once the run has ended.
    pub ended: Option<String>,
    /// Whether all that was asked for was done.
    pub complete: bool,
}

impl Manifest {
    /// Of a run that begins now; `config` is everything that its results depend on.
    pub fn begin(command: &str, config: &impl Serialize, seeds: &[u64]) -> Result<Self, ManifestError> {
        let mut config = serde_json::to_value(config).map_err(ManifestError::Settings)?;
        if let Ok(here) = std::env::current_dir() {
            make_relative(&mut config, &here);
        }
        let config_sha256 = sha256(canonical_json(&config).as_bytes());
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            tool: Tool::this(),
            command: command.to_owned(),
            config,
            config_sha256,
            seeds: seeds.to_vec(),
            dataset: None,
            machine: machine(),
            profile_sha256: None,
            profile_kind: None,
            started: now(),
            ended: None,
            complete: false,
        })
    }

    /// Notes the GPU that the run computed on, if any.
    pub fn on_gpu(&mut self, gpu: Option<Gpu>) {
        self.machine.gpu = gpu;
    }

    /// Notes the profile that the run simulates with.
    pub fn of_profile(&mut self, profile: &Profile) {
        self.profile_sha256 = Some(profile.sha256.clone());
        self.profile_kind = Some(profile.kind);
    }

    /// Marks the run as ended now; `complete` if all that was asked for was done.
    pub fn end(&mut self, complete: bool) {
        self.ended = Some(now());
        self.complete = complete;
    }

    /// Whether this run did all that `other` was asked for: one that was stopped and resumed is whole.
    pub fn finished(&self, other: &Self) -> bool {
        // How often it was resumed is no part of what was asked for.
        fn asked(value: &Value) -> Value {
            match value {
                Value::Object(map) => map
                    .iter()
                    .filter(|(key, _)| *key != "resume")
                    .map(|(k, v)| (k.clone(), asked(v)))
                    .collect(),
                Value::Array(items) => items.iter().map(asked).collect(),
                plain => plain.clone(),
            }
        }
        let fed = |of: &Self| {
            (of.command.clone(), asked(&of.config), of.profile_sha256.clone(), of.dataset.clone())
        };
        self.complete && fed(self) == fed(other)
    }

    /// Writes it as a whole.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), ManifestError> {
        let mut text = serde_json::to_vec_pretty(self).map_err(ManifestError::Settings)?;
        text.push(b'\n');
        Ok(files::write_atomic(path, &text)?)
    }

    /// Reads one back.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ManifestError> {
        let path = path.as_ref();
        let text = files::read_text(path)?;
        serde_json::from_str(&text).map_err(|source| ManifestError::Parse { path: path.to_owned(), source })
    }
}

/// The manifests beside `csv` that these rows, or the file itself, have. One that cannot be read is left out.
pub fn of_results<'a>(csv: &[PathBuf], names: impl Iterator<Item = &'a str>) -> Vec<Manifest> {
    let names: BTreeSet<&str> = names.collect();
    let paths: BTreeSet<PathBuf> = csv
        .iter()
        .flat_map(|p| names.iter().map(|name| p.with_file_name(name)).chain([path_beside(p)]))
        .collect();
    paths.iter().filter_map(|p| Manifest::read(p).ok()).collect()
}

/// The manifest of each of a file's rows: what the row names; where none of them names any, the one beside the file, if
/// there is one. From the root, so that it can be told from others and [named anew](name_from).
pub fn of_rows(csv: &Path, rows: &[ResultRow]) -> Vec<Option<PathBuf>> {
    let no_names = rows.iter().all(|row| row.manifest.is_none());
    let beside = Some(path_beside(csv)).filter(|path| no_names && path.exists());
    let of = |row: &ResultRow| row.manifest.as_ref().map(|name| csv.with_file_name(name)).or(beside.clone());
    rows.iter().map(|row| of(row).map(|path| from_root(&path))).collect()
}

/// How rows of `csv` name a manifest that lies there: from the file's folder, with `/` on every system. As it is where
/// no way leads from the one to the other.
pub fn name_from(csv: &Path, manifest: &Path) -> String {
    let (csv, manifest) = (from_root(csv), from_root(manifest));
    let folder: Vec<Component<'_>> = csv.parent().into_iter().flat_map(Path::components).collect();
    let parts: Vec<Component<'_>> = manifest.components().collect();
    let shared = folder.iter().zip(&parts).take_while(|(a, b)| a == b).count();
    if shared == 0 {
        return manifest.to_string_lossy().into_owned();
    }
    let up = folder[shared..].iter().map(|_| "..".into());
    let down = parts[shared..].iter().map(|part| part.as_os_str().to_string_lossy());
    up.chain(down).collect::<Vec<Cow<'_, str>>>().join("/")
}

/// A path from the root without links in its folders, whether or not there is a file.
fn from_root(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (folder.canonicalize(), path.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
    }
}

/// Makes absolute paths below `here` relative to it: where a checkout lies says nothing of a run, and
/// the same run from another checkout has the same settings.
fn make_relative(config: &mut Value, here: &Path) {
    match config {
        Value::String(text) => {
            if let Ok(below) = Path::new(text.as_str()).strip_prefix(here) {
                *text = match below.display().to_string() {
                    same if same.is_empty() => ".".to_owned(),
                    below => below,
                };
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| make_relative(item, here)),
        Value::Object(fields) => fields.values_mut().for_each(|field| make_relative(field, here)),
        _ => {}
    }
}

/// Where the manifest of a result lies: `runs/a.csv` has `runs/a.manifest.json`.
pub fn path_beside(result: impl AsRef<Path>) -> PathBuf {
    let result = result.as_ref();
    let mut name = result.file_stem().map_or_else(OsString::new, OsString::from);
    name.push(".manifest.json");
    result.with_file_name(name)
}

/// Where the manifest of one of many runs lies that a results file collects: with the time of the run in its name.
pub fn stamped_beside(result: impl AsRef<Path>, started: &str) -> PathBuf {
    let result = result.as_ref();
    let stamp: String = started.chars().filter(char::is_ascii_digit).take(14).collect();
    let stem = result.file_stem().unwrap_or_default().to_string_lossy();
    (0..)
        .map(|n| if n == 0 { format!("{stem}.{stamp}.csv") } else { format!("{stem}.{stamp}-{n}.csv") })
        .map(|name| path_beside(result.with_file_name(name)))
        .find(|path| !path.exists())
        .unwrap_or_else(|| path_beside(result))
}

/// [`path_beside`] unless one of these rows names the manifest there as its own: then [`stamped_beside`].
pub fn unclaimed_beside(result: impl AsRef<Path>, started: &str, rows: &[ResultRow]) -> PathBuf {
    let first = path_beside(&result);
    let name = first.file_name().and_then(|n| n.to_str());
    if rows.iter().any(|row| row.manifest.is_some() && row.manifest.as_deref() == name) {
        stamped_beside(result, started)
    } else {
        first
    }
}

fn now() -> String {
    chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lies_beside_the_result_and_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_beside(dir.path().join("short.csv"));
        assert_eq!(path, dir.path().join("short.manifest.json"));
        let mut manifest = Manifest::begin("simulate", &json!({"rate": 2.0}), &[42]).unwrap();
        manifest.write(&path).unwrap();
        assert!(!Manifest::read(&path).unwrap().complete);
        manifest.end(true);
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
    }

    #[test]
    fn a_run_that_was_stopped_and_resumed_is_finished_by_the_last() {
        let begun = |seed: u64, resume: bool| {
            Manifest::begin("sweep", &json!([{"resume": resume, "seed": seed}]), &[]).unwrap()
        };
        let (stopped, mut last) = (begun(1, false), begun(1, true));
        assert!(!last.finished(&stopped) && !stopped.finished(&stopped));
        last.end(true);
        assert!(last.finished(&stopped) && last.finished(&last));
        assert!(!last.finished(&begun(2, false)), "another seed was asked for");
    }

    #[test]
    fn rows_name_a_manifest_from_the_folder_of_their_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for folder in ["m1/deep", "all"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        for (csv, manifest, name) in [
            ("all/a.csv", "all/s.manifest.json", "s.manifest.json"),
            ("a.csv", "m1/s.manifest.json", "m1/s.manifest.json"),
            ("all/a.csv", "m1/deep/s.manifest.json", "../m1/deep/s.manifest.json"),
            ("all/a.csv", "m1/deep/../s.manifest.json", "../m1/s.manifest.json"),
        ] {
            assert_eq!(name_from(&at(csv), &at(manifest)), name);
        }
    }

    #[test]
    fn paths_below_the_working_directory_are_relative() {
        let here = std::env::current_dir().unwrap();
        let below = here.join("configs/experiments/demo.toml");
        let beside = here.with_file_name(format!("{}-2", here.file_name().unwrap().display()));
        let config = json!([{"experiment": below, "folders": [here, beside]}, "plots/a.csv"]);
        assert_eq!(
            Manifest::begin("sweep", &config, &[]).unwrap().config,
            json!([
                {"experiment": "configs/experiments/demo.toml", "folders": [".", beside]},
                "plots/a.csv"
            ])
        );
    }

    #[test]
    fn equal_settings_hash_alike_in_any_order() {
        let hash = |config: Value| Manifest::begin("x", &config, &[]).unwrap().config_sha256;
        assert_eq!(hash(json!({"a": 1, "b": 2})), hash(json!({"b": 2, "a": 1})));
        assert_ne!(hash(json!({"a": 1})), hash(json!({"a": 2})));
    }

    #[test]
    fn names_the_commit_or_says_unknown() {
        let tool = Tool::this();
        assert!(tool.commit == "unknown" || tool.commit.len() == 40, "{}", tool.commit);
        assert_eq!(tool.dirty.is_none(), tool.commit == "unknown");
    }

    #[test]
    fn another_file_is_no_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.manifest.json");
        std::fs::write(&path, "{}").unwrap();
        let error = Manifest::read(&path).unwrap_err().to_string();
        assert!(error.contains("x.manifest.json is not a run manifest"), "{error}");
    }
}
