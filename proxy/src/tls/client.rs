//! Who a client is, by the certificate that it has proved to own: what goes on of it to upstreams.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue};
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{AttributeTypeAndValue, FromDer, X509Certificate, X509Name};

/// The certificate itself (RFC 9440 §2.2).
pub(crate) const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");
/// Its chain (RFC 9440 §2.3), which the edge does not send and lets nobody else send.
pub(crate) const CLIENT_CERT_CHAIN: HeaderName = HeaderName::from_static("client-cert-chain");
/// Its subject (RFC 4514).
pub(crate) const CLIENT_CERT_SUBJECT: HeaderName = HeaderName::from_static("x-client-cert-subject");

/// Larger certificates go on by their subject alone: origins have limits for a head.
const MAX_CERTIFICATE_BYTES: usize = 4 * 1024;

/// A client's certificate in the form in which it goes on. Made once for a connection.
#[derive(Debug)]
pub(crate) struct ClientIdentity {
    certificate: Option<HeaderValue>,
    subject: Option<HeaderValue>,
}

impl ClientIdentity {
    /// Of the DER of a certificate that was verified.
    pub(crate) fn of(der: &[u8]) -> Self {
        let certificate = (der.len() <= MAX_CERTIFICATE_BYTES).then(|| {
            // A byte sequence (RFC 9651 §3.3.5).
            HeaderValue::from_str(&format!(":{}:", BASE64_STANDARD.encode(der))).ok()
        });
        let parsed = X509Certificate::from_der(der).ok();
        let subject = parsed.and_then(|(_, parsed)| HeaderValue::from_str(&name(parsed.subject())).ok());
        Self { certificate: certificate.flatten(), subject }
    }

    pub(crate) fn insert(&self, headers: &mut HeaderMap) {
        if let Some(certificate) = &self.certificate {
            headers.insert(CLIENT_CERT, certificate.clone());
        }
        if let Some(subject) = &self.subject {
            headers.insert(CLIENT_CERT_SUBJECT, subject.clone());
        }
    }
}

/// A distinguished name as text (RFC 4514 §2.1: the last part first).
fn name(name: &X509Name<'_>) -> String {
    let parts = name.iter_rdn().map(|part| part.iter().map(attribute).collect::<Vec<_>>().join("+"));
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts.join(",")
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let oid = attribute.attr_type();
    let known = oid2abbrev(oid, oid_registry()).ok();
    match (known, attribute.as_str()) {
        (Some(known), Ok(value)) => format!("{known}={}", escaped(value)),
        // What nobody knows, or is no text, goes as its bytes (RFC 4514 §2.4).
        (known, _) => {
            let mut text = known.map_or_else(|| oid.to_id_string(), str::to_owned);
            text.push_str("=#");
            attribute.attr_value().data.iter().for_each(|byte| push_hex(&mut text, *byte));
            text
        }
    }
}

/// RFC 4514 §2.4. What is not printable ASCII goes as hex, so that a value is one in any character set of a field.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let last = value.len().saturating_sub(1);
    for (at, byte) in value.bytes().enumerate() {
        let special = matches!(byte, b'"' | b'+' | b',' | b';' | b'<' | b'>' | b'\\' | b'=');
        let at_an_end = (at == 0 && matches!(byte, b' ' | b'#')) || (at == last && byte == b' ');
        if special || at_an_end {
            text.push('\\');
            text.push(char::from(byte));
        } else if byte == b' ' || byte.is_ascii_graphic() {
            text.push(char::from(byte));
        } else {
            text.push('\\');
            push_hex(&mut text, byte);
        }
    }
    text
}

fn push_hex(text: &mut String, byte: u8) {
    for digit in [byte >> 4, byte & 15] {
        text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_pass_for_another_part_of_the_name() {
        for (value, expected) in [
            ("Ada Lovelace", "Ada Lovelace"),
            ("x,O=Admins", "x\\,O\\=Admins"),
            ("#1 + \"2\"", "\\#1 \\+ \\\"2\\\""),
            (" a ", "\\ a\\ "),
            ("Zoë\r\nHost: b", "Zo\\c3\\ab\\0d\\0aHost: b"),
            ("", ""),
        ] {
            assert_eq!(escaped(value), expected);
        }
    }
}
