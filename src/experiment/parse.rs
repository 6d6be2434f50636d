//! From a TOML table to cells.

use std::collections::HashSet;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::cell::Cell;
use super::fields::{names_of, unknown};
use super::settings::{EngineSettings, Impossible, WorkloadSettings};
use super::{Output, Replicate};

/// Cells that a file may have, at most: beyond it an axis is a mistake.
const MOST_CELLS: usize = 100_000;

/// One value of each axis: `(setting, value)`.
type Point = Vec<(String, Value)>;

/// A setting and the values that it may have.
type Choices = (String, Vec<Value>);

/// Resolves a whole file. Errors are messages that name the table, the key and the remedy.
pub fn resolve(file: &Table) -> Result<(Vec<Cell>, Replicate, Output), String> {
    const TABLES: [&str; 6] = ["engine", "workload", "axes", "replicate", "exclude", "output"];
    if let Some(key) = file.keys().find(|key| !TABLES.contains(&key.as_str())) {
        let tables = TABLES.map(|t| format!("[{t}]")).join(", ");
        return Err(format!("unknown table or key '{key}' at the top; an experiment has {tables}"));
    }
    let names = Names { engine: names_of::<EngineSettings>(), workload: names_of::<WorkloadSettings>() };
    let engine = settings(file, "engine", names.engine)?;
    let mut workload = settings(file, "workload", &[names.workload, &["seed"]].concat())?;
    let replicate = replicate(file, workload.remove("seed"))?;
    let output = read::<Output>(table(file, "output")?, "output")?;
    if output.decisions.is_some() && output.decisions == output.requests {
        // Their files have the same names.
        return Err("[output] requests and decisions name the same folder: give each its own".to_owned());
    }
    let excludes = excludes(file, &names)?;

    let mut cells: Vec<Cell> = Vec::new();
    let mut keys = HashSet::new();
    let mut used = vec![false; excludes.len()];
    for point in points(&axes(file, &names)?)? {
        let (mut engine, mut workload) = (engine.clone(), workload.clone());
        let place = point.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>().join(", ");
        for (key, value) in point {
            let owner = if names.engine.contains(&key.as_str()) { &mut engine } else { &mut workload };
            owner.insert(key, value);
        }
        let engine: EngineSettings = read(engine, "engine").map_err(|e| at(&e, &place))?;
        let mut workload: WorkloadSettings = read(workload, "workload").map_err(|e| at(&e, &place))?;
        workload.fill();
        let cell = Cell::new(engine, workload);
        let mut excluded = false;
        for (exclude, used) in excludes.iter().zip(&mut used) {
            let hit = matches(exclude, &cell);
            *used |= hit;
            excluded |= hit;
        }
        if excluded {
            continue;
        }
        let possible = cell.engine.check().map_err(|e| with_remedy(&e));
        possible.and_then(|()| cell.workload.check()).map_err(|e| at(&e, &place))?;
        if !keys.insert(cell.key().to_owned()) {
            return Err(at("two cells have the same settings: an axis lists a value twice", &place));
        }
        cells.push(cell);
    }
    if let Some((exclude, _)) = excludes.iter().zip(&used).find(|(_, used)| !**used) {
        let table: Vec<_> =
            exclude.iter().map(|(key, values)| format!("{key} = {}", Value::from(values.clone()))).collect();
        return Err(format!(
            "an [exclude] leaves out no cell: {}; correct it or remove it",
            table.join(", ")
        ));
    }
    if cells.is_empty() {
        return Err("no cell is left: [exclude] matches all of them, or an axis is empty".to_owned());
    }
    Ok((cells, replicate, output))
}

/// Names of the settings that may be set, made axes of, or excluded.
struct Names {
    engine: &'static [&'static str],
    workload: &'static [&'static str],
}

impl Names {
    /// The setting that `key` in `[place]` means.
    fn setting(&self, key: &str, place: &str) -> Result<String, String> {
        let name = canonical(key);
        if name == "seed" {
            // It would be the engine's here and the trace's in [workload]: too easily mistaken.
            return Err(format!("'seed' cannot stand in [{place}]: [replicate] seeds vary the traces"));
        }
        if self.engine.contains(&name.as_str()) || self.workload.contains(&name.as_str()) {
            return Ok(name);
        }
        Err(unknown(key, place, &[self.engine, self.workload].concat()))
    }
}

/// Keys may be written as flags are, and `rank` is what everybody calls `max_r`.
fn canonical(key: &str) -> String {
    match key.replace('-', "_").as_str() {
        "rank" => "max_r".to_owned(),
        name => name.to_owned(),
    }
}

/// A setting's value by the name that results have for it, so that cells of equal settings are equal.
fn plain(name: &str, value: Value) -> Value {
    match value.as_str() {
        Some(text) if name == "policy" => match super::policy(text) {
            Ok(policy) => Value::String(policy.to_string()),
            // Refused where the cell is read, with its place.
            Err(_) => value,
        },
        _ => value,
    }
}

/// What to write in a file instead.
fn with_remedy(wrong: &Impossible) -> String {
    match wrong {
        Impossible { setting: "gpu_loras", why } if why.starts_with('(') => {
            format!("{wrong}: leave the combination out by an [[exclude]] table with both settings")
        }
        Impossible { setting: "gpu_loras", .. } => {
            format!("{wrong}: set it in [engine] or list its values in [axes]")
        }
        _ => wrong.to_string(),
    }
}

