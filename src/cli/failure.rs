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
            // The alternate form prints the whole chain of causes on one line.
            Self::Usage(e) | Self::Failed(e) => eprintln!("error: {e:#}"),
            Self::Unmet(message) => eprintln!("{message}"),
        }
        ExitCode::from(self.status())
    }
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
