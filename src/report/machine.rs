//! What machine this is, for manifests and profiles.

use std::fs;

use serde::{Deserialize, Serialize};

/// A machine; what cannot be found out is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's model name.
    pub cpu: Option<String>,
    /// Hardware threads that this process may use.
    pub cores: usize,
    /// Main memory, bytes.
    pub memory_bytes: Option<u64>,
    /// Instruction set, as Rust names it.
    pub arch: String,
    /// Operating system and release.
    pub os: String,
    /// Kernel release.
    pub kernel: Option<String>,
    /// The accelerator, where one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

/// A GPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its model name.
    pub name: String,
    /// Which card it is.
    pub uuid: Option<String>,
    /// Driver version.
    pub driver: Option<String>,
    /// CUDA version of the driver.
    pub cuda: Option<String>,
    /// Device memory, bytes.
    pub memory_bytes: Option<u64>,
}

impl Machine {
    /// In a few words, for captions: processor or GPU, and cores.
    pub fn describe(&self) -> String {
        match (&self.gpu, &self.cpu) {
            (Some(gpu), _) => gpu.name.clone(),
            (None, Some(cpu)) => format!("{cpu}, {} cores", self.cores),
            (None, None) => format!("{}, {} cores", self.arch, self.cores),
        }
    }
}

/// This machine, without its accelerator: what uses one adds it.
pub fn machine() -> Machine {
    let read = |path| fs::read_to_string(path).ok();
    Machine {
        cpu: read("/proc/cpuinfo").as_deref().and_then(cpu_model),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: read("/proc/meminfo").as_deref().and_then(memory_bytes),
        arch: std::env::consts::ARCH.to_owned(),
        os: read("/etc/os-release")
            .as_deref()
            .and_then(os_name)
            .unwrap_or_else(|| std::env::consts::OS.to_owned()),
        kernel: read("/proc/sys/kernel/osrelease").map(|s| s.trim().to_owned()),
        gpu: None,
    }
}

/// `model name` on x86; ARM kernels name the processor elsewhere or not at all.
fn cpu_model(cpuinfo: &str) -> Option<String> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| matches!(key.trim(), "model name" | "Model"))
        .map(|(_, name)| name.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn memory_bytes(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn os_name(os_release: &str) -> Option<String> {
    let name = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_tells() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some  CPU @ 2.00GHz\nprocessor\t: 1\n";
        assert_eq!(cpu_model(cpuinfo).as_deref(), Some("Some CPU @ 2.00GHz"));
        assert_eq!(cpu_model("processor\t: 0\n"), None);
        assert_eq!(memory_bytes("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        assert_eq!(os_name("NAME=x\nPRETTY_NAME=\"Some OS 1\"\n").as_deref(), Some("Some OS 1"));
    }

    #[test]
    fn this_machine_has_cores_and_a_name() {
        let machine = machine();
        assert!(machine.cores >= 1 && !machine.os.is_empty());
        assert!(machine.describe().ends_with("cores"));
    }
}
