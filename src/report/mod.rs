//! Results: records, statistics, files, figures.

pub mod files;
pub mod record;
pub mod requests;
pub mod results;
pub mod stats;
