//! What was said: a TOML tree with a place for everything in it.
//!
//! [`Fields`] hands out the values of a table by key. Whatever nobody asked for by the time it goes away is an
//! unknown key, so no key can be forgotten, in the file or in here. No mistake stops the reading.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::{Range, RangeInclusive};

use toml::de::{DeTable, DeValue};

use crate::mistake::{Found, Mistakes};
use crate::source::Source;
use crate::{suggest, units};

/// A file that is being read.
pub(crate) struct Document<'d> {
    pub(crate) source: &'d Source,
    found: RefCell<Vec<Found>>,
    /// What may be secret and is never shown.
    hidden: RefCell<Vec<Range<usize>>>,
    /// Every key that was asked for; tests compare it with the reference file.
    asked: RefCell<BTreeSet<String>>,
}

/// The keys that [`read`] has looked for, with `*` for names that the operator chooses.
pub(crate) type Asked = BTreeSet<String>;

/// Reads a file: all its mistakes, or what `check` makes of it.
pub(crate) fn read<T>(
    source: &Source,
    check: impl FnOnce(&mut Fields<'_>) -> Option<T>,
) -> (Result<T, Mistakes>, Asked) {
    let (tree, errors) = DeTable::parse_recoverable(&source.text);
    let document =
        Document { source, found: RefCell::default(), hidden: RefCell::default(), asked: RefCell::default() };
    let mut root = Fields {
        document: &document,
        path: String::new(),
        pattern: String::new(),
        place: 0..0,
        table: tree.get_ref(),
        known: Vec::new(),
    };
    let checked = check(&mut root);
    drop(root);
    let Document { found, hidden, asked, .. } = document;
    let (mut found, mut hidden) = (found.into_inner(), hidden.into_inner());
    if !errors.is_empty() {
        // What is missing may be where the syntax is broken: only what is said for certain counts.
        found.retain(|mistake| mistake.code != "config.missing" && mistake.code != "config.conflict");
        found.extend(errors.iter().map(syntax_mistake));
        hidden.extend(values_that_may_be_secret(&source.text));
    }
    let result = match checked {
        Some(checked) if found.is_empty() => Ok(checked),
        _ => Err(Mistakes::locate(source, found, &hidden)),
    };
    (result, asked.into_inner())
}

/// A table, handed out key by key.
pub(crate) struct Fields<'d> {
    document: &'d Document<'d>,
    path: String,
    /// The path with `*` for names that the operator chooses.
    pattern: String,
    place: Range<usize>,
    table: &'d DeTable<'d>,
    known: Vec<&'static str>,
}

/// A value with its key.
#[derive(Clone)]
pub(crate) struct Node<'d> {
    document: &'d Document<'d>,
    pub(crate) path: String,
    pattern: String,
    /// Where its key is; an item of a list has none, and is there itself.
    pub(crate) key_span: Range<usize>,
    pub(crate) span: Range<usize>,
    value: &'d DeValue<'d>,
}

