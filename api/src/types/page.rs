//! Pages of lists.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// What is on it, in the order of the list.
    pub items: Vec<T>,
    /// Give it back as `?cursor=` for the next page; `null` on the last one. Its content is not part of the
    /// contract.
    pub next_cursor: Option<String>,
}
