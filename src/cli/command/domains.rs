//! `peregrine domains`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use peregrine_api::types::{ClientAuthRequest, Domain, DomainCheck, DomainRequest, Hsts};
use serde_json::json;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::parse;
use crate::cli::prompt;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// Add, check, list and remove names that are served over TLS
#[derive(Args, Debug)]
pub(crate) struct Domains {
    #[command(subcommand)]
    action: DomainsAction,
}

/// What to do with domains.
#[derive(Debug, Subcommand)]
enum DomainsAction {
    Add(Add),
    /// Look at a name from outside: where it leads, who may issue; exit code 9 if something is in the way
    ///
    /// Also for a name that was not added.
    Check {
        /// Name, such as shop.example.com
        domain: String,
    },
    /// List domains: state, certificate, what is waited for
    List,
    /// Serve a name no longer, and forget its certificate; asked about first (or needs --yes)
    Remove {
        /// Domain
        domain: String,
    },
}

/// Serve a name over TLS: its certificate is ordered as soon as the name leads here, and renewed for ever
///
/// A name that is there already is served as this says.
#[derive(Args, Debug)]
struct Add {
    /// Name, such as shop.example.com, or *.example.com for all names one label below
    domain: String,

    /// Answer requests on clear text too, instead of sending them to https
    #[arg(long)]
    no_redirect: bool,

    /// Have browsers speak TLS only for so long (Strict-Transport-Security), such as 365d
    #[arg(long, value_name = "DURATION", value_parser = parse::duration_ms)]
    hsts: Option<u64>,

    /// So with every name below
    #[arg(long, requires = "hsts")]
    hsts_subdomains: bool,

    /// The name may go into browsers' lists
    #[arg(long, requires = "hsts")]
    hsts_preload: bool,

    /// Clients have to present a certificate that one of the authorities in this file has signed (PEM, of this machine)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    client_ca: Option<PathBuf>,

    /// Ask for that only: clients without one are let in, too
    #[arg(long, requires = "client_ca")]
    client_optional: bool,
}

impl Domains {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let out = &session.out;
        match self.action {
            DomainsAction::Add(add) => {
                let request = add.request()?;
                let domain = session.ask("adding the domain", session.client.add_domain(&request)).await?;
                out.data(&domain, || format!("{}: {}", clean(&domain.name), clean(&domain.message)))?;
                out.note(&format!("  see how it stands: peregrine domains check {}", domain.name));
                Ok(())
            }
            DomainsAction::Check { domain } => {
                let check = session.ask("looking at the name", session.client.check_domain(&domain)).await?;
                out.data(&check, || checked(&check))?;
                if check.ok {
                    return Ok(());
                }
                let why = check.dns.clone().or_else(|| check.caa.iter().find_map(|caa| caa.problem.clone()));
                Err(Failure::new(Exit::Failed, "domain.not_ready", why.unwrap_or_default()))
            }
            DomainsAction::List => {
                let domains = session.ask("reading the domains", session.client.domains()).await?;
                out.data(&domains, || list(&domains, out))
            }
            DomainsAction::Remove { domain } => {
                prompt::confirm(&format!("Serve {domain} no longer?"), session.yes)?;
                session.ask("removing the domain", session.client.remove_domain(&domain)).await?;
                out.data(&json!({ "domain": domain, "removed": true }), || {
                    format!("{} removed", clean(&domain))
                })
            }
        }
    }
}

impl Add {
    fn request(self) -> Result<DomainRequest> {
        let hsts = self.hsts.map(|ms| Hsts {
            max_age_seconds: u32::try_from(ms / 1_000).unwrap_or(u32::MAX),
            include_subdomains: self.hsts_subdomains,
            preload: self.hsts_preload,
        });
        let required = !self.client_optional;
        let read = |file: PathBuf| {
            let authorities = super::certs::read(&file)?;
            Ok(ClientAuthRequest { authorities, required })
        };
        let client_auth = self.client_ca.map(read).transpose()?;
        Ok(DomainRequest { name: self.domain, redirect: !self.no_redirect, hsts, client_auth })
    }
}

fn list(domains: &[Domain], out: &Output) -> String {
    let mut table = Table::new(&["domain", "state", "until", "redirect", "what"]);
    for domain in domains {
        table.row(vec![
            domain.name.clone(),
            render::word(domain.state),
            domain.not_after.map_or_else(|| "-".to_owned(), human::moment),
            if domain.redirect { "yes" } else { "no" }.to_owned(),
            domain.message.clone(),
        ]);
    }
    table.render(out)
}

fn checked(check: &DomainCheck) -> String {
    let mut lines = vec![match &check.dns {
        None => "DNS: it leads here".to_owned(),
        Some(why) => format!("DNS: {}", clean(why)),
    }];
    for caa in &check.caa {
        lines.push(match &caa.problem {
            None => format!("CAA: {} may issue", clean(&caa.authority)),
            Some(why) => format!("CAA: {} may not issue: {}", clean(&caa.authority), clean(why)),
        });
    }
    lines.push(match &check.domain {
        Some(domain) => format!("{}: {}", clean(&domain.name), clean(&domain.message)),
        None => format!("not added: peregrine domains add {}", clean(&check.name)),
    });
    lines.join("\n")
}
