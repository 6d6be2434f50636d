//! The smoke test: five things that must hold of a server.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::endpoint::{Endpoint, EndpointError, Generated};

/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What the server should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Adapters.
    pub total_loras: u32,
    /// Adapters in device memory.
    pub gpu_loras: u32,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What it is called.
    pub name: &'static str,
    /// What was seen, a line each.
    pub seen: Vec<String>,
    /// What is wrong; none if it holds.
    pub wrong: Option<String>,
}

impl Check {
    /// Whether it holds.
    pub fn holds(&self) -> bool {
        self.wrong.is_none()
    }

    /// As people see it; `quiet` leaves out what was seen.
    pub fn show(&self, quiet: bool) -> String {
        let mut text = format!("\n[{}]", self.name);
        match &self.wrong {
            None => text += " ✓",
            Some(wrong) => text += &format!(" ✗ {wrong}"),
        }
        if !quiet {
            self.seen.iter().for_each(|line| text += &format!("\n    {line}"));
        }
        text
    }
}

/// Looks at everything in turn, tells `say` about each, and stops early only if nobody answers.
pub async fn smoke_test(
    server: &Endpoint,
    budget: Budget,
    wait: Duration,
    say: impl Fn(&Check),
) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut done = |check: Check| {
        say(&check);
        checks.push(check);
    };
    let health = health(server, budget, wait).await;
    let answers = !health.1;
    done(health.0);
    if answers {
        done(reset(server).await);
        done(resident(server).await);
        done(not_resident(server, budget).await);
        done(several(server, budget).await);
        done(counters(server, budget).await);
    }
    checks
}

/// The check, and whether nobody answered at all.
async fn health(server: &Endpoint, budget: Budget, wait: Duration) -> (Check, bool) {
    let until = Instant::now() + wait;
    let health = loop {
        match server.health().await {
            Ok(health) => break health,
            Err(e) if Instant::now() >= until => {
                let wrong = Some(format!("{e} (waited {} s)", wait.as_secs()));
                return (Check { name: "Health", seen: Vec::new(), wrong }, true);
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(500).min(wait)).await,
        }
    };
    let seen = vec![json!(health.config).to_string()];
    let differs = |name: &str, served: Option<u32>, meant: u32| match served {
        Some(served) if served == meant => None,
        Some(served) => Some(format!("{name} is {served} and should be {meant}")),
        None => Some(format!("{name} is not told")),
    };
    let wrong = (health.status != "ok")
        .then(|| format!("the status is '{}'", health.status))
        .or_else(|| differs("total_loras", health.config.total_loras, budget.total_loras))
        .or_else(|| differs("gpu_loras", health.config.gpu_loras, budget.gpu_loras));
    (Check { name: "Health", seen, wrong }, false)
}

async fn reset(server: &Endpoint) -> Check {
    let name = "Reset of the swap statistics";
    let result = async {
        server.reset_swap_stats().await.map_err(|e| e.to_string())?;
        let runtime = server.swap_stats().await.map_err(|e| e.to_string())?.runtime;
        if runtime.swap_count == 0 && runtime.swap_calls == 0 {
            Ok(Vec::new())
        } else {
            Err(format!("runtime counters are {} and {} after it", runtime.swap_calls, runtime.swap_count))
        }
    };
    check(name, result.await)
}

async fn resident(server: &Endpoint) -> Check {
    let result = ask(server, "Hello, how are you?", 0, 8).await;
    check("Request to a resident adapter", result.map(|g| vec![told(0, &g)]))
}

/// One that is not resident must be copied in. After other traffic any adapter may be resident, so
/// further ones are asked for until one was copied: of `gpu_loras + 1` different ones, one must be.
async fn not_resident(server: &Endpoint, budget: Budget) -> Check {
    let name = "Request to an adapter that is not resident";
    if budget.gpu_loras >= budget.total_loras {
        return check(name, Ok(vec!["skipped: all adapters are in device memory".to_owned()]));
    }
    let result = async {
        let count = async || Ok::<_, String>(swaps(server).await?.runtime.swap_count);
        let before = count().await?;
        let mut seen = Vec::new();
        for adapter in (budget.total_loras - budget.gpu_loras - 1..budget.total_loras).rev() {
            let generated = ask(server, "The capital of France is", adapter, 8).await?;
            seen.push(told(adapter, &generated));
            let after = count().await?;
            if after > before {
                seen.push(format!("swap_count rose from {before} to {after}"));
                return Ok(seen);
            }
        }
        Err(format!("swap_count stayed at {before} over {} different adapters", budget.gpu_loras + 1))
    };
    check(name, result.await)
}

