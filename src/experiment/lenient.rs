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
pub fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<Scalar>::deserialize(from)?.map(Scalar::text))
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ScalarOrList {
    List(Vec<Scalar>),
    One(Scalar),
}

impl ScalarOrList {
    fn texts(self) -> Vec<String> {
        match self {
            Self::List(items) => items.into_iter().map(Scalar::text).collect(),
            Self::One(one) => one.text().split(',').map(|t| t.trim().to_owned()).collect(),
        }
    }

    fn joined(self) -> String {
        self.texts().join(",")
    }

    fn parsed<T: FromStr<Err: Display>, E: Error>(self) -> Result<Vec<T>, E> {
        let parse = |t: &String| t.parse().map_err(|e| E::custom(format!("'{t}': {e}")));
        self.texts().iter().map(parse).collect()
    }
}

/// [`text`] that is always there.
pub fn word<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Scalar::deserialize(from).map(Scalar::text)
}

/// Comma-separated text, which a settings file may write as an array of numbers: `2,8`.
pub fn joined<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<ScalarOrList>::deserialize(from)?.map(ScalarOrList::joined))
}

/// [`joined`] that is always there.
pub fn joined_word<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    ScalarOrList::deserialize(from).map(ScalarOrList::joined)
}

/// [`list`] that may be absent.
pub fn some_list<'de, D, T>(from: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: Display,
{
    Option::<ScalarOrList>::deserialize(from)?.map(ScalarOrList::parsed).transpose()
}

/// A list: an array in a file, comma-separated text in the environment, or one value.
pub fn list<'de, D, T>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr,
    T::Err: Display,
{
    ScalarOrList::deserialize(from)?.parsed()
}
