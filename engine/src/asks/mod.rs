//! What the engine answers to: one file per noun, behind [`crate::EngineHandle`].

pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod machines;
mod observe;
pub(crate) mod rollouts;
pub(crate) mod services;
pub(crate) mod views;