async fn several(server: &Endpoint, budget: Budget) -> Check {
    let mut adapters = vec![0, budget.gpu_loras - 1, budget.gpu_loras, budget.total_loras / 2];
    adapters.retain(|a| *a < budget.total_loras);
    adapters.sort_unstable();
    adapters.dedup();
    let result = async {
        let mut seen = Vec::new();
        for adapter in adapters {
            let prompt = format!("Test prompt for adapter {adapter}");
            let generated =
                ask(server, &prompt, adapter, 4).await.map_err(|e| format!("adapter {adapter}: {e}"))?;
            seen.push(told(adapter, &generated));
        }
        Ok(seen)
    };
    check("Requests to several adapters", result.await)
}

async fn counters(server: &Endpoint, budget: Budget) -> Check {
    let result = async {
        let stats = swaps(server).await?;
        let seen = vec![format!("init {}, runtime {}", json!(stats.init), json!(stats.runtime))];
        let all = budget.gpu_loras == budget.total_loras;
        if stats.init.swap_calls != 1 || stats.init.swap_count != u64::from(budget.gpu_loras) {
            return Err(format!(
                "init is {}: preloading is one call of {} adapters",
                json!(stats.init),
                budget.gpu_loras
            ));
        }
        if all && stats.runtime.swap_count != 0 {
            return Err(format!("{} swaps with every adapter resident", stats.runtime.swap_count));
        }
        if stats.runtime.swap_calls > stats.runtime.swap_count {
            return Err(format!("more calls than adapters: {}", json!(stats.runtime)));
        }
        Ok(seen)
    };
    check("Swap statistics", result.await)
}

fn check(name: &'static str, result: Result<Vec<String>, String>) -> Check {
    match result {
        Ok(seen) => Check { name, seen, wrong: None },
        Err(wrong) => Check { name, seen: Vec::new(), wrong: Some(wrong) },
    }
}

async fn swaps(server: &Endpoint) -> Result<super::SwapStats, String> {
    server.swap_stats().await.map_err(|e: EndpointError| e.to_string())
}

/// One answer, with its shape looked at.
async fn ask(server: &Endpoint, prompt: &str, adapter: u32, max_tokens: u32) -> Result<Generated, String> {
    let body = json!({"prompt": prompt, "model_id": adapter, "max_tokens": max_tokens, "temperature": 0.0});
    let generated = server.generate(&body, ANSWER_TIMEOUT).await.map_err(|e| e.to_string())?;
    let text = generated.text.first().ok_or("the answer has no text")?;
    if !text.starts_with(prompt) {
        return Err(format!("the text does not begin with the prompt: {text:?}"));
    }
    if generated.model_id != Some(i64::from(adapter)) {
        return Err(format!("the answer is of model_id {:?}, not {adapter}", generated.model_id));
    }
    let (Some(ttft), Some(completion)) = (generated.ttft, generated.completion_time) else {
        return Err("the answer has no ttft or no completion_time".to_owned());
    };
    if !(ttft > 0.0 && ttft <= completion) {
        return Err(format!("ttft is {ttft} s and completion_time {completion} s"));
    }
    Ok(generated)
}

fn told(adapter: u32, generated: &Generated) -> String {
    let text: String = generated.text.first().map(|t| t.chars().take(60).collect()).unwrap_or_default();
    format!(
        "adapter {adapter}: TTFT {:.4} s, all {:.4} s, {text:?}",
        generated.ttft.unwrap_or_default(),
        generated.completion_time.unwrap_or_default()
    )
}
