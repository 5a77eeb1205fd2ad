//! `peregrine deploy`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use peregrine_api::client::Submit;
use peregrine_api::types::{Applied, DeployRequest, ServiceSpec};
use peregrine_config::{Manifest, ServiceEntry};
use serde::{Serialize, Serializer};

use super::config;
use crate::cli::failure::{Failure, Result};
use crate::cli::rollout_options::{Follow, Overrides, PlanOptions, WaitOptions, conclude_plans};
use crate::cli::session::Session;
use crate::cli::watch::{self, Outcome};

/// The manifest, where none is named.
const MANIFEST: &str = "peregrine.toml";

/// Run services of a manifest, or bring new versions of them, without losing a request
///
/// Each service is brought to its machine with new copies, which are started, warmed and given the traffic in steps. A
/// service that is as the manifest says is left alone. With --image and no -f, a running service gets another image and
/// stays as it is otherwise.
#[derive(Args, Debug)]
pub(crate) struct Deploy {
    /// Services of the manifest [default: all of them]
    #[arg(value_name = "SERVICE")]
    services: Vec<String>,

    /// Manifest [default: peregrine.toml in this folder]
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,

    /// Image instead of the one that the service has; needs exactly one SERVICE
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,

    /// Machine for the first deploy; later ones stay where they are unless it is given
    #[arg(long, value_name = "MACHINE")]
    machine: Option<String>,

    #[command(flatten)]
    plan: PlanOptions,

    #[command(flatten)]
    wait: WaitOptions,

    #[command(flatten)]
    overrides: Overrides,

    /// Why; kept with the move
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

/// What came of one service.
#[derive(Debug)]
struct Deployed {
    service: String,
    /// `None`: only settings changed, or nothing.
    outcome: Option<Outcome>,
}

impl Serialize for Deployed {
    /// As the outcome of any other command, with the service in front; without a move, `"move": null` says so.
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Moved<'a> {
            service: &'a str,
            #[serde(flatten)]
            outcome: &'a Outcome,
        }
        #[derive(Serialize)]
        struct Unmoved<'a> {
            service: &'a str,
            #[serde(rename = "move")]
            of: Option<()>,
        }
        match &self.outcome {
            Some(outcome) => Moved { service: &self.service, outcome }.serialize(serializer),
            None => Unmoved { service: &self.service, of: None }.serialize(serializer),
        }
    }
}

impl Deploy {
    /// Plans them, or starts them one after the other and watches each.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let requests = self.requests()?;
        if self.plan.plan_hash.is_some() && requests.len() != 1 {
            return Err(Failure::usage("a plan hash belongs to one service").hint("name one SERVICE"));
        }
        if self.plan.plan {
            let mut planned = Vec::new();
            for (service, request) in &requests {
                let call = session.patient.plan_deploy(service, request);
                planned.push(session.ask_patiently("planning the deploy", call).await?.plan);
            }
            return conclude_plans(&session.out, &planned);
        }
        let follow = self.wait.follow(&session.out);
        let mut done = Vec::new();
        for (service, request) in &requests {
            let submit = Submit::with_fresh_key();
            let call = session.patient.deploy(service, request, &submit);
            let applied = session
                .ask_patiently("starting the deploy", call)
                .await
                .map_err(|failure| after(failure, &done))?;
            let deployed =
                finish(session, service, applied, follow).await.map_err(|failure| after(failure, &done))?;
            let left =
                follow != Follow::Detach && deployed.outcome.as_ref().is_some_and(|outcome| outcome.detached);
            done.push(deployed);
            if left {
                break; // Ctrl-C: what has not been started is not started behind the operator's back
            }
        }
        self.conclude(session, &done, requests.len())
    }

    fn conclude(&self, session: &Session, done: &[Deployed], wanted: usize) -> Result {
        let out = &session.out;
        if out.json {
            out.data(&done, String::new)?;
        }
        if done.len() < wanted {
            out.note(&format!(
                "  {} of {wanted} services were started; the others were left alone",
                done.len()
            ));
        }
        Ok(())
    }

    /// What to ask for, by service, in the order of the manifest.
    fn requests(&self) -> Result<Vec<(String, DeployRequest)>> {
        if self.image.is_some() && self.services.len() != 1 {
            return Err(Failure::usage("--image needs exactly one SERVICE")
                .hint("peregrine deploy shop --image registry.example/shop:2"));
        }
        if let (Some(_), None, [service]) = (&self.image, &self.file, self.services.as_slice()) {
            return Ok(vec![(service.clone(), self.request(None))]);
        }
        let chosen = choose(self.manifest()?, &self.services)?;
        Ok(chosen.into_iter().map(|entry| (entry.spec.name.clone(), self.request(Some(&entry)))).collect())
    }

    fn manifest(&self) -> Result<Vec<ServiceEntry>> {
        let path = self.file.as_deref().unwrap_or_else(|| Path::new(MANIFEST));
        if self.file.is_none() && !path.exists() {
            return Err(Failure::usage(format!("there is no {MANIFEST} in this folder"))
                .hint("name the manifest with -f FILE, or a running service with SERVICE --image IMAGE"));
        }
        Manifest::load(path)
            .map(|manifest| manifest.services)
            .map_err(|mistakes| config::wrong(path, &mistakes))
    }

    fn request(&self, entry: Option<&ServiceEntry>) -> DeployRequest {
        DeployRequest {
            // The values of environments go along: this is the one way on which they must.
            service: entry.map(|entry| ServiceSpec::with_values(&entry.spec)),
            image: self.image.clone(),
            machine: self.machine.clone().or_else(|| entry.and_then(|entry| entry.machine.clone())),
            settings: self.overrides.to_wire(),
            reason: self.reason.clone(),
            plan_hash: self.plan.plan_hash.clone(),
        }
    }
}