impl<'d> Fields<'d> {
    /// The value of a key.
    pub(crate) fn take(&mut self, key: &'static str) -> Option<Node<'d>> {
        let pattern = join(&self.pattern, key);
        self.document.asked.borrow_mut().insert(pattern.clone());
        self.known.push(key);
        let (name, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        Some(Node {
            document: self.document,
            path: join(&self.path, key),
            pattern,
            key_span: name.span(),
            span: value.span(),
            value: value.get_ref(),
        })
    }

    /// Every key with its value: for tables whose keys are names.
    pub(crate) fn take_all(&self) -> Vec<(&'d str, Node<'d>)> {
        let pattern = join(&self.pattern, "*");
        self.document.asked.borrow_mut().insert(pattern.clone());
        let mut nodes: Vec<_> = self
            .table
            .iter()
            .map(|(name, value)| {
                let node = Node {
                    document: self.document,
                    path: join(&self.path, name.get_ref()),
                    pattern: pattern.clone(),
                    key_span: name.span(),
                    span: value.span(),
                    value: value.get_ref(),
                };
                (name.get_ref().as_ref(), node)
            })
            .collect();
        nodes.sort_by_key(|(_, node)| node.key_span.start);
        nodes
    }

    /// Takes a value, reads it and puts it where it belongs; without it the default stays.
    pub(crate) fn set<T>(
        &mut self,
        key: &'static str,
        target: &mut T,
        read: impl FnOnce(&Node<'d>) -> Option<T>,
    ) {
        if let Some(value) = self.take(key).and_then(|node| read(&node)) {
            *target = value;
        }
    }

    /// A duration within `range`, in milliseconds.
    pub(crate) fn set_duration<T: TryFrom<u64>>(
        &mut self,
        key: &'static str,
        target: &mut T,
        range: RangeInclusive<u64>,
    ) {
        self.set(key, target, |node| node.duration_ms(range).and_then(|ms| T::try_from(ms).ok()));
    }

    /// A size within `range`, in bytes.
    pub(crate) fn set_size<T: TryFrom<u64>>(
        &mut self,
        key: &'static str,
        target: &mut T,
        range: RangeInclusive<u64>,
    ) {
        self.set(key, target, |node| node.size_bytes(range).and_then(|bytes| T::try_from(bytes).ok()));
    }

    /// A whole number within `range`.
    pub(crate) fn set_integer<T: TryFrom<i64>>(
        &mut self,
        key: &'static str,
        target: &mut T,
        range: RangeInclusive<i64>,
    ) {
        self.set(key, target, |node| node.integer(range).and_then(|number| T::try_from(number).ok()));
    }

    /// Says that something is not there.
    pub(crate) fn missing(&self, message: impl Display, hint: impl Display) {
        self.document.report(self.place.clone(), "config.missing", message, hint);
    }

    /// The path of the table, in brackets.
    pub(crate) fn title(&self) -> String {
        format!("[{}]", self.path)
    }
}

impl Drop for Fields<'_> {
    fn drop(&mut self) {
        let by_names =
            self.known.is_empty() && self.document.asked.borrow().contains(&join(&self.pattern, "*"));
        if by_names {
            return;
        }
        for (name, value) in self.table {
            let key = name.get_ref().as_ref();
            if self.known.contains(&key) {
                continue;
            }
            let place = if self.path.is_empty() { "this file".to_owned() } else { self.title() };
            let hint = suggest::key(key, &self.path, &self.known);
            // An unknown key may be a slip in the name of one whose values are secret.
            self.document.hide(value.get_ref(), value.span());
            let message = format!("unknown key `{}` in {place}", shown_key(key));
            self.document.report(name.span(), "config.unknown_key", message, hint);
        }
    }
}

impl<'d> Node<'d> {
    /// Says that the value is wrong.
    pub(crate) fn wrong(&self, code: &'static str, message: impl Display, hint: impl Display) {
        self.document.report(self.span.clone(), code, message, hint);
    }

    /// Says that the key should not be there.
    pub(crate) fn wrong_key(&self, code: &'static str, message: impl Display, hint: impl Display) {
        self.document.report(self.key_span.clone(), code, message, hint);
    }

    /// Says that the value cannot be meant.
    pub(crate) fn bad(&self, message: impl Display, hint: impl Display) {
        self.wrong("config.bad_value", message, hint);
    }

    fn wrong_type(&self, expected: &str, example: impl Display) {
        let found = match self.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.document.report(
            self.span.clone(),
            "config.wrong_type",
            format!("{} has to be {expected}, but is {found}", self.path),
            format!("write {example}"),
        );
    }

    /// Everything in it is hidden in what is shown of the file.
    pub(crate) fn hide(&self) {
        self.document.hide(self.value, self.span.clone());
    }

    /// Whether it is the number 0.
    pub(crate) fn is_zero(&self) -> bool {
        self.value
            .as_integer()
            .is_some_and(|number| i64::from_str_radix(number.as_str(), number.radix()) == Ok(0))
    }

    pub(crate) const fn is_table(&self) -> bool {
        matches!(self.value, DeValue::Table(_))
    }

    /// A path, made whole.
    pub(crate) fn file_path(&self, example: &str) -> Option<std::path::PathBuf> {
        let text = self.text(example)?;
        if text.is_empty() || text.starts_with('~') || text.contains('\0') {
            self.bad(
                format_args!("{} is no path that can be used in {}", quoted(text), self.path),
                "write the whole path, or one relative to this file; ~ is not expanded",
            );
            return None;
        }
        Some(self.document.source.resolve(text))
    }

    /// Whether it is a string, without a word if it is not.
    pub(crate) fn as_text(&self) -> Option<&'d str> {
        self.value.as_str()
    }

    /// Whether it is true or false, without a word if it is neither.
    pub(crate) fn as_boolean(&self) -> Option<bool> {
        self.value.as_bool()
    }

    pub(crate) fn text(&self, example: &str) -> Option<&'d str> {
        let text = self.value.as_str();
        if text.is_none() {
            self.wrong_type("a string", format_args!("{example:?}"));
        }
        text
    }

