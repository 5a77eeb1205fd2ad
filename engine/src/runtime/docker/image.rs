//! Images on an engine: found, pulled, given out and taken in.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::models::{CreateImageInfo, ImageInspect};
use bollard::query_parameters::{CreateImageOptionsBuilder, ImportImageOptionsBuilder, RemoveImageOptions};
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::Engine;
use super::error::{Verdict, verdict, words};
use crate::runtime::{ImageInfo, Progress, RuntimeError};

/// A pull or a transfer is given up after so long without a byte or a word.
const TRANSFER_IDLE_TIMEOUT_MS: u64 = 300_000;
/// The engine packs a whole image before it gives out the first byte, and answers a load after the last one.
const TRANSFER_HEAD_TIMEOUT_S: u64 = 6 * 3_600;
/// Time between two looks at how far a transfer has got.
const WATCH_INTERVAL_MS: u64 = 1_000;
/// Longest reference: a name of 255 bytes, a tag of 128 or a digest.
const MAX_REFERENCE_BYTES: usize = 512;

/// See [`crate::runtime::Runtime::image`].
pub(super) async fn find(engine: &Engine, reference: &str) -> Result<Option<ImageInfo>, RuntimeError> {
    check(engine, reference)?;
    let docker = engine.docker().await?;
    match docker.inspect_image(reference).await {
        Ok(image) => Ok(Some(read(image))),
        Err(error) if verdict(&error) == Verdict::Missing => Ok(None),
        Err(error) => Err(engine.translate(&error)),
    }
}

/// See [`crate::runtime::Runtime::remove_image`].
pub(super) async fn remove(engine: &Engine, reference: &str) -> Result<(), RuntimeError> {
    check(engine, reference)?;
    let docker = engine.docker().await?;
    match docker.remove_image(reference, None::<RemoveImageOptions>, None).await {
        Ok(_) => Ok(()),
        Err(error) if verdict(&error) == Verdict::Missing => Ok(()),
        Err(error) => Err(engine.translate(&error)),
    }
}

/// See [`crate::runtime::Runtime::pull`].
pub(super) async fn pull(
    engine: &Engine,
    reference: &str,
    progress: Progress<'_>,
) -> Result<ImageInfo, RuntimeError> {
    check(engine, reference)?;
    let missing = |detail: String| RuntimeError::NoImage {
        image: reference.to_owned(),
        machine: engine.machine.clone(),
        detail,
    };
    let Some((name, tag)) = split(reference) else {
        return Err(missing("an image id says nothing of a registry".to_owned()));
    };
    let mut options = CreateImageOptionsBuilder::default().from_image(name);
    if let Some(tag) = tag {
        options = options.tag(tag);
    }
    let docker = engine.patient(Duration::from_millis(TRANSFER_IDLE_TIMEOUT_MS)).await;
    let docker = docker.map_err(|error| engine.translate(&error))?;
    let mut news = Box::pin(docker.create_image(Some(options.build()), None, None));
    let mut layers = Layers::default();
    let idle = Duration::from_millis(TRANSFER_IDLE_TIMEOUT_MS);
    while let Some(news) = tokio::time::timeout(idle, news.next())
        .await
        .map_err(|_| missing(format!("nothing came for {} s", idle.as_secs())))?
    {
        match news {
            Ok(news) => {
                layers.note(&news);
                let (done, total) = layers.sum();
                progress(done, (total > 0).then_some(total));
            }
            // Whatever the registry's reason (no such image, no right, no network): it cannot be pulled.
            Err(error) if verdict(&error) != Verdict::Unknown => return Err(missing(words(&error))),
            Err(error) => return Err(engine.translate(&error)),
        }
    }
    match find(engine, reference).await? {
        Some(image) => Ok(image),
        None => Err(missing("it was pulled, but is not there".to_owned())),
    }
}

