//! Names of settings: which there are, and which one was meant.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

/// The names that `T`'s fields have in a file, as its `Deserialize` states them.
pub fn names_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut probe = Probe(&[]);
    // Always an error: the probe has no values to give.
    let _ = T::deserialize(&mut probe);
    probe.0
}

/// `unknown key 'modl' in [engine]; did you mean 'model'?`, or all the names where none is near.
pub fn unknown(key: &str, place: &str, names: &[&str]) -> String {
    let near = names
        .iter()
        .map(|name| (strsim::jaro_winkler(key, name), *name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness > 0.8);
    match near {
        Some((_, name)) => format!("unknown key '{key}' in [{place}]; did you mean '{name}'?"),
        None => format!("unknown key '{key}' in [{place}]; use one of {}", names.join(", ")),
    }
}

struct Probe(&'static [&'static str]);

#[derive(Debug)]
struct NoValue;

impl fmt::Display for NoValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("names only")
    }
}

impl std::error::Error for NoValue {}

impl de::Error for NoValue {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self
    }
}

impl<'de> Deserializer<'de> for &mut Probe {
    type Error = NoValue;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoValue> {
        Err(NoValue)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, NoValue> {
        self.0 = fields;
        Err(NoValue)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_type() {
        let names = names_of::<crate::experiment::Replicate>();
        assert_eq!(names, ["seeds", "repeats"]);
    }

    #[test]
    fn the_nearest_name_is_suggested() {
        let names = ["gpu_loras", "total_loras", "policy"];
        assert!(unknown("gpu_lora", "axes", &names).ends_with("in [axes]; did you mean 'gpu_loras'?"));
        assert!(unknown("zzz", "axes", &names).ends_with("use one of gpu_loras, total_loras, policy"));
    }
}
