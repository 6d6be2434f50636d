//! `lora-hbm serve`.

use super::failure::Failure;
use super::settings::Context;
use clap::Args;

#[derive(Args, Debug)]
pub struct ServeArgs {}

pub fn run(_: &ServeArgs, _: &Context) -> Result<(), Failure> {
    Err(Failure::failed("not here yet"))
}
