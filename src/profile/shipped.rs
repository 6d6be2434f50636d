//! Profiles that come with the program: the files of `configs/profiles/`, by name.

use std::path::Path;

use super::{Profile, ProfileError};

include!(concat!(env!("OUT_DIR"), "/shipped_profiles.rs"));

impl Profile {
    /// A file's profile, or a shipped one: what is no file and looks like no path is a name.
    pub fn named(text: &str) -> Result<Self, ProfileError> {
        let path = Path::new(text);
        let looks_like_a_path = path.components().count() > 1 || path.extension().is_some();
        if looks_like_a_path || path.exists() {
            return Self::load(path);
        }
        match SHIPPED.iter().find(|s| s.0 == text) {
            Some((name, json)) => Self::parse(name, json),
            None => Err(ProfileError::Unknown {
                name: text.to_owned(),
                shipped: SHIPPED.iter().map(|s| s.0.to_owned()).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_profile_is_sound() {
        for (name, _) in SHIPPED {
            Profile::named(name).unwrap();
        }
    }

    #[test]
    fn what_is_neither_file_nor_name_is_refused_with_both_remedies() {
        let error = Profile::named("h900-gpt9").unwrap_err().to_string();
        assert!(error.contains("'h900-gpt9'") && error.contains("calibrate"), "{error}");
        let error = Profile::named("missing/profile.json").unwrap_err().to_string();
        assert!(error.contains("missing/profile.json"), "{error}");
    }
}
