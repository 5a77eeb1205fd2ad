//! `[service.NAME.rules]`: what requests have to pass, and what is changed of them and of their answers on the way.

use std::collections::BTreeMap;

use peregrine_engine::model::{
    BasicAuthSpec, CodingSpec, CompressionSpec, ForwardAuthSpec, HashBy, HeaderEditsSpec, HeadersSpec,
    RateLimitSpec, RedirectSpec, RewriteSpec, RulesSpec, Unfit,
};

use crate::edge::networks;
use crate::names;
use crate::raw::{Fields, Node};

const SECOND_MS: u64 = 1_000;
const DAY_MS: u64 = 24 * 3_600_000;
/// More requests than any service has.
const MAX_REQUESTS: i64 = 1_000_000;

pub(super) fn rules(node: &Node<'_>) -> Option<RulesSpec> {
    let mut rules = RulesSpec::default();
    let mut fields = node.fields()?;
    fields.set("allow", &mut rules.allow, client_networks);
    fields.set("deny", &mut rules.deny, client_networks);
    fields.set_integer("max_in_flight", &mut rules.max_in_flight, 0..=MAX_REQUESTS);
    fields.set("rate_limit", &mut rules.rate_limit, |node| rate_limit(node).map(Some));
    fields.set("headers", &mut rules.headers, headers);
    fields.set("redirects", &mut rules.redirects, redirects);
    fields.set("rewrite", &mut rules.rewrite, |node| rewrite(node).map(Some));
    fields.set("basic_auth", &mut rules.basic_auth, |node| basic_auth(node).map(Some));
    fields.set("forward_auth", &mut rules.forward_auth, |node| forward_auth(node).map(Some));
    fields.set("compression", &mut rules.compression, |node| compression(node).map(Some));
    fields.set("error_pages", &mut rules.error_pages, error_pages);
    Some(rules)
}

/// Says what the engine would say, at its place.
fn sound(node: &Node<'_>, checked: Result<(), Unfit>) -> Option<()> {
    let say = |unfit: Unfit| {
        let hint = unfit.hint.trim_end_matches('.');
        let (first, rest) = hint.split_at(hint.len().min(1));
        node.bad(unfit.message, format_args!("{}{rest}", first.to_ascii_lowercase()));
    };
    checked.map_err(say).ok()
}

fn client_networks(node: &Node<'_>) -> Option<Vec<String>> {
    let networks = networks(node)?;
    if networks.len() > RulesSpec::MAX_NETWORKS {
        let message = format_args!("{} has {} networks", node.path, networks.len());
        node.bad(message, format_args!("put them together into at most {}", RulesSpec::MAX_NETWORKS));
    }
    Some(networks.iter().map(ToString::to_string).collect())
}

fn rate_limit(node: &Node<'_>) -> Option<RateLimitSpec> {
    let mut fields = node.fields()?;
    let (mut requests, mut per_ms, mut by) = (0_u32, 1_000_u32, HashBy::ClientAddress);
    fields.set_integer("requests", &mut requests, 1..=MAX_REQUESTS);
    fields.set_duration("per", &mut per_ms, SECOND_MS..=DAY_MS);
    let mut burst = requests;
    fields.set_integer("burst", &mut burst, 1..=MAX_REQUESTS);
    fields.set("by", &mut by, rate_by);
    if requests == 0 {
        let message = format_args!("{} does not say how many requests", fields.title());
        fields.missing(message, "write { requests = 100, per = \"1m\" }");
        return None;
    }
    Some(RateLimitSpec { requests, per_ms, burst, by })
}

fn rate_by(node: &Node<'_>) -> Option<HashBy> {
    if !node.is_table() {
        return node.word(&[("client_address", ())]).map(|()| HashBy::ClientAddress);
    }
    let mut fields = node.fields()?;
    match (fields.take("header"), fields.take("cookie")) {
        (Some(header), None) => names::token(&header, "x-api-key").map(HashBy::Header),
        (None, Some(cookie)) => names::token(&cookie, "session").map(HashBy::Cookie),
        (None, None) => {
            let message = format_args!("{} does not say what to count by", node.path);
            fields.missing(message, "write { header = \"x-api-key\" } or { cookie = \"session\" }");
            None
        }
        (Some(_), Some(cookie)) => {
            let message = "requests are counted by a header or by a cookie";
            cookie.wrong_key("config.conflict", message, "take one out");
            None
        }
    }
}

fn headers(node: &Node<'_>) -> Option<HeadersSpec> {
    let mut headers = HeadersSpec::default();
    let mut fields = node.fields()?;
    fields.set("request", &mut headers.request, edits);
    fields.set("response", &mut headers.response, edits);
    Some(headers)
}

fn edits(node: &Node<'_>) -> Option<HeaderEditsSpec> {
    let mut edits = HeaderEditsSpec::default();
    let mut fields = node.fields()?;
    fields.set("remove", &mut edits.remove, |node| texts(node, "server"));
    fields.set("set", &mut edits.set, values);
    fields.set("add", &mut edits.add, values);
    sound(node, edits.check())?;
    Some(edits)
}

fn texts(node: &Node<'_>, example: &str) -> Option<Vec<String>> {
    Some(node.texts(example)?.into_iter().map(|(text, _)| text.to_owned()).collect())
}

