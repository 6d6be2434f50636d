//! The one place that turns failures into messages and exit statuses.

use std::process::ExitCode;

/// Why a command did not end well.
#[derive(Debug)]
pub enum Failure {
    /// It was asked for something impossible: exit 2.
    Usage(anyhow::Error),
    /// It could not do what it was asked for: exit 1.
    Failed(anyhow::Error),
    /// It did, and an SLO, a validation or a check does not hold: exit 3. The report is printed
    /// already; this is the one-line verdict.
    Unmet(String),
}

impl Failure {
    /// A usage failure from a message.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self::Usage(anyhow::anyhow!("{message}"))
    }

    /// A failure from a message.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::Failed(anyhow::anyhow!("{message}"))
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Unmet(_) => 3,
        }
    }

    /// Prints it to standard error and gives the exit status.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Usage(e) | Self::Failed(e) => eprintln!("error: {}", with_causes(e)),
            Self::Unmet(message) => eprintln!("{message}"),
        }
        ExitCode::from(self.status())
    }
}

/// The chain of causes on one line. Many errors tell their cause themselves: nothing is said twice.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.into())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn causes_are_told_once() {
        let missing = || std::io::Error::other("nothing there");
        let told = crate::profile::ProfileError::Read { path: "p.json".to_owned(), source: missing() };
        assert_eq!(with_causes(&told.into()), "cannot read the profile p.json: nothing there");
        let bare = anyhow::Result::<()>::Err(missing().into()).context("reading p.json").unwrap_err();
        assert_eq!(with_causes(&bare), "reading p.json: nothing there");
    }
}
