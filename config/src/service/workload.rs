//! What runs: an image, a command, or nothing of ours.

use std::collections::{BTreeMap, BTreeSet};

use peregrine_engine::model::{CAPABILITIES, FixedUpstream, Resources, Workload};

use crate::names;
use crate::raw::{Fields, Node, quoted};
use crate::suggest;

/// Longest reference of an image: registries take no more.
const MAX_IMAGE_BYTES: usize = 512;
/// Most upstreams of one service.
const MAX_UPSTREAMS: usize = 1_000;
/// Greatest weight of an upstream.
const MAX_WEIGHT: i64 = 1_000;
/// What a command is told by the engine itself.
const RESERVED_ENV: [&str; 2] = ["HOST", "PORT"];

pub(super) fn workload(fields: &mut Fields<'_>) -> Option<Workload> {
    let image = fields.take("image");
    let command = fields.take("command");
    let upstreams = fields.take("upstreams");
    let port = fields.take("port");
    let directory = fields.take("directory");
    let env_node = fields.take("env");
    let capabilities_node = fields.take("capabilities");
    let env = env_node.as_ref().map(|node| env(node, image.is_none())).unwrap_or_default();
    let refuse = |nodes: &[&Option<Node<'_>>], why: &str| {
        for node in nodes.iter().filter_map(|node| node.as_ref()) {
            let message = format_args!("{} has no meaning here: {why}", node.path);
            node.wrong_key("config.conflict", message, "take it out");
        }
    };
    match (&image, &command, &upstreams) {
        (Some(node), _, Some(_)) | (None, Some(node), Some(_)) => {
            node.wrong_key(
                "config.conflict",
                format_args!("{} has upstreams and also something to run", fields.title()),
                "upstreams are servers that Peregrine does not run: keep either upstreams or image or command",
            );
            None
        }
        (Some(image), command, None) => {
            refuse(&[&directory], "an image has its own working directory");
            let port = required_port(fields, port.as_ref());
            let command = command.as_ref().map(argv);
            Some(Workload::Image {
                image: image_reference(image)?,
                port: port?,
                command: match command {
                    Some(command) => Some(command?),
                    None => None,
                },
                env,
                capabilities: capabilities_node.as_ref().map(capabilities).unwrap_or_default(),
            })
        }
        (None, Some(command), None) => {
            refuse(&[&port], "a command is given a free port, in PORT and for {port} in its arguments");
            refuse(&[&capabilities_node], "a command has what the user of `peregrine serve` has");
            let directory = directory.map(|node| node.file_path("app"));
            Some(Workload::Command {
                command: argv(command)?,
                directory: match directory {
                    Some(directory) => Some(directory?),
                    None => None,
                },
                env,
            })
        }
        (None, None, Some(node)) => {
            refuse(&[&port], "each upstream has its own port");
            refuse(
                &[&directory, &env_node, &capabilities_node],
                "Peregrine does not run the servers in upstreams",
            );
            Some(Workload::Fixed { upstreams: upstreams_of(node)? })
        }
        (None, None, None) => {
            fields.missing(
                format_args!("{} does not say what runs", fields.title()),
                "add image = \"shop:1.4\" and port = 3000, or command = [\"./shop\"], or upstreams = [\"10.0.0.5:8080\"]",
            );
            None
        }
    }
}

fn required_port(fields: &Fields<'_>, node: Option<&Node<'_>>) -> Option<u16> {
    if node.is_none() {
        let message = format_args!("{} has an image but no port", fields.title());
        fields.missing(message, "add port = 3000: the port on which the container listens");
    }
    node?.integer(1..=65_535).and_then(|port| u16::try_from(port).ok())
}

fn image_reference(node: &Node<'_>) -> Option<String> {
    let text = node.text("shop:1.4")?;
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_./:@[]+".contains(&b);
    let sound = text.bytes().all(fine)
        && !text.contains("//")
        && text.len() <= MAX_IMAGE_BYTES
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
        && text.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    if !sound {
        let message = format_args!("{} is no reference of an image", quoted(text));
        node.bad(message, "write it as for docker run: \"shop:1.4\" or \"shop@sha256:…\", without a scheme");
    }
    sound.then(|| text.to_owned())
}

fn argv(node: &Node<'_>) -> Option<Vec<String>> {
    if let Some(line) = node.as_text() {
        let words: Vec<_> = line.split_ascii_whitespace().map(quoted).collect();
        let plain = line.bytes().all(|b| b.is_ascii_alphanumeric() || b" -_./:={}".contains(&b));
        let hint = if plain && (1..=20).contains(&words.len()) {
            format!("write [{}], or [\"sh\", \"-c\", …] for what only a shell can do", words.join(", "))
        } else {
            "write [\"program\", \"argument\"], or [\"sh\", \"-c\", …] for what only a shell can do"
                .to_owned()
        };
        node.wrong("config.wrong_type", format_args!("{} is a list: no shell splits it", node.path), hint);
        return None;
    }
    let items = node.list("[\"program\", \"argument\"]")?;
    let words: Vec<_> = items.iter().map(|item| item.text("argument")).collect::<Option<_>>()?;
    if words.first().is_none_or(|program| program.is_empty()) || words.iter().any(|word| word.contains('\0'))
    {
        node.bad(format_args!("{} names no program", node.path), "write [\"program\", \"argument\"]");
        return None;
    }
    Some(words.into_iter().map(str::to_owned).collect())
}

