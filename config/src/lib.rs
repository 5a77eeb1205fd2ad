//! The operator's language: files to checked configuration.
