//! Results: records, statistics, files, figures.

pub mod decision_log;
pub mod record;
