//! The commands: one file each, with its arguments, its help text and its deed.

pub(crate) mod audit;
pub(crate) mod certs;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod deploy;
pub(crate) mod doctor;
pub(crate) mod domains;
pub(crate) mod edges;
pub(crate) mod events;
pub(crate) mod help;
pub(crate) mod instances;
pub(crate) mod logs;
pub(crate) mod machines;
pub(crate) mod man;
pub(crate) mod move_service;
pub(crate) mod moves;
pub(crate) mod rollback;
pub(crate) mod scale;
pub(crate) mod server;
pub(crate) mod services;
pub(crate) mod status;
pub(crate) mod version;
