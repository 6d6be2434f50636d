//! `lora-hbm smoke-test`: does a server answer, swap and count as it should?

use clap::Args;
use serde::{Deserialize, Serialize};

use super::client;
use super::failure::Failure;
use super::settings::{Context, OutputFormat};
use crate::loadgen::Endpoint;
use crate::loadgen::smoke::{self, Budget, Check};

#[derive(Args, Debug, Serialize)]
pub struct SmokeTestArgs {
    /// Server host [default: 127.0.0.1]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// Server port [default: 8000]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// Adapters that the server should have
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    total_loras: Option<u32>,
    /// Adapters that it should keep in device memory
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_loras: Option<u32>,
    /// Seconds to wait for the server to come up [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    wait_seconds: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Settings {
    host: String,
    port: u16,
    total_loras: Option<u32>,
    gpu_loras: Option<u32>,
    wait_seconds: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            total_loras: None,
            gpu_loras: None,
            wait_seconds: 30,
        }
    }
}

pub fn run(args: &SmokeTestArgs, ctx: &Context) -> Result<(), Failure> {
    let settings: Settings = ctx.resolve("smoke-test", args)?;
    let (total_loras, gpu_loras) = client::budget(settings.total_loras, settings.gpu_loras)?;
    let host =
        if settings.host.contains(':') { format!("[{}]", settings.host) } else { settings.host.clone() };
    let key = std::env::var("LORA_HBM_API_KEY").ok().filter(|k| !k.is_empty());
    let server = Endpoint::new(&format!("http://{host}:{}", settings.port), key)
        .map_err(|e| Failure::Usage(e.into()))?;

    let text = ctx.format == OutputFormat::Table;
    let line = "=".repeat(60);
    if text {
        println!("Testing server at {}", server.url());
        println!("\n{line}\nSmoke Test: total_loras={total_loras}, gpu_loras={gpu_loras}\n{line}");
    }
    let say = |check: &Check| {
        if text {
            println!("{}", check.show(ctx.quiet));
        }
    };
    let budget = Budget { total_loras, gpu_loras };
    let wait = std::time::Duration::from_secs(settings.wait_seconds);
    let checks = client::runtime()?.block_on(smoke::smoke_test(&server, budget, wait, say));
    let failed: Vec<&str> = checks.iter().filter(|c| !c.holds()).map(|c| c.name).collect();
    if text {
        let verdict =
            if failed.is_empty() { "✓ All smoke tests PASSED" } else { "✗ Some smoke tests FAILED" };
        println!("\n{line}\n{verdict}\n{line}\n");
    } else {
        println!("{}", serde_json::json!({"passed": failed.is_empty(), "checks": checks}));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure::failed(format!("failed: {}", failed.join(", ")))) }
}
