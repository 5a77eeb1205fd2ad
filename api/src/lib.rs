//! HTTP API: wire types, routes, events, typed client.