    pub(crate) fn boolean(&self) -> Option<bool> {
        let value = self.value.as_bool();
        if value.is_none() {
            self.wrong_type("true or false", "true or false, without quotes");
        }
        value
    }

    pub(crate) fn integer(&self, range: RangeInclusive<i64>) -> Option<i64> {
        let Some(number) = self.value.as_integer() else {
            self.wrong_type(
                "a whole number",
                format_args!("a number such as {}, without quotes", range.start()),
            );
            return None;
        };
        let parsed = i64::from_str_radix(number.as_str(), number.radix()).ok();
        let inside = parsed.filter(|number| range.contains(number));
        if inside.is_none() {
            self.out_of_range(number.as_str(), range.start(), range.end());
        }
        inside
    }

    /// A number, whole or not.
    pub(crate) fn number(&self, range: RangeInclusive<f64>) -> Option<f64> {
        let number = match self.value {
            DeValue::Integer(number) => {
                i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n as f64)
            }
            DeValue::Float(number) => number.as_str().parse().ok(),
            _ => {
                self.wrong_type(
                    "a number",
                    format_args!("a number such as {:?}, without quotes", range.start()),
                );
                return None;
            }
        };
        let inside = number.filter(|number| range.contains(number));
        if inside.is_none() {
            let said = self.value.as_integer().map(toml::de::DeInteger::as_str);
            let said =
                said.or_else(|| self.value.as_float().map(toml::de::DeFloat::as_str)).unwrap_or_default();
            self.out_of_range(said, range.start(), range.end());
        }
        inside
    }

    pub(crate) fn duration_ms(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let Some(text) = self.value.as_str() else {
            self.wrong_type("a duration with a unit", "\"30s\", \"200ms\" or \"5m\"");
            return None;
        };
        let Some(ms) = units::duration_ms(text) else {
            self.bad(
                format_args!("{} is no duration", quoted(text)),
                "write a number and a unit (ms, s, m, h, d) without a space: \"200ms\", \"30s\", \"1m30s\"",
            );
            return None;
        };
        if !range.contains(&ms) {
            let (least, most) = (units::show_duration(*range.start()), units::show_duration(*range.end()));
            self.out_of_range(quoted(text), least, most);
            return None;
        }
        Some(ms)
    }

    pub(crate) fn size_bytes(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let Some(text) = self.value.as_str() else {
            self.wrong_type("a size with a unit", "\"512MiB\", \"10MB\" or \"64KiB\"");
            return None;
        };
        let Some(bytes) = units::size_bytes(text) else {
            self.bad(
                format_args!("{} is no size", quoted(text)),
                "write a number and a unit (B, KB, MB, GB, KiB, MiB, GiB): \"512MiB\", \"10MB\"",
            );
            return None;
        };
        if !range.contains(&bytes) {
            self.out_of_range(quoted(text), units::show_size(*range.start()), units::show_size(*range.end()));
            return None;
        }
        Some(bytes)
    }

    /// A share: `"1%"` or `0.01`.
    pub(crate) fn share(&self, most: f64) -> Option<f64> {
        let share = match self.value {
            DeValue::String(text) => units::percent(text),
            DeValue::Integer(_) | DeValue::Float(_) => return self.number(0.0..=most),
            _ => {
                self.wrong_type("a share", "\"10%\" or 0.1");
                return None;
            }
        };
        match share {
            Some(share) if share <= most => Some(share),
            Some(_) => {
                let said = self.value.as_str().unwrap_or_default();
                self.out_of_range(quoted(said), "0%", format_args!("{}%", most * 100.0));
                None
            }
            None => {
                let said = self.value.as_str().unwrap_or_default();
                self.bad(format_args!("{} is no percentage", quoted(said)), "write \"1%\" or 0.01");
                None
            }
        }
    }

    /// One of a few words.
    pub(crate) fn word<T: Copy>(&self, words: &[(&'static str, T)]) -> Option<T> {
        let text = self.text(words[0].0)?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let names: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let hint = suggest::word(text, &names).map_or_else(
            || format!("write one of: {}", names.join(", ")),
            |word| format!("did you mean {word:?}?"),
        );
        self.bad(format_args!("{} is no value of {}", quoted(text), self.path), hint);
        None
    }

    /// The items of a list; none if it is no list.
    pub(crate) fn list(&self, example: &str) -> Option<Vec<Self>> {
        let DeValue::Array(items) = self.value else {
            self.wrong_type("a list", example);
            return None;
        };
        let item = |value: &'d toml::Spanned<DeValue<'d>>| Node {
            document: self.document,
            path: self.path.clone(),
            pattern: self.pattern.clone(),
            key_span: value.span(),
            span: value.span(),
            value: value.get_ref(),
        };
        Some(items.iter().map(item).collect())
    }

    /// A list of strings; the sound ones, if some are not.
    pub(crate) fn texts(&self, example: &str) -> Option<Vec<(&'d str, Self)>> {
        let items = self.list(&format!("[{example:?}]"))?;
        Some(items.into_iter().filter_map(|item| Some((item.text(example)?, item))).collect())
    }

    /// The keys of a table; none if it is no table.
    pub(crate) fn fields(&self) -> Option<Fields<'d>> {
        let DeValue::Table(table) = self.value else {
            self.wrong_type("a table", format_args!("[{}] and its keys below", self.path));
            return None;
        };
        Some(Fields {
            document: self.document,
            path: self.path.clone(),
            pattern: self.pattern.clone(),
            place: self.key_span.clone(),
            table,
            known: Vec::new(),
        })
    }

    fn out_of_range(&self, said: impl Display, least: impl Display, most: impl Display) {
        self.bad(
            format_args!("{} is {said}, which is not from {least} to {most}", self.path),
            format_args!("write a value from {least} to {most}"),
        );
    }
}

