//! Black-box stories against the built binary: through the command line, the API and sockets.

mod house;
