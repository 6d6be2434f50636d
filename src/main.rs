//! The `lora-hbm` command: parse, dispatch, and turn the outcome into an exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    lora_hbm::cli::main(std::env::args_os())
}
