//! What the client reads of one message of a reply, whatever the interface.

use crate::report::record::PartsS;

/// One message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Whether it brings text of the output, or says that a token is there.
    pub token: bool,
    /// Seconds to the first token, by the server.
    pub ttft: Option<f64>,
    /// Where the TTFT went.
    pub parts: Option<PartsS>,
    /// The server's count of prompt tokens.
    pub prompt_tokens: Option<u32>,
    /// The server's count of output tokens.
    pub output_tokens: Option<u32>,
    /// Whether the output is whole; servers that do not say just end the stream.
    pub finished: Option<bool>,
    /// A failure in the middle of the stream.
    pub error: Option<String>,
}
