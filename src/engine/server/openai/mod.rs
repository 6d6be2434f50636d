//! The endpoints of OpenAI's API that vLLM has: completions, chat, and the tokenizer's.

mod answer;
mod chat;
mod completions;
mod logprobs;
mod messages;
mod request;
mod stream;
mod tokens;

pub(super) use chat::chat_completions;
pub(super) use completions::completions;
pub(super) use tokens::{detokenize, tokenize};
