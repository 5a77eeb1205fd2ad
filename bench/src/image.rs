//! Packs a program of this machine into a container image, without a network and without an engine.
//!
//! The image is `FROM scratch`: the program, the shared libraries that its loader would use here, and an empty
//! `/tmp`. It comes out in the archive form that engines load (`docker load`).

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

/// What an image is to be.
#[derive(Debug, Clone)]
pub struct ImageRecipe {
    /// Name and tag under which an engine finds it.
    pub reference: String,
    /// The program on this machine.
    pub program: PathBuf,
    /// Arguments after the program; together they are the image's command.
    pub arguments: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// The port that it listens on.
    pub port: u16,
}

/// A packed image.
#[derive(Debug, Clone)]
pub struct PackedImage {
    /// Image id, `sha256:…` of its configuration.
    pub id: String,
    /// The archive.
    pub archive: Vec<u8>,
}

/// Where the program is in the image.
const PROGRAM: &str = "app";

/// Packs a program.
///
/// # Errors
/// The program or a library cannot be read, or `ldd` is not there.
pub fn pack(recipe: &ImageRecipe) -> io::Result<PackedImage> {
    let layer = layer(&recipe.program)?;
    let mut command = vec![format!("/{PROGRAM}")];
    command.extend(recipe.arguments.iter().cloned());
    let port = format!("{}/tcp", recipe.port);
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Entrypoint": command, "Env": recipe.env, "ExposedPorts": { (port): {} }, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))] },
        "history": [{ "created_by": "peregrine" }],
    });
    let config = serde_json::to_vec(&config)?;
    let digest = hex(&config);
    let manifest = json!([{
        "Config": format!("{digest}.json"),
        "RepoTags": [recipe.reference],
        "Layers": ["layer.tar"],
    }]);
    let mut archive = tar::Builder::new(Vec::new());
    add(&mut archive, &format!("{digest}.json"), &config, 0o644)?;
    add(&mut archive, "layer.tar", &layer, 0o644)?;
    add(&mut archive, "manifest.json", &serde_json::to_vec(&manifest)?, 0o644)?;
    Ok(PackedImage { id: format!("sha256:{digest}"), archive: archive.into_inner()? })
}

fn layer(program: &Path) -> io::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, PROGRAM, &std::fs::read(program)?, 0o755)?;
    for library in libraries(program)? {
        let inside = library.strip_prefix("/").unwrap_or(&library).display().to_string();
        add(&mut layer, &inside, &std::fs::read(&library)?, 0o755)?;
    }
    let mut tmp = tar::Header::new_gnu();
    tmp.set_entry_type(tar::EntryType::Directory);
    tmp.set_mode(0o1777);
    tmp.set_size(0);
    layer.append_data(&mut tmp, "tmp/", io::empty())?;
    layer.into_inner()
}

/// The loader and the libraries of a program, as `ldd` lists them; none for a static one.
fn libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() && !text.contains("statically") && !text.contains("not a dynamic") {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if stderr.contains("not a dynamic") {
            return Ok(Vec::new());
        }
        return Err(io::Error::other(format!("ldd {}: {stderr}", program.display())));
    }
    let words = text.lines().flat_map(|line| line.split_whitespace());
    Ok(words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn add(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    // The same program gives the same image: no times, no owners.
    header.set_mtime(0);
    archive.append_data(&mut header, path, content)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_program_gives_the_same_image_with_its_libraries() {
        let program = std::env::current_exe().expect("a test has a program");
        let recipe = ImageRecipe {
            reference: "shop:1".into(),
            program,
            arguments: vec!["origin".into()],
            env: Vec::new(),
            port: 8080,
        };
        let one = pack(&recipe).expect("packs");
        let two = pack(&recipe).expect("packs");
        assert_eq!(one.id, two.id);
        let other = pack(&ImageRecipe { env: vec!["A=b".into()], ..recipe }).expect("packs");
        assert_ne!(one.id, other.id);
        let mut archive = tar::Archive::new(&one.archive[..]);
        let names: Vec<String> = archive
            .entries()
            .expect("is an archive")
            .map(|entry| entry.expect("entry").path().expect("path").display().to_string())
            .collect();
        assert_eq!(names[1..], ["layer.tar", "manifest.json"], "{names:?}");
    }
}
