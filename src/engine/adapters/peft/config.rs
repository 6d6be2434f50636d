//! `adapter_config.json`: what PEFT does with it, as far as the engine serves that.

use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::{Map, Value};

use super::PeftError;

/// Settings that change what is computed in a way that is not implemented, with the reason. Any value but
/// null, false and empty asks for it.
const UNSUPPORTED: [(&str, &str); 15] = [
    ("use_dora", "DoRA rescales the base weights, which all adapters share"),
    ("use_qalora", "QALoRA pools its inputs"),
    ("use_bdlora", "block-diagonal matrices are not read"),
    ("lora_bias", "adapters have no biases here"),
    ("fan_in_fan_out", "the base's linear layers are not transposed"),
    ("modules_to_save", "they would replace modules of the base, which all adapters share"),
    ("trainable_token_indices", "they would change the embedding, which all adapters share"),
    ("layer_replication", "the base's layers are what they are"),
    ("target_parameters", "only linear modules are adapted"),
    ("alora_invocation_tokens", "an adapter is active from a request's first token"),
    ("arrow_config", "a request has one adapter, and it is not routed"),
    ("kasa_config", "the singular values would have to be applied"),
    ("monteclora_config", "its matrices are drawn, not stored"),
    ("megatron_config", "parallel layers are not read"),
    ("layers_pattern", "the layers' list is named layers here"),
];

/// Initialisations that change the base's weights: the adapter is only right on those.
const CHANGED_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// A JSON object in the order of the file: of patterns that match, the first one counts.
struct InOrder<V>(Vec<(String, V)>);

impl<V> Default for InOrder<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for InOrder<V> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = InOrder<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(InOrder::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(InOrder(pairs))
            }
        }
        deserializer.deserialize_any(Pairs(PhantomData))
    }
}

/// One, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

#[derive(Deserialize)]
struct Raw {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    target_modules: Option<OneOrMore<String>>,
    exclude_modules: Option<OneOrMore<String>>,
    layers_to_transform: Option<OneOrMore<usize>>,
    #[serde(default)]
    rank_pattern: InOrder<usize>,
    #[serde(default)]
    alpha_pattern: InOrder<f32>,
    base_model_name_or_path: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Which modules are meant.
#[derive(Debug)]
enum Targets {
    /// Nothing is said: whatever the file has tensors of.
    Unsaid,
    /// Every linear module of every layer.
    AllLinear,
    /// Names, or ends of names.
    Names(Vec<String>),
    /// A pattern of whole names.
    Pattern(Box<Regex>),
}

/// What of the file matters.
#[derive(Debug)]
pub(super) struct LoraConfig {
    folder: PathBuf,
    rank: usize,
    alpha: f32,
    stabilised: bool,
    targets: Targets,
    excluded: Targets,
    layers: Option<Vec<usize>>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f32)>,
    /// The base that the adapter says it was made for.
    pub base: Option<String>,
}

