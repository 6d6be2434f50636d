//! Settings that are text or lists although they may look like numbers where they come from.

use std::fmt::Display;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error};

#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Flag(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

impl Scalar {
    fn text(self) -> String {
        match self {
            Self::Flag(v) => v.to_string(),
            Self::Integer(v) => v.to_string(),
            Self::Number(v) => v.to_string(),
            Self::Text(v) => v,
        }
    }
}

/// A text that a settings file or the environment may spell as a number or a truth value.
pub(super) fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<Scalar>::deserialize(from)?.map(Scalar::text))
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ScalarOrList {
    List(Vec<Scalar>),
    One(Scalar),
}

/// A list: an array in a file, comma-separated text in the environment, or one value.
pub(super) fn list<'de, D, T>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: Display,
{
    let texts: Vec<String> = match ScalarOrList::deserialize(from)? {
        ScalarOrList::List(items) => items.into_iter().map(Scalar::text).collect(),
        ScalarOrList::One(one) => one.text().split(',').map(|t| t.trim().to_owned()).collect(),
    };
    texts.iter().map(|t| t.parse().map_err(|e| D::Error::custom(format!("'{t}': {e}")))).collect()
}
