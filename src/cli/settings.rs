//! Defaults < file < environment < flags.
//!
//! A configuration file has one table a subcommand (`[serve] port = 8001`). An environment variable
//! is `LORA_HBM_` and a flag's name in capitals (`LORA_HBM_GPU_LORAS=8`) and holds for every
//! subcommand that has that flag. A key that no flag is named after is refused.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use clap::{Args, CommandFactory, ValueEnum};
use figment::providers::{Format as _, Serialized, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::{Serialize, de::DeserializeOwned};

use super::failure::Failure;

/// Options that every subcommand takes.
#[derive(Args, Debug, Clone)]
pub struct GlobalArgs {
    /// Say more (repeat for debug and trace)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say only warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// How results are printed
    #[arg(
        long,
        global = true,
        value_enum,
        env = "LORA_HBM_FORMAT",
        hide_env = true,
        default_value = "table"
    )]
    pub format: OutputFormat,
    /// Settings file: one TOML table a subcommand
    #[arg(long, global = true, env = "LORA_HBM_CONFIG", hide_env = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum OutputFormat {
    /// For people
    Table,
    /// For programs
    Json,
}

/// What a subcommand runs in.
#[derive(Debug, Clone)]
pub struct Context {
    /// How to print results.
    pub format: OutputFormat,
    /// Only warnings and errors.
    pub quiet: bool,
    file: Option<toml::Table>,
    file_name: String,
}

impl Context {
    /// Reads the settings file, checks its tables and the environment's names, starts logging.
    pub fn new(args: &GlobalArgs) -> Result<Self, Failure> {
        start_logging(args);
        let command = super::Cli::command();
        let mut file = None;
        let mut file_name = String::new();
        if let Some(path) = &args.config {
            file_name = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the settings file {file_name}"))
                .map_err(Failure::Usage)?;
            let table: toml::Table = text
                .parse()
                .with_context(|| format!("the settings file {file_name} is not TOML"))
                .map_err(Failure::Usage)?;
            for key in table.keys() {
                if command.find_subcommand(key).is_none() {
                    return Err(Failure::Usage(anyhow!(
                        "{file_name}: unknown table [{key}]: tables are named after subcommands"
                    )));
                }
            }
            file = Some(table);
        }
        for (name, _) in std::env::vars_os() {
            let Some(key) = name.to_str().and_then(|n| n.strip_prefix(ENV_PREFIX)) else { continue };
            let id = key.to_lowercase();
            let known = subcommands_below(&command)
                .iter()
                .any(|c| c.get_arguments().any(|a| a.get_id() == id.as_str()));
            if !known && !GLOBAL.contains(&id.as_str()) {
                return Err(Failure::Usage(anyhow!(
                    "unknown setting {ENV_PREFIX}{key} in the environment: names are those of the flags"
                )));
            }
        }
        Ok(Self { format: args.format, quiet: args.quiet, file, file_name })
    }

    /// A context without a settings file, for callers inside the program.
    pub fn plain() -> Self {
        Self { format: OutputFormat::Table, quiet: false, file: None, file_name: String::new() }
    }

