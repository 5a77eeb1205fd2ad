//! The room from outside: a manager between a vault, edges, DNS and a real authority.

mod bad_ca;
mod crash;
mod dns;
mod issue;
mod life;
mod ocsp;
mod support;
