//! Reading the body of a request: strict, with a pointer to everything that is wrong.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::codes::{self, Code};
use crate::types::FieldError;

/// Most errors that one answer lists.
const MAX_ERRORS: usize = 20;
/// A name that differs by so many letters may be what was meant.
const MAX_TYPOS: usize = 2;

const NOT_A_LIST: &str = "must be an object, not a list";

/// Why a body is not taken.
#[derive(Debug, PartialEq, Eq)]
pub struct BodyError {
    /// Code.
    pub code: &'static Code,
    /// What is wrong, in a sentence.
    pub detail: String,
    /// What is wrong with which field.
    pub errors: Vec<FieldError>,
}

/// Reads a body. Fields that the type does not know are refused.
///
/// # Errors
/// [`BodyError`] with the pointers (RFC 6901) of everything that is wrong.
pub fn parse<T: DeserializeOwned + Serialize>(body: &[u8]) -> Result<T, BodyError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let parsed: T = serde_path_to_error::deserialize(&mut reader).map_err(|error| refused(&error))?;
    reader.end().map_err(|error| malformed(&error))?;
    let given: Value = serde_json::from_slice(body).map_err(|error| malformed(&error))?;
    let errors = not_taken(&given, &parsed);
    let Some(first) = errors.first() else { return Ok(parsed) };
    let code = if first.message == NOT_A_LIST { &codes::INVALID_FIELD } else { &codes::UNKNOWN_FIELD };
    let place = if first.pointer.is_empty() { "the body" } else { &first.pointer };
    Err(BodyError { code, detail: format!("{place} {}", first.message), errors })
}

fn malformed(error: &serde_json::Error) -> BodyError {
    BodyError {
        code: &codes::MALFORMED_JSON,
        detail: format!("the body is not JSON: {error}"),
        errors: Vec::new(),
    }
}

fn refused(error: &serde_path_to_error::Error<serde_json::Error>) -> BodyError {
    let inner = error.inner();
    if !inner.is_data() {
        return malformed(inner);
    }
    let message = inner.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    let field = FieldError::new(pointer_of(error.path()), message);
    let place = if field.pointer.is_empty() { "the body" } else { &field.pointer };
    BodyError { code: &codes::INVALID_FIELD, detail: format!("{place}: {message}"), errors: vec![field] }
}

fn pointer_of(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Map { key } => Some(format!("/{}", escaped(key))),
            Segment::Seq { index } => Some(format!("/{index}")),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// What the type did not take: it is in the body and not in the body that the value would be written as. This
/// holds for every form of type, also for tagged ones, whose own refusal of unknown fields has holes.
fn not_taken(given: &Value, parsed: &impl Serialize) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let taken = serde_json::to_value(parsed).unwrap_or_default();
    compare(given, &taken, &mut String::new(), &mut errors);
    errors
}

fn compare(given: &Value, taken: &Value, pointer: &mut String, errors: &mut Vec<FieldError>) {
    let length = pointer.len();
    match (given, taken) {
        (Value::Object(given), Value::Object(taken)) => {
            for (key, value) in given {
                if errors.len() >= MAX_ERRORS {
                    return;
                }
                pointer.push('/');
                pointer.push_str(&escaped(key));
                match taken.get(key) {
                    Some(counterpart) => compare(value, counterpart, pointer, errors),
                    None => errors.push(FieldError::new(pointer.clone(), unknown(key, taken))),
                }
                pointer.truncate(length);
            }
        }
        (Value::Array(given), Value::Array(taken)) => {
            for (index, (value, counterpart)) in given.iter().zip(taken).enumerate() {
                pointer.push_str(&format!("/{index}"));
                compare(value, counterpart, pointer, errors);
                pointer.truncate(length);
            }
        }
        // A list passes for an object with its fields in order when nobody looks.
        (Value::Array(_), Value::Object(_)) => {
            errors.push(FieldError::new(pointer.clone(), NOT_A_LIST));
        }
        _ => {}
    }
}

fn unknown(key: &str, known: &serde_json::Map<String, Value>) -> String {
    let nearest = known.keys().map(|name| (distance(key, name), name)).min();
    match nearest {
        Some((typos, name)) if typos <= MAX_TYPOS && typos < name.chars().count() => {
            format!("is not known; did you mean {name:?}?")
        }
        _ => "is not known".to_owned(),
    }
}

