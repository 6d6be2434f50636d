//! Results: records, statistics, files, figures.

pub mod record;
