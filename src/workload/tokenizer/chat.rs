//! From messages to a prompt: the model's own chat template, or a plain one.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::{Tokenizer, TokenizerError, TokenizerSource};
use crate::workload::gguf::{Gguf, GgufError, is_gguf};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else a template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A template that cannot be used, or messages that it does not take. Every message names where the template
/// comes from.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// Its file cannot be read.
    #[error("{}: {message}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A GGUF file's metadata.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// It is no template, or uses what is not implemented.
    #[error("the chat template of {origin}, line {line}: {message}")]
    Syntax {
        /// Where it comes from.
        origin: String,
        /// The template's line.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// It calls `raise_exception`: these messages are not for it.
    #[error("the chat template of {origin} refuses these messages: {message}")]
    Refused {
        /// Where it comes from.
        origin: String,
        /// What it says.
        message: String,
    },
    /// It fails on these messages.
    #[error("the chat template of {origin}, line {line}: {message}")]
    Render {
        /// Where it comes from.
        origin: String,
        /// The template's line.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// What it renders could not be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// What stands in where a tokenizer brings no template.
const PLAIN: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
                     {% if add_generation_prompt %}assistant:{% endif %}";

/// What [`Environment`] calls the one template in it.
const NAME: &str = "chat";

/// Marks the error of a template that refuses its messages.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// A template, compiled; see [`ChatTemplate::of`].
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokenizer: Tokenizer,
    /// None for the plain one.
    origin: Option<String>,
}

impl ChatTemplate {
    /// The template that a tokenizer's files bring: `chat_template.jinja` beside it, else `chat_template` of
    /// `tokenizer_config.json` (a list gives the one named `default`), else a GGUF file's metadata; a plain
    /// one (`role: content`, a line each) where there is none.
    ///
    /// # Errors
    /// If a file is there and cannot be read, or the template does not compile.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, ChatTemplateError> {
        let found = match tokenizer.source() {
            TokenizerSource::ByteLevel => None,
            TokenizerSource::File(path) => find(path)?,
        };
        match found {
            Some((origin, source)) => Self::compile(tokenizer, Some(origin), source),
            None => Self::compile(tokenizer, None, PLAIN.to_owned()),
        }
    }

    fn compile(
        tokenizer: &Tokenizer,
        origin: Option<String>,
        source: String,
    ) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| syntax_error(&origin, &e))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        for (name, token) in tokenizer.special_tokens() {
            environment.add_global(name.clone(), token.clone());
        }
        environment.add_template_owned(NAME, source).map_err(|e| syntax_error(&origin, &e))?;
        Ok(Self { environment, tokenizer: tokenizer.clone(), origin })
    }

    /// Where it comes from, to be shown at start.
    pub fn said(&self) -> &str {
        said(&self.origin)
    }

    /// Whether it is the plain one, whose text has no special tokens in it: a prompt made of it begins with
    /// the tokenizer's BOS ([`Tokenizer::encode`]), one made by a model's own is encoded as it is.
    pub fn is_plain(&self) -> bool {
        self.origin.is_none()
    }

    /// The conversation as text; `add_generation_prompt` ends it where the assistant's turn begins.
    ///
    /// # Errors
    /// If the template refuses the messages or fails on them.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatTemplateError> {
        let context = context! { messages => Serde(messages), add_generation_prompt };
        let rendered = self.environment.get_template(NAME).and_then(|t| t.render(context));
        rendered.map_err(|e| self.failed(&e))
    }

    /// The conversation as token ids. A model's own template has its BOS in the text; the plain one gets the
    /// tokenizer's.
    ///
    /// # Errors
    /// See [`Self::render`]; and if the text cannot be encoded.
    pub fn encode(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ChatTemplateError> {
        let text = self.render(messages, add_generation_prompt)?;
        let encoded =
            if self.is_plain() { self.tokenizer.encode(&text) } else { self.tokenizer.encode_as_is(&text) };
        Ok(encoded?)
    }

    fn failed(&self, error: &Error) -> ChatTemplateError {
        let origin = self.said().to_owned();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(e) = cause {
            if let Some(Raised(message)) = e.downcast_ref() {
                return ChatTemplateError::Refused { origin, message: message.clone() };
            }
            cause = e.source();
        }
        ChatTemplateError::Render { origin, line: error.line().unwrap_or(0), message: words(error) }
    }
}

