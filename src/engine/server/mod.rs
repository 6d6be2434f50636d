//! The HTTP server: the reference experiment's endpoints, OpenAI's as vLLM has them, and a few that
//! operators expect. `routes.rs` lists them all; `docs/api.md` tells what they take and give.
//!
//! It is bound before the model is loaded, says so on `/health` until the engine is ready, and drains when
//! it is told to stop.

mod adapters;
mod admin;
mod body;
mod error;
mod fields;
mod frames;
mod generate;
mod histogram;
mod intake;
mod listener;
mod local;
mod metrics;
mod observed;
mod openai;
mod params;
mod routes;
mod sequences;
mod state;

pub use body::Limits;
pub use intake::HANDED_OVER_BYTES;
pub use listener::{BindError, Ended, Handle, Server, ServerOptions};
pub use local::{LocalError, LocalServer};
pub(super) use state::cycle;
pub use state::{ServerInfo, chat_template};
