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
mod domains;
mod edge_secrets;
mod house;
mod https;
mod keeping;
mod lived;
mod malformed;
mod mirror;
mod moves;
mod partition;
mod restart;
mod serve;
mod single_writer;
mod soak;
mod support;
mod switches;
mod upgrade;
