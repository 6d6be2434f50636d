//! `lora-hbm completions`.

use clap::{Args, CommandFactory};

use super::failure::Failure;
use super::settings::Context;

#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub fn run(args: &CompletionsArgs, _: &Context) -> Result<(), Failure> {
    clap_complete::generate(args.shell, &mut super::Cli::command(), "lora-hbm", &mut std::io::stdout());
    Ok(())
}
