//! Registry clients as child processes.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::FetchError;

/// Runs a program in `folder` to its end. `Ok(false)` if there is no such program.
pub fn run(program: &str, args: &[&str], folder: &Path) -> Result<bool, FetchError> {
    let command = || format!("{program} {}", args.join(" "));
    let output = Command::new(program).args(args).current_dir(folder).stdin(Stdio::null()).output();
    let output = match output {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => {
            let said = e.to_string();
            return Err(FetchError::Client { command: command(), status: "not started".to_owned(), said });
        }
    };
    if output.status.success() {
        return Ok(true);
    }
    let text = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.trim().lines().collect();
    let said = lines[lines.len().saturating_sub(6)..].join("\n");
    Err(FetchError::Client { command: command(), status: output.status.to_string(), said })
}

/// The first of `programs` that runs with `args` to a good end.
pub fn first_that_runs<'a>(programs: &[&'a str], args: &[&str], folder: &Path) -> Option<&'a str> {
    programs.iter().copied().find(|program| matches!(run(program, args, folder), Ok(true)))
}
