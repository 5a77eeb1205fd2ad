//! `peregrine certs`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use peregrine_api::types::{Certificate, CertificateImport};
use serde_json::json;

use crate::cli::exit::Exit;
use crate::cli::failure::{Failure, Result};
use crate::cli::human;
use crate::cli::output::Output;
use crate::cli::render;
use crate::cli::session::Session;
use crate::cli::table::{Table, clean};

/// List, show, renew, import and export certificates
#[derive(Args, Debug)]
pub(crate) struct Certs {
    #[command(subcommand)]
    action: CertsAction,
}

/// What to do with certificates.
#[derive(Debug, Subcommand)]
enum CertsAction {
    /// List certificates: names, issuer, end
    List,
    /// Show the certificate of a domain
    Show {
        /// Domain, or the beginning of a certificate's id
        certificate: String,
    },
    /// Order a new certificate for a domain now, instead of when it is due
    Renew {
        /// Domain
        domain: String,
    },
    /// Serve a domain with a certificate of your own; it is not renewed by itself
    ///
    /// The files are those of this machine.
    Import {
        /// Domain
        domain: String,
        /// The chain in PEM, its own certificate first
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        chain: PathBuf,
        /// Its private key in PEM, without a password
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: PathBuf,
    },
    /// Write the certificate of a domain and its private key into files
    Export {
        /// Domain
        domain: String,
        /// File for the chain
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        chain: PathBuf,
        /// File for the private key; nobody else can read it
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: PathBuf,
    },
}

impl Certs {
    /// Does it.
    pub(crate) async fn run(self, session: &Session) -> Result {
        let out = &session.out;
        match self.action {
            CertsAction::List => {
                let certificates =
                    session.ask("reading the certificates", session.client.certificates()).await?;
                out.data(&certificates, || list(&certificates, out))
            }
            CertsAction::Show { certificate } => {
                let all = session.ask("reading the certificates", session.client.certificates()).await?;
                let is_it = |one: &&Certificate| {
                    one.domains.contains(&certificate) || one.id.starts_with(&certificate)
                };
                let mut found = all.iter().filter(is_it);
                let (Some(one), None) = (found.next(), found.next()) else {
                    let why = format!(
                        "{certificate} is not the domain, or the beginning of the id, of one certificate"
                    );
                    return Err(Failure::new(Exit::NotFound, "certificate.unknown", why)
                        .hint("`peregrine certs list` shows the certificates"));
                };
                out.data(one, || show(one))
            }
            CertsAction::Renew { domain } => {
                let domain =
                    session.ask("ordering a certificate", session.client.renew_certificate(&domain)).await?;
                out.data(&domain, || format!("{}: {}", clean(&domain.name), clean(&domain.message)))
            }
            CertsAction::Import { domain, chain, key } => {
                let import = CertificateImport { domain, chain: read(&chain)?, key: read(&key)? };
                let domain = session
                    .ask("importing the certificate", session.client.import_certificate(&import))
                    .await?;
                out.data(&domain, || format!("{}: {}", clean(&domain.name), clean(&domain.message)))
            }
            CertsAction::Export { domain, chain, key } => {
                let export = session
                    .ask("reading the certificate", session.client.export_certificate(&domain))
                    .await?;
                write(&key, &export.key, 0o600)?;
                write(&chain, &export.chain, 0o644)?;
                out.data(&json!({ "domain": export.domain, "chain": chain, "key": key }), || {
                    format!("{}: {} and {} written", clean(&export.domain), chain.display(), key.display())
                })
            }
        }
    }
}

pub(super) fn read(file: &std::path::Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(|error| {
        let why = format!("cannot read {}: {error}", file.display());
        Failure::new(Exit::Usage, "file.unreadable", why).hint("name a PEM file of this machine")
    })
}

/// What is there is not written over: it may be the only copy of a key.
fn write(file: &std::path::Path, text: &str, mode: u32) -> Result {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(file)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| {
        let why = format!("cannot write {}: {error}", file.display());
        Failure::new(Exit::Usage, "file.unwritable", why).hint("name a file that is not there yet")
    })
}

fn list(certificates: &[Certificate], out: &Output) -> String {
    let mut table = Table::new(&["certificate", "names", "issuer", "source", "until", "domains"]);
    for certificate in certificates {
        table.row(vec![
            certificate.id.chars().take(16).collect(),
            certificate.names.join(" "),
            certificate.issuer.clone(),
            render::word(certificate.source),
            human::moment(certificate.not_after),
            if certificate.domains.is_empty() { "-".to_owned() } else { certificate.domains.join(" ") },
        ]);
    }
    table.render(out)
}

fn show(certificate: &Certificate) -> String {
    let authority = certificate.authority.as_deref().map(|name| format!(" ({name})")).unwrap_or_default();
    format!(
        "certificate  {}\nnames        {}\nissuer       {}{}\nsource       {}\nvalid        {} to {}\ndomains      {}\n{}",
        certificate.id,
        clean(&certificate.names.join(" ")),
        clean(&certificate.issuer),
        clean(&authority),
        render::word(certificate.source),
        human::moment(certificate.not_before),
        human::moment(certificate.not_after),
        clean(&certificate.domains.join(" ")),
        certificate.chain.trim_end(),
    )
}
