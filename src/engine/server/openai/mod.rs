//! The endpoints of OpenAI's API that vLLM has: completions, chat, and the tokenizer's.

mod answer;
mod chat;
mod completions;
mod request;
mod stream;
mod template;
mod tokens;

pub(super) use chat::chat_completions;
pub(super) use completions::completions;
pub(super) use template::{Plain, Template};
pub(super) use tokens::{detokenize, tokenize};