/// See [`crate::runtime::Runtime::export`].
pub(super) fn export(engine: Engine, image: String) -> BoxStream<'static, Result<Bytes, RuntimeError>> {
    let connect = async move {
        check(&engine, &image)?;
        let docker = engine.patient(Duration::from_secs(TRANSFER_HEAD_TIMEOUT_S)).await;
        let docker = docker.map_err(|error| engine.translate(&error))?;
        Ok((engine, docker.export_image(&image)))
    };
    stream::once(connect)
        .flat_map(|connected| match connected {
            Ok((engine, chunks)) => {
                chunks.map(move |chunk| chunk.map_err(|error| engine.translate(&error))).boxed()
            }
            Err(error) => stream::once(async { Err(error) }).boxed(),
        })
        .boxed()
}

/// See [`crate::runtime::Runtime::import`].
///
/// An engine with Docker's older image store names an image by its configuration, one with containerd's by its
/// manifest: the same image then has another id there. It is found under the id that the engine says it has
/// loaded, and that one is returned.
pub(super) async fn import(
    engine: &Engine,
    image: &str,
    chunks: BoxStream<'static, Result<Bytes, RuntimeError>>,
    progress: Progress<'_>,
) -> Result<ImageInfo, RuntimeError> {
    check(engine, image)?;
    let docker = engine.patient(Duration::from_secs(TRANSFER_HEAD_TIMEOUT_S)).await;
    let docker = docker.map_err(|error| engine.translate(&error))?;
    let taken = Arc::new(Taken::default());
    let counted = {
        let taken = Arc::clone(&taken);
        chunks.map(move |chunk| match chunk {
            Ok(chunk) => {
                taken.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                Ok(chunk)
            }
            Err(error) => {
                let said = error.to_string();
                *taken.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Err(std::io::Error::other(said))
            }
        })
    };
    let options = ImportImageOptionsBuilder::default().quiet(true).build();
    let load = docker.import_image_stream(options, counted, None).collect::<Vec<_>>();
    let answer = watched(engine, &taken, progress, load).await?;
    if let Some(error) = taken.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error); // the source is to blame, not this engine
    }
    let mut loaded = Vec::new();
    for said in answer {
        let said = said.map_err(|error| engine.translate(&error))?;
        loaded.extend(said.stream.as_deref().and_then(loaded_reference).map(str::to_owned));
    }
    for reference in std::iter::once(image).chain(loaded.iter().map(String::as_str)) {
        if let Some(found) = find(engine, reference).await? {
            return Ok(found);
        }
    }
    Err(engine.other(&format!("the engine took in {image}, but does not have it (it says: {loaded:?})")))
}

/// How far an import has got.
#[derive(Debug, Default)]
struct Taken {
    bytes: AtomicU64,
    failure: Mutex<Option<RuntimeError>>,
}

/// Drives `work`, tells how far it has got, and gives up when nothing moves any more.
async fn watched<T>(
    engine: &Engine,
    taken: &Taken,
    progress: Progress<'_>,
    work: impl Future<Output = T>,
) -> Result<T, RuntimeError> {
    let mut work = std::pin::pin!(work);
    let mut interval = tokio::time::interval(Duration::from_millis(WATCH_INTERVAL_MS));
    let (mut last, mut moved_at) = (0, tokio::time::Instant::now());
    loop {
        tokio::select! {
            done = &mut work => {
                progress(taken.bytes.load(Ordering::Relaxed), None);
                return Ok(done);
            }
            now = interval.tick() => {
                let bytes = taken.bytes.load(Ordering::Relaxed);
                if bytes != last {
                    (last, moved_at) = (bytes, now);
                    progress(bytes, None);
                } else if now.duration_since(moved_at).as_millis() > u128::from(TRANSFER_IDLE_TIMEOUT_MS) {
                    return Err(RuntimeError::Unreachable {
                        machine: engine.machine.clone(),
                        detail: format!("the transfer stands still after {bytes} bytes"),
                    });
                }
            }
        }
    }
}

/// `Loaded image: name:tag` or `Loaded image ID: sha256:…`.
fn loaded_reference(line: &str) -> Option<&str> {
    let rest = line.trim().strip_prefix("Loaded image")?;
    Some(rest.strip_prefix(" ID").unwrap_or(rest).strip_prefix(':')?.trim())
}

