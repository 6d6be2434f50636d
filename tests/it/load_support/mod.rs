//! What several tests need: the program as a child process, and a stand-in for a server.

#[cfg(feature = "server")]
pub mod mock;
#[cfg(feature = "server")]
pub mod openai;

use std::path::Path;

use assert_cmd::Command;
use assert_cmd::assert::Assert;

/// The program, with no settings from the environment and `folder` as its data folder.
pub fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora-hbm"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LORA_HBM_") {
            command.env_remove(name);
        }
    }
    command.env("LORA_HBM_DATA", folder).current_dir(folder);
    command
}

/// Standard output of a finished program.
pub fn stdout(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stdout).into_owned()
}

/// Standard error of a finished program.
pub fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}
