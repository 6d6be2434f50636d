//! The server that a load command is about: what it says of itself, and how it is spoken to.

use super::client::{Api, ClientSettings};
use super::failure::Failure;
use crate::loadgen::endpoint::HealthConfig;
use crate::loadgen::openai::{AdapterNames, Completions, ModelList};
use crate::loadgen::{Dialect, Endpoint, EndpointError, Health};

/// A server that has been looked at.
pub struct Target {
    /// Where it is.
    pub server: Endpoint,
    /// What it says about itself; none if it was not to be asked.
    pub health: Option<Health>,
    /// How requests are made for it.
    pub dialect: Dialect,
    /// Prompt and output tokens of one request, at most, where it says.
    pub max_model_len: Option<u32>,
}

impl Target {
    /// Finds the server and makes sure that it is the one that was meant, with `total_loras` adapters.
    pub async fn find(
        client: &ClientSettings,
        total_loras: u32,
        gpu_loras: Option<u32>,
    ) -> Result<Self, Failure> {
        let server = client.server()?;
        let meant = Meant { total_loras, gpu_loras };
        match client.api {
            Api::Generate => {
                let health = generate(client, &server, meant).await?;
                Ok(Self { server, health, dialect: Dialect::Generate, max_model_len: None })
            }
            Api::Openai => openai(client, server, meant).await,
        }
    }
}

/// What the server should have.
#[derive(Clone, Copy)]
struct Meant {
    total_loras: u32,
    gpu_loras: Option<u32>,
}

impl Meant {
    fn check(self, server: &Endpoint, config: &HealthConfig) -> Result<(), Failure> {
        let meant = [
            ("total_loras", config.total_loras, Some(self.total_loras)),
            ("gpu_loras", config.gpu_loras, self.gpu_loras),
        ];
        for (name, served, meant) in meant {
            if let (Some(served), Some(meant)) = (served, meant)
                && served != meant
            {
                return Err(Failure::failed(format!(
                    "the server at {} has {name} {served} and {meant} was given: give {served}, restart it, or \
                     --skip-health-check",
                    server.url()
                )));
            }
        }
        Ok(())
    }
}

async fn generate(
    client: &ClientSettings,
    server: &Endpoint,
    meant: Meant,
) -> Result<Option<Health>, Failure> {
    if client.skip_health_check {
        return Ok(None);
    }
    let health = server.health().await.map_err(|e| Failure::Failed(hint(e)))?;
    if health.status != "ok" {
        return Err(Failure::failed(format!(
            "the server at {} says that it is '{}': wait until it is 'ok', or --skip-health-check",
            server.url(),
            health.status
        )));
    }
    meant.check(server, &health.config)?;
    Ok(Some(health))
}

async fn openai(client: &ClientSettings, server: Endpoint, meant: Meant) -> Result<Target, Failure> {
    let given = client.adapter_names.as_deref().map(|text| AdapterNames::parse(text, meant.total_loras));
    let given = given.transpose().map_err(|e| Failure::Usage(e.into()))?;
    let mut extra = client.extra()?;
    if client.skip_health_check {
        let dialect =
            Dialect::Completions(Completions { base: None, names: given.unwrap_or_default(), extra });
        return Ok(Target { server, health: None, dialect, max_model_len: None });
    }
    let models = server.models().await.map_err(|e| Failure::Failed(hint(e)))?;
    let names = adapters(&models, given, meant.total_loras).map_err(|e| {
        Failure::failed(format!("{}: {e} (--skip-health-check goes on without asking)", server.url()))
    })?;
    // Servers of this experiment say more; of others the list of models is all that there is.
    let health = match server.health().await {
        Ok(health) => {
            meant.check(&server, &health.config)?;
            // One that has slots tells where a TTFT went, too, if it is asked.
            if health.config.gpu_loras.is_some() {
                extra.entry("metrics").or_insert(true.into());
            }
            health
        }
        Err(_) => Health { status: "ok".to_owned(), config: HealthConfig::default() },
    };
    let base = models.base().map(|m| m.id.clone());
    let config = HealthConfig { model: health.config.model.or_else(|| base.clone()), ..health.config };
    let max_model_len = models.base().and_then(|m| m.max_model_len);
    let dialect = Dialect::Completions(Completions { base, names, extra });
    Ok(Target { server, health: Some(Health { config, ..health }), dialect, max_model_len })
}

/// What the adapters are called: as was given, else as `serve` calls them if it lists those, else as it
/// lists them.
fn adapters(models: &ModelList, given: Option<AdapterNames>, total: u32) -> Result<AdapterNames, String> {
    let was_given = given.is_some();
    let names = given.unwrap_or_default();
    let missing = |names: &AdapterNames| {
        let all = (0..total).filter_map(|a| names.name(a).map(|n| n.into_owned()));
        all.filter(|name| !models.has(name)).collect::<Vec<_>>()
    };
    let lacking = missing(&names);
    if lacking.is_empty() {
        return Ok(names);
    }
    let listed = models.adapters();
    if !was_given && listed.len() >= total as usize && lacking.len() == total as usize {
        return Ok(AdapterNames::List(listed.into_iter().map(str::to_owned).collect()));
    }
    let shown = |names: &[&str]| match names {
        [] => "none".to_owned(),
        [first @ .., last] if names.len() > 6 => format!("{} … {last}", first[..4].join(", ")),
        names => names.join(", "),
    };
    let lacking: Vec<&str> = lacking.iter().map(String::as_str).collect();
    Err(format!(
        "/v1/models does not list {} of the {total} adapters ({}); the adapters that it lists: {}: lower --total-loras, \
         load them, or give their --adapter-names",
        lacking.len(),
        shown(&lacking),
        shown(&listed),
    ))
}

fn hint(error: EndpointError) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    error.context("the server is not healthy (--skip-health-check goes on without asking)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loadgen::openai::Model;

    fn list(adapters: &[&str]) -> ModelList {
        let model = |id: &str, parent: Option<&str>| Model {
            id: id.to_owned(),
            parent: parent.map(str::to_owned),
            max_model_len: None,
        };
        let adapters = adapters.iter().map(|id| model(id, Some("base")));
        ModelList { data: std::iter::once(model("base", None)).chain(adapters).collect() }
    }

    #[test]
    fn adapters_are_those_given_then_the_default_then_those_listed() {
        let names = |models: &ModelList, given: Option<&str>, total| {
            let given = given.map(|t| AdapterNames::parse(t, total).unwrap());
            adapters(models, given, total).map(|n| n.name(total - 1).unwrap().into_owned())
        };
        assert_eq!(names(&list(&["lora-0", "lora-1"]), None, 2).unwrap(), "lora-1");
        assert_eq!(names(&list(&["sql", "chat"]), None, 2).unwrap(), "chat");
        assert_eq!(names(&list(&["sql", "chat"]), Some("chat,sql"), 2).unwrap(), "sql");
        let error = names(&list(&["sql", "chat"]), None, 3).unwrap_err();
        assert!(error.contains("3 of the 3 adapters") && error.contains("sql, chat"), "{error}");
        // Half of them there: more likely too few than others.
        let error = names(&list(&["lora-0", "lora-1", "x", "y"]), None, 4).unwrap_err();
        assert!(error.contains("lora-2, lora-3"), "{error}");
        assert!(names(&list(&["sql", "chat"]), Some("nlp-{}"), 2).is_err());
    }
}
