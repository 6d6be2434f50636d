//! Files that are there whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

/// Writes a file beside `path` and renames it there, so that no reader sees half of it and a failure
/// leaves what was there before.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"))?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}.part", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let filled = (|| {
        let mut out = BufWriter::with_capacity(1 << 16, File::create(&temporary)?);
        fill(&mut out)?;
        out.flush()?;
        // Durable before it takes the old file's place: else a power cut could leave neither.
        out.get_ref().sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if filled.is_err() {
        // The failure itself is what matters; a leftover that cannot be removed changes nothing.
        let _ = std::fs::remove_file(&temporary);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_half_way_leaves_the_old_file_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.jsonl");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |out| {
            out.write_all(b"half of the ne")?;
            Err(io::Error::other("the source ran dry"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the source ran dry");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
