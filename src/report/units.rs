//! Quantities as people read them.

/// A time as people read it: `1.23 s`, `45.6 ms`, `789 µs`.
pub fn seconds(s: f64) -> String {
    let size = s.abs();
    match size {
        _ if size >= 1.0 => format!("{s:.2} s"),
        _ if size >= 1e-3 => format!("{:.1} ms", s * 1e3),
        _ => format!("{:.0} µs", s * 1e6),
    }
}
