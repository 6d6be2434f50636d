//! Amounts of memory as people write them.

/// A size that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no amount of memory: write 2GiB, 512MiB or 2 (GiB)")]
pub struct SizeError(String);

/// Bytes from `512MiB`, `2GB`, or a number of GiB.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError(text.to_owned());
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "g" | "gib" => 1 << 30,
        "m" | "mib" => 1 << 20,
        "k" | "kib" => 1 << 10,
        "gb" => 1_000_000_000,
        "mb" => 1_000_000,
        "kb" => 1_000,
        "b" => 1,
        _ => return Err(wrong()),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 => Ok((n * factor as f64) as u64),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory_are_read_with_and_without_a_unit() {
        for (text, bytes) in [
            ("2", 2 << 30),
            ("0.5GiB", 1 << 29),
            ("512 MiB", 512 << 20),
            ("3mb", 3_000_000),
            ("1g", 1 << 30),
            ("4096B", 4096),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GiB", "-1", "2 parsecs", "1TB", "nan"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