/// Names with their values, which may be secret.
fn values(node: &Node<'_>) -> Option<BTreeMap<String, String>> {
    node.hide();
    let named = node.fields()?.take_all();
    let value = |(name, node): (&str, Node<'_>)| Some((name.to_owned(), node.text("a value")?.to_owned()));
    Some(named.into_iter().filter_map(value).collect())
}

fn redirects(node: &Node<'_>) -> Option<Vec<RedirectSpec>> {
    let items = node.list("[{ from = \"/old/*\", to = \"/new\" }]")?;
    if items.len() > RulesSpec::MAX_REDIRECTS {
        let message = format_args!("{} has {} redirects", node.path, items.len());
        node.bad(message, format_args!("write at most {}", RulesSpec::MAX_REDIRECTS));
    }
    Some(items.iter().filter_map(redirect).collect())
}

fn redirect(node: &Node<'_>) -> Option<RedirectSpec> {
    const PERMANENT: u16 = 308;
    let mut fields = node.fields()?;
    let mut redirect = RedirectSpec { from: String::new(), to: String::new(), status: PERMANENT };
    let (from, to) = (fields.take("from"), fields.take("to"));
    fields.set_integer("status", &mut redirect.status, 0..=999);
    let (Some(from), Some(to)) = (from, to) else {
        missing_in(&fields, "does not say from where to where", "write { from = \"/old/*\", to = \"/new\" }");
        return None;
    };
    redirect.from = from.text("/old/*")?.to_owned();
    redirect.to = to.text("/new")?.to_owned();
    sound(node, redirect.check())?;
    Some(redirect)
}

fn missing_in(fields: &Fields<'_>, what: &str, hint: &str) {
    fields.missing(format_args!("{} {what}", fields.title()), hint);
}

fn rewrite(node: &Node<'_>) -> Option<RewriteSpec> {
    let mut rewrite = RewriteSpec::default();
    let mut fields = node.fields()?;
    for (key, target) in
        [("strip_prefix", &mut rewrite.strip_prefix), ("add_prefix", &mut rewrite.add_prefix)]
    {
        fields.set(key, target, |node| Some(Some(node.text("/api")?.to_owned())));
    }
    sound(node, rewrite.check())?;
    Some(rewrite)
}

fn basic_auth(node: &Node<'_>) -> Option<BasicAuthSpec> {
    let mut auth = BasicAuthSpec { realm: String::new(), users: BTreeMap::new(), forward: false };
    let mut fields = node.fields()?;
    let (realm, users) = (fields.take("realm"), fields.take("users"));
    fields.set("forward", &mut auth.forward, Node::boolean);
    let users = users.map(|users| values(&users));
    let (Some(realm), Some(users)) = (realm, users) else {
        let hint = "write realm = \"Staff\" and users = { alice = \"$argon2id$…\" }";
        missing_in(&fields, "does not say who may come in", hint);
        return None;
    };
    auth.realm = realm.text("Staff")?.to_owned();
    auth.users = users?;
    sound(node, auth.check())?;
    Some(auth)
}

fn forward_auth(node: &Node<'_>) -> Option<ForwardAuthSpec> {
    const MAX_TIMEOUT_MS: u64 = RulesSpec::MAX_AUTH_TIMEOUT_MS as u64;
    let mut auth = ForwardAuthSpec {
        url: String::new(),
        copy_headers: Vec::new(),
        timeout_ms: RulesSpec::AUTH_TIMEOUT_MS,
    };
    let mut fields = node.fields()?;
    let url = fields.take("url");
    fields.set("copy_headers", &mut auth.copy_headers, |node| texts(node, "x-user"));
    fields.set_duration("timeout", &mut auth.timeout_ms, 1..=MAX_TIMEOUT_MS);
    let Some(url) = url else {
        missing_in(&fields, "does not say whom to ask", "write url = \"http://127.0.0.1:9091/verify\"");
        return None;
    };
    auth.url = url.text("http://127.0.0.1:9091/verify")?.to_owned();
    sound(node, auth.check())?;
    Some(auth)
}

fn compression(node: &Node<'_>) -> Option<CompressionSpec> {
    let mut compression = CompressionSpec::default();
    let mut fields = node.fields()?;
    fields.set("codings", &mut compression.codings, |node| {
        Some(
            node.list("[\"zstd\", \"br\", \"gzip\"]")?
                .iter()
                .filter_map(|item| item.word(&CodingSpec::ALL))
                .collect(),
        )
    });
    fields.set("types", &mut compression.types, |node| texts(node, "text/*"));
    fields.set_size("min_size", &mut compression.min_bytes, 0..=CompressionSpec::MAX_MIN_BYTES);
    sound(node, compression.check())?;
    Some(compression)
}

fn error_pages(node: &Node<'_>) -> Option<BTreeMap<String, String>> {
    let named = node.fields()?.take_all();
    let page = |(key, node): (&str, Node<'_>)| Some((key.to_owned(), node.text("<h1>…</h1>")?.to_owned()));
    let pages = named.into_iter().filter_map(page).collect();
    let rules = RulesSpec { error_pages: pages, ..RulesSpec::default() };
    sound(node, rules.check_changes())?;
    Some(rules.error_pages)
}