    /// The settings of `subcommand`: `S::default()`, then the file's table, then the environment,
    /// then the flags that were given. `flags` must skip absent ones. A key that no flag of the
    /// subcommand, or of one below it, is named after is refused, so that a subcommand may resolve
    /// its settings into several structs.
    pub fn resolve<S, A>(&self, subcommand: &str, flags: &A) -> Result<S, Failure>
    where
        S: Default + Serialize + DeserializeOwned,
        A: Serialize,
    {
        let command = super::Cli::command();
        let mut figment = Figment::from(Serialized::defaults(S::default()));
        if let Some(table) = self.file.as_ref().and_then(|f| f.get(subcommand)) {
            self.check_keys(&command, subcommand, table)?;
            let text = toml::to_string(table).map_err(Failure::failed)?.replace('\u{0}', "");
            // Keys may be written as the flags are, with dashes.
            let text = dashes_to_underscores(&text)?;
            figment = figment.merge(Toml::string(&text));
        }
        if let Some(sub) = command.find_subcommand(subcommand) {
            let below = sub.get_subcommands().flat_map(clap::Command::get_arguments);
            for arg in sub.get_arguments().chain(below) {
                let id = arg.get_id().as_str();
                let name = format!("{ENV_PREFIX}{}", id.to_uppercase());
                if let Ok(value) = std::env::var(&name) {
                    figment = figment.merge(Variable { name, id, value: parse_scalar(&value) });
                }
            }
        }
        figment.merge(Serialized::defaults(flags)).extract().map_err(|e| {
            let each = e.into_iter().map(|e| self.said(&e));
            Failure::usage(each.collect::<Vec<_>>().join("; "))
        })
    }

    /// A setting that cannot be, with where it was given.
    fn said(&self, error: &figment::Error) -> String {
        let from = error.metadata.as_ref().map_or("", |m| &m.name);
        if from.starts_with(ENV_PREFIX) {
            return format!("{from}: {}", error.kind);
        }
        match &self.file_name {
            none if none.is_empty() => error.to_string(),
            file => format!("{error} (settings file {file})"),
        }
    }

    fn check_keys(
        &self,
        command: &clap::Command,
        subcommand: &str,
        table: &toml::Value,
    ) -> Result<(), Failure> {
        let (Some(table), Some(sub)) = (table.as_table(), command.find_subcommand(subcommand)) else {
            return Err(Failure::Usage(anyhow!("{}: {subcommand} is not a table", self.file_name)));
        };
        let has = |c: &clap::Command, id: &str| c.get_arguments().any(|a| a.get_id() == id);
        for key in table.keys() {
            let id = key.replace('-', "_");
            if !has(sub, &id) && !sub.get_subcommands().any(|below| has(below, &id)) {
                return Err(Failure::Usage(anyhow!(
                    "{}: unknown key '{key}' in [{subcommand}]: keys are named after the flags of `{subcommand}`",
                    self.file_name
                )));
            }
        }
        Ok(())
    }
}

const ENV_PREFIX: &str = "LORA_HBM_";
/// Variables that are settings of the program as a whole, whatever the subcommand.
const GLOBAL: &[&str] = &["log", "data", "format", "config"];

/// A setting of the environment, under the variable's name.
struct Variable<'a> {
    name: String,
    id: &'a str,
    value: Value,
}

impl Provider for Variable<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Serialized::default(self.id, &self.value).data()
    }
}

/// The subcommands and those below them (`trace generate`).
fn subcommands_below(command: &clap::Command) -> Vec<&clap::Command> {
    command.get_subcommands().flat_map(|c| std::iter::once(c).chain(c.get_subcommands())).collect()
}

fn dashes_to_underscores(toml: &str) -> Result<String, Failure> {
    let table: toml::Table = toml.parse().map_err(Failure::failed)?;
    let renamed: toml::Table = table.into_iter().map(|(k, v)| (k.replace('-', "_"), v)).collect();
    toml::to_string(&renamed).map_err(Failure::failed)
}

/// An environment value as the type that it looks like; figment's own parser would also take
/// brackets and braces apart, which file names may hold.
fn parse_scalar(text: &str) -> Value {
    if let Ok(v) = text.parse::<bool>() {
        return v.into();
    }
    if let Ok(v) = text.parse::<i64>() {
        return v.into();
    }
    if let Ok(v) = text.parse::<f64>() {
        return v.into();
    }
    text.to_owned().into()
}

fn start_logging(args: &GlobalArgs) {
    let level = match (args.quiet, args.verbose) {
        (true, _) => "warn",
        (_, 0) => "info",
        (_, 1) => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("LORA_HBM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("warn,lora_hbm={level}")));
    // Fails only if a subscriber is set already, which tests do.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}
