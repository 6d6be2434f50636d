//! The HTTP server: the reference experiment's endpoints, and a few that operators expect.
//!
//! It is bound before the model is loaded, says so on `/health` until the engine is ready, and drains when
//! it is told to stop.

mod admin;
mod body;
mod error;
mod frames;
mod generate;
mod listener;
mod local;
mod metrics;
mod params;
mod routes;
mod state;

pub use listener::{BindError, Ended, Handle, Server, ServerOptions};
pub use local::{LocalError, LocalServer};
pub use state::ServerInfo;
pub(super) use state::cycle;
