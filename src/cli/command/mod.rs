//! The commands: one file each, with its arguments, its help text and its deed.

pub(crate) mod completion;
pub(crate) mod help;
pub(crate) mod man;
pub(crate) mod version;