fn said(origin: &Option<String>) -> &str {
    origin.as_deref().unwrap_or("lora-hbm itself (plain)")
}

fn syntax_error(origin: &Option<String>, error: &Error) -> ChatTemplateError {
    ChatTemplateError::Syntax {
        origin: said(origin).to_owned(),
        line: error.line().unwrap_or(0),
        message: words(error),
    }
}

fn words(error: &Error) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()))
}

/// The template beside a tokenizer or in it, and where it is.
fn find(tokenizer: &Path) -> Result<Option<(String, String)>, ChatTemplateError> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|e| ChatTemplateError::Unreadable { path: path.to_owned(), message: e.to_string() })
    };
    let path = tokenizer.with_file_name("chat_template.jinja");
    if path.is_file() {
        return Ok(Some((path.display().to_string(), read(&path)?)));
    }
    let path = tokenizer.with_file_name("tokenizer_config.json");
    if path.is_file() {
        let wrong = |message| ChatTemplateError::Unreadable { path: path.clone(), message };
        let text = read(&path)?;
        let config: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        if let Some(template) = configured(&config).map_err(wrong)? {
            return Ok(Some((path.display().to_string(), template)));
        }
    }
    if is_gguf(tokenizer) {
        let file = Gguf::open(tokenizer)?;
        let template = file.text("tokenizer.chat_template")?;
        return Ok(template.map(|t| (tokenizer.display().to_string(), t.to_owned())));
    }
    Ok(None)
}

/// `chat_template` of a `tokenizer_config.json`: a text, or a list of named ones.
fn configured(config: &serde_json::Value) -> Result<Option<String>, String> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
        template: String,
    }
    match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(list) => {
            let list = Vec::<Named>::deserialize(list)
                .map_err(|e| format!("chat_template is neither a text nor a list of named ones: {e}"))?;
            let names: Vec<_> = list.iter().map(|t| t.name.clone()).collect();
            match list.into_iter().find(|t| t.name == "default") {
                Some(default) => Ok(Some(default.template)),
                None => Err(format!("no chat_template is named default, only {}", names.join(", "))),
            }
        }
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The local time, as C's `strftime` formats it.
fn strftime_now(format: String) -> Result<String, Error> {
    use chrono::format::{Item, StrftimeItems};
    let items: Vec<Item<'_>> = StrftimeItems::new(&format).collect();
    if items.contains(&Item::Error) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now cannot format {format:?}"),
        ));
    }
    Ok(chrono::Local::now().format_with_items(items.into_iter()).to_string())
}

/// `tojson` as transformers has it: characters that HTML would escape stay as they are.
fn to_json(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<String, Error> {
    // What transformers takes besides; its other values are not implemented, and asking is an error.
    let neutral = [("ensure_ascii", false), ("sort_keys", false)];
    for (name, default) in neutral {
        if options.get::<Option<bool>>(name)?.is_some_and(|v| v != default) {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {name} is not supported")));
        }
    }
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    options.assert_all_used()?;
    let none: [(&str, Value); 0] = [];
    let json = minijinja::filters::tojson(value, indent, Kwargs::from_iter(none))?;
    Ok(unescape_html(&json.to_string()))
}

/// Undoes `\u003c` and the like in JSON text, and leaves every other escape.
fn unescape_html(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let plain = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')]
            .into_iter()
            .find(|(text, _)| escape.starts_with(text));
        rest = match plain {
            Some((text, c)) => {
                out.push(c);
                &escape[text.len()..]
            }
            None => {
                // A backslash and what it escapes, which is a character of one byte.
                let (pair, rest) = escape.split_at(2);
                out.push_str(pair);
                rest
            }
        };
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