impl LoraConfig {
    /// Reads the file in `folder`.
    pub fn read(folder: &Path) -> Result<Self, PeftError> {
        let path = folder.join("adapter_config.json");
        let unreadable = |message: String| PeftError::Unreadable { path: path.clone(), message };
        let text = std::fs::read_to_string(&path).map_err(|e| unreadable(e.to_string()))?;
        let raw: Raw = serde_json::from_str(&text).map_err(|e| unreadable(e.to_string()))?;
        if let Some(what) = unsupported(&raw) {
            return Err(PeftError::Unsupported { path: folder.to_owned(), what });
        }
        let regex = |field: &str, text: &str, pattern: String| {
            Regex::new(&pattern).map_err(|e| unreadable(format!("{field} {text:?} is no pattern: {e}")))
        };
        let targets = |field: &str, said: Option<OneOrMore<String>>| match said {
            None => Ok(Targets::Unsaid),
            Some(OneOrMore::More(names)) => Ok(Targets::Names(names)),
            Some(OneOrMore::One(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Some(OneOrMore::One(text)) => {
                regex(field, &text, format!("^(?:{text})$")).map(|r| Targets::Pattern(Box::new(r)))
            }
        };
        let end = |field: &str, text: &str| regex(field, text, format!(r"^(?:.*\.)?(?:{text})$"));
        let ranks = raw.rank_pattern.0.iter().map(|(key, r)| Ok((end("rank_pattern", key)?, *r)));
        let alphas = raw.alpha_pattern.0.iter().map(|(key, a)| Ok((end("alpha_pattern", key)?, *a)));
        let layers = raw.layers_to_transform.map(|layers| match layers {
            OneOrMore::One(layer) => vec![layer],
            OneOrMore::More(layers) => layers,
        });
        Ok(Self {
            folder: folder.to_owned(),
            rank: raw.r,
            alpha: raw.lora_alpha,
            stabilised: raw.use_rslora,
            ranks: ranks.collect::<Result<_, PeftError>>()?,
            alphas: alphas.collect::<Result<_, PeftError>>()?,
            targets: targets("target_modules", raw.target_modules)?,
            excluded: targets("exclude_modules", raw.exclude_modules)?,
            layers: layers.filter(|layers| !layers.is_empty()),
            base: raw.base_model_name_or_path,
        })
    }

    /// Whether PEFT adapts the module called `key` (`model.layers.3.self_attn.q_proj`) of `layer`; none where
    /// the file does not say which modules it is about.
    pub fn adapts(&self, key: &str, layer: usize) -> Result<Option<bool>, PeftError> {
        if !matches!(self.excluded, Targets::Unsaid) && self.matches(&self.excluded, key)? {
            return Ok(Some(false));
        }
        Ok(match &self.targets {
            Targets::Unsaid => None,
            // As in PEFT: a list of layers goes with a list of modules.
            Targets::Names(_) => {
                let chosen = self.layers.as_ref().is_none_or(|layers| layers.contains(&layer));
                Some(chosen && self.matches(&self.targets, key)?)
            }
            targets => Some(self.matches(targets, key)?),
        })
    }

    /// Rank of the module called `key`.
    pub fn rank(&self, key: &str) -> Result<usize, PeftError> {
        self.first(&self.ranks, key, self.rank)
    }

    /// What the product of the module's matrices is multiplied by: `alpha / rank`, or `alpha / sqrt(rank)`.
    pub fn scale(&self, key: &str) -> Result<f32, PeftError> {
        let (rank, alpha) = (self.rank(key)? as f32, self.first(&self.alphas, key, self.alpha)?);
        Ok(alpha / if self.stabilised { rank.sqrt() } else { rank })
    }

    fn first<T: Copy>(&self, patterns: &[(Regex, T)], key: &str, otherwise: T) -> Result<T, PeftError> {
        for (pattern, value) in patterns {
            if self.is_match(pattern, key)? {
                return Ok(*value);
            }
        }
        Ok(otherwise)
    }

    fn matches(&self, targets: &Targets, key: &str) -> Result<bool, PeftError> {
        match targets {
            Targets::Unsaid | Targets::AllLinear => Ok(true),
            Targets::Pattern(pattern) => self.is_match(pattern, key),
            Targets::Names(names) => Ok(names.iter().any(|name| {
                key.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })),
        }
    }

    fn is_match(&self, pattern: &Regex, key: &str) -> Result<bool, PeftError> {
        pattern.is_match(key).map_err(|e| PeftError::Unreadable {
            path: self.folder.join("adapter_config.json"),
            message: format!("the pattern {} fails on {key}: {e}", pattern.as_str()),
        })
    }
}

/// What a file asks for that is not implemented, and why it is not.
fn unsupported(raw: &Raw) -> Option<String> {
    if let Some(kind) = raw.peft_type.as_deref().filter(|k| *k != "LORA") {
        return Some(format!("peft_type {kind}"));
    }
    if let Some(bias) = raw.bias.as_deref().filter(|b| *b != "none") {
        return Some(format!("bias {bias:?} (it would change the base's biases, which all adapters share)"));
    }
    let init = raw.init_lora_weights.as_ref().and_then(Value::as_str).unwrap_or_default();
    if CHANGED_BASE.iter().any(|known| init.to_lowercase().starts_with(known)) {
        return Some(format!(
            "init_lora_weights {init:?} (it changed the base's weights: convert the adapter to plain LoRA with \
             PEFT's path_initial_model_for_weight_conversion)"
        ));
    }
    let asks = |value: &&Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
        Value::String(s) => !s.is_empty() && s != "layers",
        _ => true,
    };
    UNSUPPORTED.iter().find_map(|(field, why)| {
        let value = raw.rest.get(*field).filter(asks)?;
        (value != &serde_json::json!(["layers"])).then(|| format!("{field} {value} ({why})"))
    })
}
