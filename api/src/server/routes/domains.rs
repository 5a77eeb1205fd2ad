//! Domains and certificates.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::IntoResponse;
use http::StatusCode;

use super::{ListQuery, NoQuery, location};
use crate::codes;
use crate::domains::{Domains, DomainsError};
use crate::server::context::{Context, carried_through};
use crate::server::error::ApiError;
use crate::server::extract::{Json, Name, NoBody, Query};
use crate::server::idempotency::Secret;
use crate::server::page::page;
use crate::types::{
    Certificate, CertificateExport, CertificateImport, Domain, DomainCheck, DomainRequest, Page,
};

/// Domains by name
#[utoipa::path(get, path = "/api/v1/domains", tag = "domains", params(ListQuery),
    responses((status = 200, description = "Domains", body = Page<Domain>)))]
pub(in crate::server) async fn list_domains(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Domain>>, ApiError> {
    let domains = context.config.domains.as_ref().map(|domains| domains.list()).unwrap_or_default();
    let domains = page(
        domains.iter(),
        |domain| domain.name.clone(),
        false,
        query.limit,
        query.cursor.as_deref(),
        Clone::clone,
    )?;
    Ok(axum::Json(domains))
}

/// Add a domain, or change how it is served
///
/// A certificate is ordered as soon as the name leads here.
#[utoipa::path(post, path = "/api/v1/domains", tag = "domains", request_body = DomainRequest,
    responses((status = 201, description = "Added", body = Domain),
        (status = 200, description = "Changed", body = Domain)))]
pub(in crate::server) async fn add_domain(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
    Json(request): Json<DomainRequest>,
) -> Result<impl IntoResponse, ApiError> {
    let domains = kept(&context)?;
    let is_new = domains.get(&request.name).is_none();
    let domain = carried_through(async move { domains.add(request).await }).await?.map_err(refused)?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, location(&["domains", &domain.name]), axum::Json(domain)))
}

/// One domain
#[utoipa::path(get, path = "/api/v1/domains/{name}", tag = "domains",
    params(("name" = String, Path, description = "Name of the domain")),
    responses((status = 200, description = "Domain", body = Domain)))]
pub(in crate::server) async fn get_domain(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<Domain>, ApiError> {
    let found = context.config.domains.as_ref().and_then(|domains| domains.get(&name));
    let unknown = || ApiError::new(&codes::NO_DOMAIN, format!("there is no domain {name}"));
    found.map(axum::Json).ok_or_else(unknown)
}

/// Remove a domain
///
/// Its certificate is forgotten too.
#[utoipa::path(delete, path = "/api/v1/domains/{name}", tag = "domains",
    params(("name" = String, Path, description = "Name of the domain")),
    responses((status = 204, description = "Removed")))]
pub(in crate::server) async fn remove_domain(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<StatusCode, ApiError> {
    let domains = kept(&context)?;
    carried_through(async move { domains.remove(&name).await }).await?.map_err(refused)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Look at a name from outside
///
/// Where it leads, and which authorities may issue. Also for a name that was not added.
#[utoipa::path(post, path = "/api/v1/domains/{name}/check", tag = "domains",
    params(("name" = String, Path, description = "Name of the domain")),
    responses((status = 200, description = "What was found", body = DomainCheck)))]
pub(in crate::server) async fn check_domain(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<axum::Json<DomainCheck>, ApiError> {
    let check = kept(&context)?.check(&name).await.map_err(refused)?;
    Ok(axum::Json(check))
}

/// Order a new certificate for a domain now
#[utoipa::path(post, path = "/api/v1/domains/{name}/renew", tag = "certificates",
    params(("name" = String, Path, description = "Name of the domain")),
    responses((status = 202, description = "It is ordered", body = Domain)))]
pub(in crate::server) async fn renew_certificate(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<impl IntoResponse, ApiError> {
    let domains = kept(&context)?;
    let domain = carried_through(async move { domains.renew(&name).await }).await?.map_err(refused)?;
    Ok((StatusCode::ACCEPTED, location(&["domains", &domain.name]), axum::Json(domain)))
}

/// The certificate of a domain with its private key
///
/// It is a POST, as what is answered is a secret that no cache may keep.
#[utoipa::path(post, path = "/api/v1/domains/{name}/export", tag = "certificates",
    params(("name" = String, Path, description = "Name of the domain")),
    responses((status = 200, description = "The certificate and its key", body = CertificateExport)))]
pub(in crate::server) async fn export_certificate(
    State(context): State<Context>,
    Name(name): Name,
    Query(NoQuery {}): Query<NoQuery>,
    NoBody: NoBody,
) -> Result<(Extension<Secret>, axum::Json<CertificateExport>), ApiError> {
    let export = kept(&context)?.export(&name).await.map_err(refused)?;
    Ok((Extension(Secret), axum::Json(export)))
}

/// Certificates by id
#[utoipa::path(get, path = "/api/v1/certificates", tag = "certificates", params(ListQuery),
    responses((status = 200, description = "Certificates", body = Page<Certificate>)))]
pub(in crate::server) async fn list_certificates(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<Certificate>>, ApiError> {
    let certificates = match &context.config.domains {
        Some(domains) => domains.certificates().await.map_err(refused)?,
        None => Vec::new(),
    };
    let certificates = page(
        certificates.iter(),
        |certificate| certificate.id.clone(),
        false,
        query.limit,
        query.cursor.as_deref(),
        Clone::clone,
    )?;
    Ok(axum::Json(certificates))
}

/// Serve a domain with a certificate that is brought
///
/// It is not renewed by itself.
#[utoipa::path(post, path = "/api/v1/certificates", tag = "certificates", request_body = CertificateImport,
    responses((status = 201, description = "Imported", body = Domain)))]
pub(in crate::server) async fn import_certificate(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
    Json(import): Json<CertificateImport>,
) -> Result<impl IntoResponse, ApiError> {
    let domains = kept(&context)?;
    let domain = carried_through(async move { domains.import(import).await }).await?.map_err(refused)?;
    Ok((StatusCode::CREATED, location(&["domains", &domain.name]), axum::Json(domain)))
}

fn kept(context: &Context) -> Result<Arc<dyn Domains>, ApiError> {
    let none = || ApiError::new(&codes::NO_DOMAINS, "this server keeps no domains");
    context.config.domains.clone().ok_or_else(none)
}

fn refused(error: DomainsError) -> ApiError {
    match error {
        DomainsError::BadName(why) => ApiError::new(&codes::DOMAIN_NAME, why),
        DomainsError::Unknown(why) => ApiError::new(&codes::NO_DOMAIN, why),
        DomainsError::NoCertificate(why) => ApiError::new(&codes::NO_CERTIFICATE, why),
        DomainsError::BadCertificate(why) => ApiError::new(&codes::BAD_CERTIFICATE, why),
        DomainsError::Configured(why) => ApiError::new(&codes::DOMAIN_CONFIGURED, why),
        DomainsError::NoAuthority(why) => ApiError::new(&codes::NO_AUTHORITY, why),
        DomainsError::Busy(why) => ApiError::new(&codes::DOMAIN_BUSY, why),
        DomainsError::Failed(why) => ApiError::new(&codes::INTERNAL, why),
    }
}
