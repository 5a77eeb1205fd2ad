//! Bringing an image to a machine.
//!
//! ```text
//!   there already ─► nothing to do
//!   a registry has it ─► pulled by digest: what comes is what was asked for, whatever the tag says today
//!   another engine has it ─► streamed from there, chunk by chunk; this machine's disk never holds it
//! ```

use std::collections::BTreeSet;

use super::{ImageInfo, Progress, Runtime, RuntimeError};

/// Makes sure that `target` has `image` (a reference or an image id) and returns what it has.
///
/// `repo_digests` are the names under which registries have it (`name@sha256:…`); those that `source` knows are
/// added. Without a source and without a digest, a reference that is no id is pulled as it stands.
///
/// `progress` is told bytes done and in all; for a stream the latter is the image's size at the source, which is
/// an estimate.
///
/// # Errors
///
/// [`RuntimeError::NoImage`] lists every way that was tried and why it failed. A target that does not answer is
/// [`RuntimeError::Unreachable`]; asking again is safe.
pub async fn transfer_image(
    source: Option<&dyn Runtime>,
    target: &dyn Runtime,
    image: &str,
    repo_digests: &[String],
    progress: Progress<'_>,
) -> Result<ImageInfo, RuntimeError> {
    let mut tried = Vec::new();
    let known = match source {
        Some(source) => match source.image(image).await {
            Ok(Some(known)) => Some((source, known)),
            Ok(None) => {
                tried.push("the source does not have it".to_owned());
                None
            }
            Err(error) => {
                tried.push(format!("the source: {error}"));
                None
            }
        },
        None => None,
    };
    // The source's id, not the reference: a tag may mean another image at the target.
    let wanted = known.as_ref().map_or(image, |(_, known)| known.id.as_str());
    if let Some(present) = target.image(wanted).await? {
        return Ok(present);
    }
    let digests: BTreeSet<&String> =
        repo_digests.iter().chain(known.iter().flat_map(|(_, known)| &known.repo_digests)).collect();
    for digest in &digests {
        if let Some(present) = target.image(digest).await? {
            return Ok(present); // under an id of its own
        }
    }
    let by_name = known.is_none() && digests.is_empty() && !image.starts_with("sha256:");
    let names = digests.into_iter().map(String::as_str).chain(by_name.then_some(image));
    for name in names {
        match target.pull(name, progress).await {
            Ok(pulled) => return Ok(pulled),
            Err(error @ RuntimeError::Unreachable { .. }) => return Err(error),
            Err(RuntimeError::NoImage { detail, .. }) => tried.push(format!("pull of {name}: {detail}")),
            Err(error) => tried.push(format!("pull of {name}: {error}")),
        }
    }
    if let Some((source, known)) = &known {
        match stream(*source, target, known, progress).await {
            Ok(streamed) => return Ok(streamed),
            Err(error @ RuntimeError::Unreachable { .. }) => return Err(error),
            Err(error) => tried.push(format!("stream from the source: {error}")),
        }
    }
    if tried.is_empty() {
        tried.push("no registry is known to have it, and no other machine".to_owned());
    }
    let machine = "the target".to_owned();
    Err(RuntimeError::NoImage { image: image.to_owned(), machine, detail: tried.join("; ") })
}

async fn stream(
    source: &dyn Runtime,
    target: &dyn Runtime,
    known: &ImageInfo,
    progress: Progress<'_>,
) -> Result<ImageInfo, RuntimeError> {
    let here = target.info().await?;
    if here.architecture != known.architecture || here.os != known.os {
        return Err(RuntimeError::Unsupported(format!(
            "the image is built for {}/{}, the target is {}/{}: push a build for both to a registry",
            known.os, known.architecture, here.os, here.architecture
        )));
    }
    let told = |done: u64, _: Option<u64>| progress(done, Some(known.size_bytes.max(done)));
    target.import(&known.id, source.export(&known.id), &told).await
}