/// What a container is given back of what is dropped.
fn capabilities(node: &Node<'_>) -> BTreeSet<String> {
    let mut given = BTreeSet::new();
    for (text, item) in node.texts("SETUID").unwrap_or_default() {
        if !CAPABILITIES.contains(&text) {
            let plain = text.get(..4).filter(|prefix| prefix.eq_ignore_ascii_case("CAP_"));
            let plain = plain.map_or(text, |prefix| &text[prefix.len()..]);
            let hint = suggest::word(plain, &CAPABILITIES).map_or_else(
                || {
                    format!(
                        "write some of: {}; every other one is power over the machine",
                        CAPABILITIES.join(", ")
                    )
                },
                |name| format!("did you mean {name:?}?"),
            );
            item.bad(format_args!("{} is no capability that a container can be given", quoted(text)), hint);
        } else if !given.insert(text.to_owned()) {
            let message = format_args!("{} is in {} twice", quoted(text), node.path);
            item.wrong("config.duplicate", message, "take one out");
        }
    }
    given
}

/// Values are never shown, whatever is wrong.
fn env(node: &Node<'_>, is_command: bool) -> BTreeMap<String, String> {
    node.hide();
    let Some(fields) = node.fields() else { return BTreeMap::new() };
    let mut env = BTreeMap::new();
    for (name, node) in fields.take_all() {
        let Some(value) = node.as_text() else {
            let message = format_args!("{} has to be a string", node.path);
            node.wrong("config.wrong_type", message, "put the value in quotes, also if it is a number");
            continue;
        };
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let message = format_args!("{} is no environment variable", node.path);
            node.wrong_key(
                "config.bad_name",
                message,
                "names have no =, and neither names nor values have NUL",
            );
        } else if is_command && RESERVED_ENV.contains(&name) {
            let message = format_args!("{name} is set by Peregrine: it tells the command where to listen");
            node.wrong_key("config.bad_name", message, "take it out");
        } else {
            env.insert(name.to_owned(), value.to_owned());
        }
    }
    env
}

fn upstreams_of(node: &Node<'_>) -> Option<Vec<FixedUpstream>> {
    let items = node.list("[\"10.0.0.5:8080\"]")?;
    let count = items.len();
    if count == 0 || count > MAX_UPSTREAMS {
        let message = format_args!("{} has {count} servers", node.path);
        node.bad(message, format_args!("write 1 to {MAX_UPSTREAMS} of them: [\"10.0.0.5:8080\"]"));
        return None;
    }
    let mut upstreams: Vec<FixedUpstream> = Vec::with_capacity(count);
    for item in items {
        let Some(upstream) = upstream(&item) else { continue };
        if upstreams.iter().any(|first| first.address == upstream.address) {
            let message = format_args!("{} is in {} twice", upstream.address, node.path);
            item.wrong(
                "config.duplicate",
                message,
                "take one out, and say { address = …, weight = 2 } if it is to get more",
            );
        }
        upstreams.push(upstream);
    }
    (upstreams.len() == count).then_some(upstreams)
}

fn upstream(item: &Node<'_>) -> Option<FixedUpstream> {
    let mut weight = 1;
    let address = if item.is_table() {
        let mut fields = item.fields()?;
        fields.set_integer("weight", &mut weight, 1..=MAX_WEIGHT);
        let address = fields.take("address");
        if address.is_none() {
            fields.missing("an upstream has no address", "write { address = \"10.0.0.5:8080\", weight = 2 }");
        }
        address?
    } else {
        item.clone()
    };
    let text = address.text("10.0.0.5:8080")?;
    if names::upstream_address(text).is_none() {
        address.bad(
            format_args!("{} is no server's address", quoted(text)),
            "write an address or host name with a port and without a scheme: \"10.0.0.5:8080\"",
        );
        return None;
    }
    Some(FixedUpstream { address: text.to_owned(), weight })
}

/// `[service.NAME.resources]`.
pub(super) fn resources(node: &Node<'_>) -> Resources {
    const MIN_MEMORY_BYTES: u64 = 6 << 20; // Docker starts nothing with less
    const MAX_MEMORY_BYTES: u64 = 1 << 50;
    const MAX_CORES: f64 = 4_096.0;
    const MAX_PIDS: i64 = 4_194_304; // the kernel's own limit
    let mut resources = Resources::default();
    let Some(mut fields) = node.fields() else { return resources };
    fields.set("memory", &mut resources.memory_bytes, |node| {
        unlimited(node).or_else(|| node.size_bytes(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES))
    });
    fields.set("cpu", &mut resources.cpu_millis, |node| {
        let cores = unlimited(node).map(|none| none as f64).or_else(|| node.number(0.01..=MAX_CORES))?;
        Some((cores * 1_000.0).round() as u32)
    });
    fields.set("pids", &mut resources.pids, |node| {
        let count = unlimited(node).map(u64::cast_signed).or_else(|| node.integer(1..=MAX_PIDS))?;
        u32::try_from(count).ok()
    });
    resources
}

/// `"unlimited"` is 0 for the engine.
pub(crate) fn unlimited(node: &Node<'_>) -> Option<u64> {
    (node.as_text() == Some("unlimited")).then_some(0)
}
