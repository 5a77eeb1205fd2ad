//! Black-box stories against the built binary: through the command line, the API and sockets.

mod apart;
mod bad_input;
mod cli;
mod commands;
mod crash;
mod demo;
mod direction;
mod disk;
mod docker_moves;
mod house;
mod keeping;
mod malformed;
mod mirror;
mod moves;
mod partition;
mod restart;
mod serve;
mod soak;
mod support;
mod switches;
