//! Why a request failed, sorted into kinds that can be counted.

use super::endpoint::describe;

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No connection could be had.
    #[error("{0}")]
    Connect(String),
    /// The connection failed later.
    #[error("{0}")]
    Transport(String),
    /// A refusal.
    #[error("HTTP {status}: {message}")]
    Http {
        /// The HTTP status.
        status: u16,
        /// The body's message.
        message: String,
    },
    /// An answer of another shape.
    #[error("the answer is not what was expected: {0}")]
    Shape(String),
    /// The server said so in the middle of the stream.
    #[error("the server failed in the middle of the stream: {0}")]
    MidStream(String),
    /// The stream ended too early.
    #[error("the stream ended before the output did")]
    Cut,
    /// The stream ended at once, or no message of it had text, so that there is no first token to time.
    #[error("the stream had no text: there is no first token to time")]
    Empty,
    /// It took too long.
    #[error("no end after {0} s")]
    Timeout(String),
    /// The run was ended.
    #[error("the run was interrupted")]
    Interrupted,
}

impl Fault {
    /// One name for all faults that are counted together.
    pub fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "connection refused or not made".to_owned(),
            Self::Transport(_) => "connection lost".to_owned(),
            Self::Http { status, .. } => format!("HTTP {status}"),
            Self::Shape(_) => "unexpected answer".to_owned(),
            Self::MidStream(_) => "error in the stream".to_owned(),
            Self::Cut => "stream cut off".to_owned(),
            Self::Empty => "no text".to_owned(),
            Self::Timeout(_) => "time-out".to_owned(),
            Self::Interrupted => "interrupted".to_owned(),
        }
    }
}

impl From<reqwest::Error> for Fault {
    fn from(error: reqwest::Error) -> Self {
        let said = describe(&error);
        if error.is_connect() { Self::Connect(said) } else { Self::Transport(said) }
    }
}
