//! A server on a free port of this machine, inside the process: for calibration, sweeps and tests.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{BindError, Ended, Limits, Server, ServerInfo, ServerOptions};
use crate::engine::Engine;
use crate::engine::setup::{Loaded, SetupError};
use crate::report::decision_log::DecisionLog;

/// A local server that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The engine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The port.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The threads that serve.
    #[error("cannot start the server's threads: {0}")]
    Runtime(#[from] std::io::Error),
}

/// A running server with its own threads. Dropping it stops it.
#[derive(Debug)]
pub struct LocalServer {
    /// None once it has been stopped.
    running: Option<Running>,
    address: SocketAddr,
    engine: Arc<Engine>,
}

#[derive(Debug)]
struct Running {
    runtime: Runtime,
    stops: mpsc::Sender<()>,
    serving: JoinHandle<Ended>,
}

impl LocalServer {
    /// Starts an engine with `gpu_loras` slots and serves it on 127.0.0.1.
    ///
    /// # Errors
    /// If the engine cannot be set up or no port can be had.
    pub fn start(loaded: &Loaded, gpu_loras: usize, log: Option<DecisionLog>) -> Result<Self, LocalError> {
        let engine = Arc::new(loaded.start(gpu_loras, log)?);
        // One thread serves and, in tests and sweeps, runs the client too: the engine keeps the others.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("local-server")
            .enable_all()
            .build()?;
        let options = ServerOptions {
            host: "127.0.0.1".to_owned(),
            port: 0,
            api_key: None,
            shutdown_timeout: Duration::from_secs(30),
            limits: Limits::default(),
        };
        let server = runtime.block_on(Server::bind(options))?;
        let address = server.address();
        server.handle().ready(Arc::clone(&engine), ServerInfo::of(loaded, gpu_loras));
        let (stops, inbox) = mpsc::channel(1);
        let serving = runtime.spawn(server.run(inbox));
        Ok(Self { running: Some(Running { runtime, stops, serving }), address, engine })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The engine behind it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Runs a client on the server's own threads.
    pub fn block_on<F>(&self, client: F) -> F::Output
    where
        F: Future,
    {
        match &self.running {
            Some(running) => running.runtime.block_on(client),
            None => unreachable!("a stopped server is gone"),
        }
    }

    /// Lets requests end, stops serving, and ends the engine (its decision log is whole then).
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(Running { runtime, stops, serving }) = self.running.take() {
            drop(stops);
            // Fails only if the serving task panicked, which it has reported.
            let _ = runtime.block_on(serving);
            self.engine.shutdown();
        }
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        self.end();
    }
}
