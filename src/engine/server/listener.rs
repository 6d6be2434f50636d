//! Connections: accepted one by one with time-outs, drained at the end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::body::Limits;
use super::intake::Received;
use super::routes::router;
use super::state::{ServerInfo, State};
use crate::engine::Engine;

/// How often a drain looks whether it is done.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// How long connections get to send what they have when their requests are answered.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How a server is run.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens.
    pub host: String,
    /// 0 takes any that is free.
    pub port: u16,
    /// The key that clients must send.
    pub api_key: Option<String>,
    /// How long running requests get to end after the first stop.
    pub shutdown_timeout: Duration,
    /// What clients may send, and how long they may take.
    pub limits: Limits,
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {host}:{port}: {source}: choose another --host or --port, or stop what has it")]
pub struct BindError {
    host: String,
    port: u16,
    source: std::io::Error,
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered.
    Drained,
    /// This many requests were cut off by the time-out or a second stop.
    Cut(usize),
}

/// A bound server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    state: Arc<State>,
    shutdown_timeout: Duration,
}

/// Gives a server its engine.
#[derive(Clone, Debug)]
pub struct Handle(Arc<State>);

impl Handle {
    /// The engine is loaded and warm: requests are taken from now on. Once only; a second engine is
    /// dropped.
    pub fn ready(&self, engine: Arc<Engine>, info: ServerInfo) {
        self.0.ready(engine, info);
    }
}

impl Server {
    /// Binds the address. Connections wait until [`Self::run`].
    ///
    /// # Errors
    /// If it cannot be had.
    pub async fn bind(options: ServerOptions) -> Result<Self, BindError> {
        let ServerOptions { host, port, api_key, shutdown_timeout, limits } = options;
        let bound = async {
            let listener = TcpListener::bind((host.as_str(), port)).await?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bound.await.map_err(|source| BindError { host, port, source })?;
        let state = Arc::new(State::new(api_key.as_deref(), limits));
        Ok(Self { listener, address, state, shutdown_timeout })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// See [`Handle`].
    pub fn handle(&self) -> Handle {
        Handle(self.state.clone())
    }

    /// Serves until the first message on `stops` (or the end of its senders), then refuses new requests
    /// while those that run get the shutdown time-out to end. A second message ends it at once.
    pub async fn run(self, mut stops: mpsc::Receiver<()>) -> Ended {
        let app = router(self.state.clone());
        let graceful = GracefulShutdown::new();
        let accept = async {
            loop {
                match self.listener.accept().await {
                    Ok((stream, _)) => connection(stream, app.clone(), &graceful, &self.state.limits),
                    Err(e) => {
                        // Out of file descriptors, most likely: some come back when connections end.
                        tracing::warn!("cannot accept a connection: {e}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        };
        let state = &self.state;
        let drain = async {
            let _ = stops.recv().await;
            state.start_draining();
            let running = state.in_flight();
            if running > 0 {
                tracing::info!("no new requests; {running} are still running");
            }
            let until = Instant::now() + self.shutdown_timeout;
            // A closed channel is no second stop.
            let second = async {
                if stops.recv().await.is_none() {
                    std::future::pending::<()>().await;
                }
            };
            let drained = async {
                while state.in_flight() > 0 && Instant::now() < until {
                    tokio::time::sleep(DRAIN_POLL).await;
                }
            };
            tokio::select! { () = second => {} () = drained => {} }
        };
        tokio::select! {
            () = accept => {}
            () = drain => {}
        }
        let cut = self.state.in_flight();
        if cut > 0 {
            return Ended::Cut(cut);
        }
        // What is written already may still be on its way out.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, graceful.shutdown()).await;
        Ended::Drained
    }
}

fn connection(stream: TcpStream, app: Router, graceful: &GracefulShutdown, limits: &Limits) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    // A client that reads nothing any more: its output is dropped, and with it what it still holds.
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write));
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Received(Instant::now()));
        app.clone().oneshot(request.map(axum::body::Body::new))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!("a connection ended: {e}");
        }
    });
}