impl Document<'_> {
    fn report(&self, span: Range<usize>, code: &'static str, message: impl Display, hint: impl Display) {
        let hint = Some(hint.to_string()).filter(|hint| !hint.is_empty());
        self.found.borrow_mut().push(Found { span, code, message: message.to_string(), hint });
    }

    /// Hides a value; of a table the values in it, but not their names.
    fn hide(&self, value: &DeValue<'_>, span: Range<usize>) {
        let mut hidden = self.hidden.borrow_mut();
        if !value.is_table() {
            hidden.push(span);
        }
        hide_value(value, &mut hidden);
    }
}

/// Hides what is in a table or list. The span of a table with a header is its header, so each value counts.
fn hide_value(value: &DeValue<'_>, hidden: &mut Vec<Range<usize>>) {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        let children: Vec<_> = match value {
            DeValue::Table(table) => table.iter().map(|(_, child)| child).collect(),
            DeValue::Array(items) => items.iter().collect(),
            _ => continue,
        };
        for child in children {
            match child.get_ref() {
                DeValue::Table(_) => open.push(child.get_ref()),
                _ => hidden.push(child.span()),
            }
        }
    }
}

fn syntax_mistake(error: &toml::de::Error) -> Found {
    let message = error.message().replace('\n', ", ");
    let hint = if message.contains("duplicate key") {
        "a key is in a table once: take one out"
    } else if message.contains("string") {
        "texts are in quotes, on one line: key = \"text\""
    } else {
        "write one key = value a line, tables as [service.web], texts in quotes"
    };
    let message = format!("this is not TOML: {message}");
    Found { span: error.span().unwrap_or(0..0), code: "config.syntax", message, hint: Some(hint.to_owned()) }
}

/// Where the syntax is broken nobody knows what is a secret. Hidden is what is behind the first `=` of every line
/// that may belong to an environment: from one that says `env` to the next table, and any that has a key with
/// capitals, as variables have and our own keys never.
fn values_that_may_be_secret(text: &str) -> Vec<Range<usize>> {
    let mut hidden = Vec::new();
    let mut in_environment = false;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let header = line.trim_start().starts_with('[');
        in_environment = line.contains("env") || (in_environment && !header);
        let keys = line.rsplit_once('=').map_or("", |(keys, _)| keys);
        if in_environment || keys.contains(|c: char| c.is_ascii_uppercase()) {
            let value = line.find('=').map_or(0, |equals| equals + 1);
            let value = value + (line[value..].len() - line[value..].trim_start().len());
            hidden.push(at + value..at + line.trim_end().len().max(value));
        }
        at += line.len();
    }
    hidden
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { shown_key(key) } else { format!("{path}.{}", shown_key(key)) }
}

/// A value in quotes, without control characters, and no more of it than fits.
pub(crate) fn quoted(text: &str) -> String {
    const MAX_VALUE_CHARS: usize = 80;
    match text.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// A key as it is written, and no more of it than fits.
fn shown_key(key: &str) -> String {
    const MAX_KEY_CHARS: usize = 64;
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '*';
    let short: String = key.chars().take(MAX_KEY_CHARS).collect();
    if !short.is_empty() && short.chars().all(bare) { short } else { format!("{short:?}") }
}