/// The services that are named, in the order of the manifest; all of them if none is.
fn choose(entries: Vec<ServiceEntry>, names: &[String]) -> Result<Vec<ServiceEntry>> {
    let known: Vec<_> = entries.iter().map(|entry| entry.spec.name.clone()).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        return Err(Failure::usage(format!("the manifest has no service {unknown}"))
            .hint(format!("it has {}", known.join(", "))));
    }
    Ok(entries.into_iter().filter(|entry| names.is_empty() || names.contains(&entry.spec.name)).collect())
}

/// Follows one service to its end. People see its receipt at once; as JSON all of them are one document.
async fn finish(session: &Session, service: &str, applied: Applied, follow: Follow) -> Result<Deployed> {
    let out = &session.out;
    let Some(started) = applied.rollout else {
        if !out.json {
            out.data(&(), || format!("{service}: nothing has to be moved"))?;
        }
        return Ok(Deployed { service: service.to_owned(), outcome: None });
    };
    let outcome = watch::follow(session, started, follow).await?;
    if out.json {
        if let Some(failure) = outcome.failure() {
            return Err(failure);
        }
    } else {
        watch::conclude(session, &outcome)?;
    }
    Ok(Deployed { service: service.to_owned(), outcome: Some(outcome) })
}

/// A failure after some services have been brought: says which.
fn after(failure: Failure, done: &[Deployed]) -> Failure {
    if done.is_empty() {
        return failure;
    }
    let names: Vec<_> = done.iter().map(|deployed| deployed.service.as_str()).collect();
    failure.why(format!("done before it: {}", names.join(", "))).detail("done", done)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use peregrine_config::Source;

    use super::*;
    use crate::cli::args::{Cli, Command};

    fn deploy(arguments: &[&str]) -> Deploy {
        match Cli::try_parse_from([&["peregrine", "deploy"], arguments].concat()).expect("arguments").command
        {
            Command::Deploy(deploy) => deploy,
            other => panic!("{other:?}"),
        }
    }

    fn entries() -> Vec<ServiceEntry> {
        let text = "[service.web]\nimage = \"a:1\"\nport = 80\n[service.blog]\nimage = \"b:1\"\nport = 80\nenv = { KEY = \"v\" }\n";
        Manifest::parse(&Source::new("x", "/", text)).expect("a manifest").services
    }

    #[test]
    fn a_service_that_the_manifest_has_not_is_told_with_those_that_it_has() {
        let failure = choose(entries(), &["wbe".into()]).expect_err("unknown");
        assert!(failure.message.contains("wbe") && failure.hint.expect("a hint").contains("web"));
    }

    #[test]
    fn only_the_services_that_are_named_are_deployed() {
        let names: Vec<_> =
            choose(entries(), &["blog".into()]).expect("known").into_iter().map(|e| e.spec.name).collect();
        assert_eq!(names, ["blog"]);
        assert_eq!(choose(entries(), &[]).expect("all").len(), 2);
    }

    #[test]
    fn an_image_alone_leaves_the_service_as_it_is() {
        let requests = deploy(&["web", "--image", "a:2"]).requests().expect("a request");
        let [(service, request)] = requests.as_slice() else { panic!("{requests:?}") };
        assert_eq!((service.as_str(), request.image.as_deref()), ("web", Some("a:2")));
        assert!(request.service.is_none());
        assert_eq!(deploy(&["--image", "a:2"]).requests().expect_err("no service").exit.code(), 2);
    }

    #[test]
    fn the_values_of_an_environment_go_to_the_server() {
        let blog = choose(entries(), &["blog".into()]).expect("known");
        let request = deploy(&["--machine", "host-a"]).request(blog.first());
        let json = serde_json::to_value(&request).expect("json");
        assert_eq!(json["service"]["workload"]["env"]["KEY"], "v");
        assert_eq!(json["machine"], "host-a");
    }

    #[test]
    fn a_service_that_had_not_to_be_moved_says_so() {
        let deployed = Deployed { service: "web".into(), outcome: None };
        assert_eq!(
            serde_json::to_value(&deployed).expect("json"),
            serde_json::json!({"service": "web", "move": null})
        );
    }

    #[test]
    fn a_manifest_that_is_not_there_says_which_file_was_looked_for() {
        let failure = deploy(&["-f", "/nowhere/shop.toml"]).requests().expect_err("no file");
        assert_eq!(failure.exit.code(), 2);
        assert!(failure.message.contains("/nowhere/shop.toml"), "{failure:?}");
    }
}
