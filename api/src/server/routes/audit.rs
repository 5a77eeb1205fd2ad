//! The audit.

use axum::extract::State;

use super::{ListQuery, NoQuery};
use crate::server::context::Context;
use crate::server::error::ApiError;
use crate::server::extract::Query;
use crate::server::page::page;
use crate::types::{AuditEntry, AuditReport, Page};

/// Who asked for what, how it ended, and what was refused, newest first
///
/// Each entry holds the hash of the one before. An entry that cannot be read is left out here: the verification
/// names it.
#[utoipa::path(get, path = "/api/v1/audit", tag = "audit", params(ListQuery),
    responses((status = 200, description = "Entries", body = Page<AuditEntry>)))]
pub(in crate::server) async fn list_audit(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Page<AuditEntry>>, ApiError> {
    let entries = context.engine.audit().await?;
    let told = page(
        entries.iter().rev(),
        |entry| format!("{:020}", entry.number),
        true,
        query.limit,
        query.cursor.as_deref(),
        AuditEntry::from,
    )?;
    Ok(axum::Json(told))
}

/// Whether every entry of the audit is the one that was written
///
/// Reads the store itself. A broken entry is named; that is no error of this call.
#[utoipa::path(get, path = "/api/v1/audit/verify", tag = "audit",
    responses((status = 200, description = "What was found", body = AuditReport)))]
pub(in crate::server) async fn verify_audit(
    State(context): State<Context>,
    Query(NoQuery {}): Query<NoQuery>,
) -> Result<axum::Json<AuditReport>, ApiError> {
    let report = context.engine.verify_audit().await?;
    Ok(axum::Json(AuditReport::from(&report)))
}
