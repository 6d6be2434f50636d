//! Results: records, statistics, files, figures.

pub mod binds;
pub(crate) mod cells;
pub(crate) mod columns;
pub mod comparison;
pub mod decision_log;
pub mod digest;
pub mod files;
pub mod machine;
pub mod manifest;
#[cfg(feature = "plot")]
pub mod page;
#[cfg(feature = "plot")]
pub mod plot;
pub mod record;
pub mod requests;
pub mod results;
pub mod settings;
pub mod stats;
pub mod units;
pub mod validation;
