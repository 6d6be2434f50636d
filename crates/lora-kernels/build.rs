//! Compiles `cuda/*.cu` with nvcc: PTX that any device from sm_80 can use, and machine code for sm_90a.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

const FLAGS: &[&str] = &[
    "--fatbin",
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
];

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = nvcc();
    let mut sources: Vec<PathBuf> = std::fs::read_dir("cuda")
        .expect("the folder cuda")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension() == Some(OsStr::new("cu")))
        .collect();
    sources.sort();
    let running: Vec<_> = sources.iter().map(|source| (source, compile(&nvcc, source, &out))).collect();
    for (source, child) in running {
        let done = child.wait_with_output().expect("nvcc ends");
        assert!(
            done.status.success(),
            "{} does not compile:\n{}{}",
            source.display(),
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        );
    }
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> std::process::Child {
    let image = out.join(source.with_extension("fatbin").file_name().expect("a file name"));
    Command::new(nvcc)
        .args(FLAGS)
        .arg("-o")
        .arg(image)
        .arg(source)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}", nvcc.display()))
}

/// The compiler: `$NVCC`, that of `$CUDA_HOME` or `$CUDA_PATH`, that of the usual folder, or the one in the path.
fn nvcc() -> PathBuf {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let found = env::var_os("NVCC")
        .map(PathBuf::from)
        .into_iter()
        .chain(homes.chain([PathBuf::from("/usr/local/cuda")]).map(|home| home.join("bin/nvcc")))
        .find(|path| path.is_file());
    let nvcc = found.unwrap_or_else(|| PathBuf::from("nvcc"));
    if let Err(e) = Command::new(&nvcc).arg("--version").output() {
        panic!(
            "cannot run {}: {e}\nThe feature `cuda` needs nvcc 13.0 to compile kernels. With a CUDA toolkit, set \
             CUDA_HOME; without one, `eval \"$(scripts/cuda-toolchain.sh)\"` makes one from wheels.",
            nvcc.display()
        );
    }
    nvcc
}
