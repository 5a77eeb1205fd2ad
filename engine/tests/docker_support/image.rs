//! An image `FROM scratch` with this test binary and the libraries that it needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use peregrine_engine::runtime::RuntimeError;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{PORT, program};

const CHUNK_BYTES: usize = 64 << 10;

/// An image as an archive that engines load.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) id: String,
    pub(crate) archive: Bytes,
}

impl Packed {
    pub(crate) fn stream(&self) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
        let archive = self.archive.clone();
        let chunks = (0..archive.len()).step_by(CHUNK_BYTES);
        stream::iter(chunks.map(move |from| Ok(archive.slice(from..archive.len().min(from + CHUNK_BYTES)))))
            .boxed()
    }
}

/// The image of this test binary; every call another one (its configuration has a random label), so that a test
/// can have one that no engine knows yet.
pub(crate) fn packed() -> Packed {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("app");
    let own = std::env::current_exe().unwrap();
    let stripped = Command::new("strip").arg("-o").arg(&program).arg(&own).status();
    if !stripped.is_ok_and(|status| status.success()) {
        std::fs::copy(&own, &program).unwrap(); // as it is: only bigger
    }
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, "app", &std::fs::read(&program).unwrap(), 0o755);
    for library in libraries(&program) {
        add(&mut layer, library.to_str().unwrap(), &std::fs::read(&library).unwrap(), 0o755);
    }
    pack(&layer.into_inner().unwrap())
}

fn pack(layer: &[u8]) -> Packed {
    let port = format!("{PORT}/tcp");
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {
            "Entrypoint": ["/app"],
            "Cmd": program::arguments("serve"),
            "Env": ["IN_TEST_IMAGE=1"],
            "ExposedPorts": { (port): {} },
            "Labels": { "unique": uuid::Uuid::new_v4().to_string() },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(layer))] },
        "history": [{ "created_by": "tests" }],
    });
    let config = serde_json::to_vec(&config).unwrap();
    let digest = hex(&config);
    let manifest = json!([{ "Config": format!("{digest}.json"), "RepoTags": null, "Layers": ["layer.tar"] }]);
    let mut archive = tar::Builder::new(Vec::new());
    add(&mut archive, &format!("{digest}.json"), &config, 0o644);
    add(&mut archive, "layer.tar", layer, 0o644);
    add(&mut archive, "manifest.json", &serde_json::to_vec(&manifest).unwrap(), 0o644);
    Packed { id: format!("sha256:{digest}"), archive: archive.into_inner().unwrap().into() }
}

/// The loader and the libraries, as `ldd` lists them.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn add(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path.trim_start_matches('/'), content).unwrap();
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
