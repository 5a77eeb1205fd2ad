//! The version of Pingora that was locked, for the tables.

fn main() {
    println!("cargo:rerun-if-changed=Cargo.lock");
    let lock = std::fs::read_to_string("Cargo.lock").unwrap_or_default();
    let after = lock.split("name = \"pingora-proxy\"\nversion = \"").nth(1);
    let version = after.and_then(|rest| rest.split('"').next()).unwrap_or("unknown");
    println!("cargo:rustc-env=PINGORA_VERSION={version}");
}