/// Letters that have to be changed, added or removed to make one word of the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, letter) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{DeployRequest, MachineSpec, MoveRequest, ServiceSpec};

    fn refusal<T: DeserializeOwned + Serialize + std::fmt::Debug>(body: &str) -> BodyError {
        parse::<T>(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_field_that_nobody_knows_is_refused_at_its_pointer_with_what_was_meant() {
        let error = refusal::<MoveRequest>(r#"{"service":"a","to":"b","settings":{"step":[100]}}"#);
        assert_eq!(error.code, &codes::UNKNOWN_FIELD);
        assert_eq!(error.errors[0].pointer, "/settings/step");
        assert!(error.errors[0].message.contains("\"steps\""), "{error:?}");
    }

    #[test]
    fn an_unknown_field_inside_a_tagged_type_is_refused_too() {
        let body = r#"{"name":"a","workload":{"kind":"image","image":"x","port":1,"ports":[1]},
            "traffic":{"balance":{"policy":"round_robin","name":"x"}},"routes":[{"host":"*"},{"host":"a","pth":"/"}]}"#;
        let pointers: Vec<_> =
            refusal::<ServiceSpec>(body).errors.into_iter().map(|error| error.pointer).collect();
        assert_eq!(pointers, ["/routes/1/pth", "/traffic/balance/name", "/workload/ports"]);
    }

    #[test]
    fn free_maps_take_any_name_and_an_explicit_null_is_known() {
        let body = r#"{"name":"a","runtime":"process","address":"127.0.0.2","labels":{"any thing":"x"},"endpoint":null}"#;
        parse::<MachineSpec>(body.as_bytes()).unwrap();
        let off = br#"{"service":"a","to":"b","settings":{"p95_increase":null}}"#;
        assert_eq!(parse::<MoveRequest>(off).unwrap().settings.p95_increase, Some(None));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_refused_at_its_pointer() {
        let error = refusal::<MoveRequest>(r#"{"service":"a","to":"b","settings":{"steps":[1,"x"]}}"#);
        assert_eq!(error.code, &codes::INVALID_FIELD);
        assert_eq!(error.errors[0].pointer, "/settings/steps/1");
        assert!(!error.errors[0].message.contains("line"), "{error:?}");
    }

    #[test]
    fn a_list_does_not_pass_for_an_object() {
        for (body, pointer) in [
            ("[]", ""),
            (r#"["a","b",null,{},null,null]"#, ""),
            (r#"{"service":"a","to":"b","settings":[]}"#, "/settings"),
        ] {
            let error = refusal::<MoveRequest>(body);
            assert_eq!(error.code, &codes::INVALID_FIELD, "{body}");
            assert_eq!(error.errors[0].pointer, pointer, "{body}");
        }
        assert_eq!(refusal::<DeployRequest>("[]").code, &codes::INVALID_FIELD);
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = refusal::<MoveRequest>(r#"{"service":"a"}"#);
        assert!(error.detail.contains("missing field `to`"), "{error:?}");
    }

    #[test]
    fn what_is_not_json_is_malformed_also_after_a_good_document_and_in_depth() {
        let deep = "[".repeat(10_000);
        for body in ["", "{", "{\"service\":\"a\",\"to\":\"b\"} x", "\u{0}", deep.as_str()] {
            let error = refusal::<MoveRequest>(body);
            assert!(
                error.code == &codes::MALFORMED_JSON || error.code == &codes::INVALID_FIELD,
                "{body:.20}: {error:?}"
            );
        }
        assert_eq!(refusal::<DeployRequest>("{\"image\":").code, &codes::MALFORMED_JSON);
        assert_eq!(parse::<MoveRequest>(b"\xff\xfe").unwrap_err().code, &codes::MALFORMED_JSON);
    }

    #[test]
    fn the_distance_of_two_words_counts_their_differences() {
        for (a, b, expected) in
            [("step", "steps", 1), ("pth", "path", 1), ("abc", "abc", 0), ("", "ab", 2), ("xy", "yx", 2)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