fn at(message: &str, place: &str) -> String {
    if place.is_empty() { message.to_owned() } else { format!("{message} (in the cell with {place})") }
}

/// The table `[name]`, empty where the file has none.
fn table(file: &Table, name: &str) -> Result<Table, String> {
    match file.get(name) {
        None => Ok(Table::new()),
        Some(Value::Table(table)) => Ok(table.clone()),
        Some(_) => Err(format!("'{name}' must be a table: write [{name}]")),
    }
}

fn settings(file: &Table, place: &str, names: &[&str]) -> Result<Table, String> {
    let mut settings = Table::new();
    for (key, value) in table(file, place)? {
        let name = canonical(&key);
        if !names.contains(&name.as_str()) {
            return Err(unknown(&key, place, names));
        }
        let value = plain(&name, value);
        if settings.insert(name, value).is_some() {
            return Err(format!("'{key}' in [{place}] is set twice under two names"));
        }
    }
    Ok(settings)
}

fn read<T: DeserializeOwned>(table: Table, place: &str) -> Result<T, String> {
    let names = names_of::<T>();
    if let Some(key) = table.keys().find(|key| !names.contains(&key.as_str())) {
        return Err(unknown(key, place, names));
    }
    Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| format!("[{place}] {}", e.to_string().trim_end()))
}

fn replicate(file: &Table, workload_seed: Option<Value>) -> Result<Replicate, String> {
    let mut given = table(file, "replicate")?;
    if let Some(seed) = workload_seed {
        if given.contains_key("seeds") {
            return Err(
                "[workload] seed and [replicate] seeds both name the traces' seeds: give one".to_owned()
            );
        }
        given.insert("seeds".to_owned(), Value::Array(vec![seed]));
    }
    let replicate: Replicate = read(given, "replicate")?;
    if replicate.seeds.is_empty() || replicate.repeats == 0 {
        return Err("[replicate] needs at least one of seeds and repeats = 1 or more".to_owned());
    }
    let mut seeds = replicate.seeds.clone();
    seeds.sort_unstable();
    seeds.dedup();
    if seeds.len() < replicate.seeds.len() {
        return Err("[replicate] seeds has a seed twice: repeats runs a trace again".to_owned());
    }
    Ok(replicate)
}

fn axes(file: &Table, names: &Names) -> Result<Vec<Choices>, String> {
    let mut axes: Vec<Choices> = Vec::new();
    for (key, value) in table(file, "axes")? {
        let name = names.setting(&key, "axes")?;
        let Value::Array(values) = value else {
            return Err(format!("[axes] {key} must be a list of values, such as {key} = [{value}]"));
        };
        if axes.iter().any(|(other, _)| *other == name) {
            return Err(format!("[axes] {key} is listed twice under two names"));
        }
        let values = values.into_iter().map(|value| plain(&name, value)).collect();
        axes.push((name, values));
    }
    Ok(axes)
}

/// The cartesian product of the axes, the last changing fastest.
fn points(axes: &[Choices]) -> Result<Vec<Point>, String> {
    let count = axes.iter().try_fold(1usize, |n, (_, values)| n.checked_mul(values.len()));
    if count.is_none_or(|n| n > MOST_CELLS) {
        return Err(format!(
            "[axes] make more than {MOST_CELLS} cells: give fewer values, or split the experiment"
        ));
    }
    let mut points: Vec<Point> = vec![Vec::new()];
    for (name, values) in axes {
        points = points
            .into_iter()
            .flat_map(|point| {
                values.iter().map(move |value| {
                    let mut longer = point.clone();
                    longer.push((name.clone(), value.clone()));
                    longer
                })
            })
            .collect();
    }
    Ok(points)
}

/// `[exclude]` or `[[exclude]]`: each table leaves out the cells that agree with all of its keys,
/// whose values are one or a list of alternatives.
fn excludes(file: &Table, names: &Names) -> Result<Vec<Vec<Choices>>, String> {
    let tables = match file.get("exclude") {
        None => Vec::new(),
        Some(Value::Table(table)) => vec![table],
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_table().ok_or("'exclude' must be tables: write [[exclude]]".to_owned()))
            .collect::<Result<_, _>>()?,
        Some(_) => return Err("'exclude' must be a table: write [[exclude]]".to_owned()),
    };
    let read_one = |table: &Table| {
        if table.is_empty() {
            return Err(
                "an empty [exclude] would leave nothing: name settings in it, or remove it".to_owned()
            );
        }
        table
            .iter()
            .map(|(key, value)| {
                let values = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
                let name = names.setting(key, "exclude")?;
                let values = values.into_iter().map(|value| plain(&name, value)).collect();
                Ok((name, values))
            })
            .collect()
    };
    tables.into_iter().map(read_one).collect()
}

fn matches(exclude: &[Choices], cell: &Cell) -> bool {
    // Settings that serialise have been read from TOML, so they can be written to it.
    let (Ok(engine), Ok(workload)) = (Table::try_from(&cell.engine), Table::try_from(&cell.workload)) else {
        return false;
    };
    exclude.iter().all(|(key, values)| {
        let actual = engine.get(key).or_else(|| workload.get(key));
        values.iter().any(|value| actual.is_some_and(|actual| same(actual, value)))
    })
}

/// Equality for which `2` and `2.0` are the same.
fn same(a: &Value, b: &Value) -> bool {
    let number = |v: &Value| v.as_float().or_else(|| v.as_integer().map(|i| i as f64));
    match (number(a), number(b)) {
        (Some(x), Some(y)) => x == y,
        _ => a == b,
    }
}
