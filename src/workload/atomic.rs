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
        std::fs::rename(&temporary, path)
    })();
    if filled.is_err() {
        // The failure itself is what matters; a leftover that cannot be removed changes nothing.
        let _ = std::fs::remove_file(&temporary);
    }
    filled
}
