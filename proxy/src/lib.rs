//! The edge: listeners, request path, upstream pools, probes, access log.