/// Name and tag (or nothing, if a digest stands in the name) as the engine wants them; `None` for an id.
fn split(reference: &str) -> Option<(&str, Option<&str>)> {
    if reference.starts_with("sha256:") {
        return None;
    }
    if reference.contains('@') {
        return Some((reference, None));
    }
    let last = reference.rfind('/').map_or(0, |slash| slash + 1);
    match reference[last..].rfind(':') {
        Some(colon) => Some((&reference[..last + colon], Some(&reference[last + colon + 1..]))),
        None => Some((reference, Some("latest"))), // without a tag the engine would pull every tag
    }
}

/// A reference becomes part of a URL's path: nothing that means something there gets through.
fn check(engine: &Engine, reference: &str) -> Result<(), RuntimeError> {
    let good = !reference.is_empty()
        && reference.len() <= MAX_REFERENCE_BYTES
        && !reference.contains("..")
        && reference.bytes().all(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/' | b':' | b'@')
        });
    if good {
        return Ok(());
    }
    Err(RuntimeError::Refused {
        machine: engine.machine.clone(),
        detail: format!("{reference:?} is no image reference (name:tag, name@sha256:… or an image id)"),
    })
}

fn read(image: ImageInspect) -> ImageInfo {
    let ports = image.config.and_then(|config| config.exposed_ports).unwrap_or_default();
    let mut exposed_ports: Vec<u16> =
        ports.iter().filter_map(|port| port.strip_suffix("/tcp").unwrap_or(port).parse().ok()).collect();
    exposed_ports.sort_unstable();
    ImageInfo {
        id: image.id.unwrap_or_default(),
        repo_digests: image.repo_digests.unwrap_or_default(),
        size_bytes: image.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        architecture: image.architecture.unwrap_or_default(),
        os: image.os.unwrap_or_default(),
        exposed_ports,
    }
}

/// The layers of a pull: bytes done and in all.
#[derive(Debug, Default)]
struct Layers(HashMap<String, (u64, u64)>);

impl Layers {
    fn note(&mut self, news: &CreateImageInfo) {
        let (Some(id), Some(status)) = (&news.id, &news.status) else { return };
        if status == "Downloading" {
            let detail = news.progress_detail.clone().unwrap_or_default();
            let number = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(0);
            self.0.insert(id.clone(), (number(detail.current), number(detail.total)));
        } else if matches!(status.as_str(), "Download complete" | "Pull complete" | "Verifying Checksum")
            && let Some((done, total)) = self.0.get_mut(id)
        {
            *done = *total;
        }
    }

    fn sum(&self) -> (u64, u64) {
        self.0.values().fold((0, 0), |(done, total), layer| (done + layer.0, total + layer.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_split_as_registries_mean_them() {
        assert_eq!(split("nginx"), Some(("nginx", Some("latest"))));
        assert_eq!(split("nginx:1.27"), Some(("nginx", Some("1.27"))));
        assert_eq!(split("localhost:5000/shop"), Some(("localhost:5000/shop", Some("latest"))));
        assert_eq!(split("localhost:5000/a/shop:2"), Some(("localhost:5000/a/shop", Some("2"))));
        assert_eq!(split("r/shop@sha256:00"), Some(("r/shop@sha256:00", None)));
        assert_eq!(split("sha256:00"), None);
    }

    #[test]
    fn the_engine_says_what_it_loaded() {
        assert_eq!(loaded_reference("Loaded image: shop:1\n"), Some("shop:1"));
        assert_eq!(loaded_reference("Loaded image ID: sha256:ab\n"), Some("sha256:ab"));
        assert_eq!(loaded_reference("Loading layer"), None);
    }

    #[test]
    fn layers_add_up_and_a_finished_one_counts_in_full() {
        let news = |status: &str, current, total| CreateImageInfo {
            id: Some("a".to_owned()),
            status: Some(status.to_owned()),
            progress_detail: Some(bollard::models::ProgressDetail {
                current: Some(current),
                total: Some(total),
            }),
            ..CreateImageInfo::default()
        };
        let mut layers = Layers::default();
        layers.note(&news("Pulling fs layer", 0, 0));
        assert_eq!(layers.sum(), (0, 0));
        layers.note(&news("Downloading", 3, 10));
        assert_eq!(layers.sum(), (3, 10));
        layers.note(&news("Download complete", 0, 0));
        layers.note(&news("Extracting", 1, 99));
        assert_eq!(layers.sum(), (10, 10));
    }
}
