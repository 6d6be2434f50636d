//! Tells the program which commit it was built from, for the manifests of its runs, and which profiles
//! it ships. The names do not start with `LORA_HBM_`: cargo sets them for what it runs too, and the
//! program reads its settings there.

use std::path::Path;
use std::process::Command;

/// What the binary is made from, as git pathspecs and as paths that rerun this script.
const INPUTS: [&str; 7] = ["src", "crates", "assets", "configs", "build.rs", "Cargo.toml", "Cargo.lock"];

fn main() {
    ship_profiles();
    for path in INPUTS {
        rerun_if_changed(path);
    }
    // Outside its own repository (a source archive, a vendored copy inside another one) it says so.
    let own = git(&["rev-parse", "--show-toplevel"])
        .zip(std::env::current_dir().ok())
        .is_some_and(|(top, here)| Path::new(&top).canonicalize().ok() == here.canonicalize().ok());
    let commit = if own { git(&["rev-parse", "HEAD"]) } else { None };
    let dirty = commit.is_some().then(|| {
        let mut status = vec!["status", "--porcelain", "--"];
        status.extend(INPUTS);
        git(&status).is_some_and(|changes| !changes.is_empty())
    });
    println!("cargo:rustc-env=BUILD_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    println!("cargo:rustc-env=BUILD_DIRTY={}", dirty.map_or("unknown".to_owned(), |d| d.to_string()));
    if own {
        // The log of HEAD grows with every commit, checkout and merge, and with nothing else; the
        // index would not do, since `git status` itself rewrites it.
        if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
            rerun_if_changed(&log);
        }
    }
}

/// Writes the list of `configs/profiles/` that `src/profile/shipped.rs` includes, by name.
fn ship_profiles() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let files = std::fs::read_dir(Path::new(&root).join("configs/profiles"));
    let mut paths: Vec<_> = files.into_iter().flatten().filter_map(|f| Some(f.ok()?.path())).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let entry = |path: &std::path::PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        format!("({name:?}, include_str!({:?})),", path.display().to_string())
    };
    let entries: String = paths.iter().map(entry).collect();
    let out = std::env::var("OUT_DIR").expect("cargo sets it");
    let text = format!("/// Names and texts.\nconst SHIPPED: &[(&str, &str)] = &[{entries}];\n");
    std::fs::write(Path::new(&out).join("shipped_profiles.rs"), text).expect("cargo's folder is writable");
}

/// Only of what exists: cargo would take a missing path for a changed one each time.
fn rerun_if_changed(path: &str) {
    if Path::new(path).exists() {
        println!("cargo:rerun-if-changed={path}");
    }
}

/// What git prints, without the line end; none where there is no git or it fails.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim_end().to_owned())
}
