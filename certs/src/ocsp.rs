//! OCSP (RFC 6960): what is asked of a responder for a certificate, and whether its answer may be stapled. Pure: nothing is
//! fetched here, and the time is handed in.
//!
//! ```text
//!   answer ─► read as DER ─► successful, basic ─► signed by the issuer, or by whom it has delegated ─► about this certificate
//!          ─► its time has come and is not over ─► good | revoked | unknown
//! ```
//!
//! A responder is a stranger on plain HTTP until its answer was checked: what is wrong in any way is an error, and never stapled.

use std::time::Duration;

use aws_lc_rs::digest::{self, Algorithm, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use der::asn1::{Any, AnyRef, BitStringRef, GeneralizedTime, ObjectIdentifier, OctetStringRef};
use der::{Decode, Encode, Reader, SliceReader, Tag, TagNumber, Tagged};
use rustls_pki_types::AlgorithmIdentifier;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Answers have one or two kilobytes; with a delegated responder's chain some more.
pub(crate) const MAX_RESPONSE_BYTES: usize = 64 << 10;
/// A responder's clock may be so much before ours.
const SKEW_MS: u64 = 5 * 60_000;
/// Certificates that a responder may send along; it needs one.
const MAX_CERTIFICATES: usize = 8;
/// Longest address of a responder.
const MAX_URL_BYTES: usize = 1_024;

/// RFC 6960 §4.2.1.
const BASIC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.1.1");
/// RFC 5280 §4.2.2.1: what an authority's responder is named with.
const OCSP: &str = "1.3.6.1.5.5.7.48.1";
const SHA1_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.14.3.2.26");
const SHA256_ID: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");

/// Why an answer is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OcspError {
    #[error("the answer cannot be read: {0}")]
    Unreadable(String),
    #[error("the responder says {0}")]
    Refused(&'static str),
    #[error("the answer is about other certificates")]
    Foreign,
    #[error("the answer is not signed by the issuer: {0}")]
    Untrusted(String),
    #[error("the answer holds from a time to come on: check this machine's clock")]
    NotYet,
    #[error("the answer is over")]
    Over,
    #[error("the answer does not say until when it holds")]
    Endless,
}

impl From<der::Error> for OcspError {
    fn from(error: der::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// What a responder says of a certificate, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Good,
    /// Since when, Unix time in milliseconds.
    Revoked(u64),
    /// It does not know the certificate.
    Unknown,
}

/// A checked answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) status: Status,
    /// Unix time in milliseconds.
    pub(crate) this_update_ms: u64,
    /// Its end, Unix time in milliseconds.
    pub(crate) next_update_ms: u64,
}

/// A certificate and its issuer, as far as they count here.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    serial: Vec<u8>,
    issuer_name: Vec<u8>,
    issuer_key: Key,
}

/// A public key with its algorithm.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    /// Content of the AlgorithmIdentifier.
    algorithm: Vec<u8>,
    bits: Vec<u8>,
}

/// The responder that a certificate names (`http` only: an answer is signed, and TLS would need an answer of its own).
pub(crate) fn responder(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    certificate.extensions().iter().find_map(|extension| {
        let ParsedExtension::AuthorityInfoAccess(access) = extension.parsed_extension() else { return None };
        access.iter().find_map(|access| match &access.access_location {
            GeneralName::URI(url)
                if access.access_method.to_id_string() == OCSP
                    && url.len() <= MAX_URL_BYTES
                    && url.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://")) =>
            {
                Some((*url).to_owned())
            }
            _ => None,
        })
    })
}

impl Subject {
    /// # Errors
    /// The second certificate has not signed the first one, or they cannot be read.
    pub(crate) fn of(certificate: &[u8], issuer: &[u8]) -> Result<Self, OcspError> {
        let (own, above) = (parse(certificate)?, parse(issuer)?);
        let untrusted = |why: &str| OcspError::Untrusted(why.to_owned());
        if own.issuer().as_raw() != above.subject().as_raw() {
            return Err(untrusted("the chain does not have the issuer"));
        }
        let issuer_key = Key::of(&above)?;
        issuer_key.has_signed(certificate)?;
        Ok(Self {
            serial: own.raw_serial().to_vec(),
            issuer_name: own.issuer().as_raw().to_vec(),
            issuer_key,
        })
    }

    /// What is asked (RFC 6960 §4.1), without a nonce: answers that were made ahead will do (RFC 5019 §2.1).
    ///
    /// # Errors
    /// It would be too long, which no certificate's names are.
    pub(crate) fn request(&self) -> Result<Vec<u8>, OcspError> {
        // SHA-1 names the issuer here, and proves nothing: every responder knows it (RFC 5019 §2.1.1).
        let algorithm = sequence(&[&SHA1_ID.to_der()?, &[5, 0]])?;
        let octets = |bytes: &[u8]| Any::new(Tag::OctetString, bytes)?.to_der();
        let certificate = sequence(&[
            &algorithm,
            &octets(&hash(&SHA1_FOR_LEGACY_USE_ONLY, &self.issuer_name))?,
            &octets(&hash(&SHA1_FOR_LEGACY_USE_ONLY, &self.issuer_key.bits))?,
            &Any::new(Tag::Integer, self.serial.as_slice())?.to_der()?,
        ])?;
        let list = sequence(&[&sequence(&[&certificate])?])?;
        Ok(sequence(&[&sequence(&[&list])?])?)
    }

    /// Checks an answer.
    ///
    /// # Errors
    /// [`OcspError`]: it must not be used.
    pub(crate) fn check(&self, answer: &[u8], now_ms: u64) -> Result<Checked, OcspError> {
        if answer.len() > MAX_RESPONSE_BYTES {
            return Err(OcspError::Unreadable(format!("it has more than {MAX_RESPONSE_BYTES} bytes")));
        }
        let basic = basic_of(answer)?;
        let mut parts = fields(basic)?;
        let (data, algorithm) = (any(&mut parts)?, any(&mut parts)?);
        let signature = bits(&mut parts)?;
        let certificates = optional(&mut parts, 0)?;
        parts.finish()?;
        let mut data_parts = fields(data)?;
        // Version 1 is 0, and the only one.
        if let Some(version) = optional(&mut data_parts, 0)?
            && AnyRef::from_der(version)?.value() != [0]
        {
            return Err(OcspError::Unreadable("it is of a version to come".into()));
        }
        let responder = any(&mut data_parts)?;
        let _produced: GeneralizedTime = data_parts.decode()?;
        let singles = any(&mut data_parts)?;
        let extensions = optional(&mut data_parts, 1)?;
        data_parts.finish()?;
        refuse_critical(extensions)?;
        let signer = self.signer(responder, certificates, now_ms)?;
        signer.verify(algorithm, &data.to_der()?, signature)?;
        let mut singles = fields(singles)?;
        while !singles.is_finished() {
            if let Some(checked) = self.single(any(&mut singles)?, now_ms)? {
                return Ok(checked);
            }
        }
        Err(OcspError::Foreign)
    }

    /// The key that an answer has to be signed with: the issuer's, or that of a responder to whom the issuer itself has
    /// delegated (RFC 6960 §4.2.2.2).
    fn signer(
        &self,
        responder: AnyRef<'_>,
        certificates: Option<&[u8]>,
        now_ms: u64,
    ) -> Result<Key, OcspError> {
        let untrusted = |why: &str| OcspError::Untrusted(why.to_owned());
        if is_called(responder, &self.issuer_name, &self.issuer_key)? {
            return Ok(self.issuer_key.clone());
        }
        let Some(certificates) = certificates else { return Err(untrusted("nobody says who signed it")) };
        let mut certificates = fields(AnyRef::from_der(certificates)?)?;
        let mut why = untrusted("the certificate of who signed it is not there");
        for _ in 0..MAX_CERTIFICATES {
            if certificates.is_finished() {
                break;
            }
            let der = any(&mut certificates)?.to_der()?;
            let certificate = parse(&der)?;
            let key = Key::of(&certificate)?;
            if !is_called(responder, certificate.subject().as_raw(), &key)? {
                continue;
            }
            match self.has_delegated(&der, &certificate, now_ms) {
                Ok(()) => return Ok(key),
                Err(error) => why = error,
            }
        }
        Err(why)
    }

    fn has_delegated(
        &self,
        der: &[u8],
        certificate: &X509Certificate<'_>,
        now_ms: u64,
    ) -> Result<(), OcspError> {
        let untrusted = |why: &str| Err(OcspError::Untrusted(why.to_owned()));
        let unreadable = |error: x509_parser::error::X509Error| OcspError::Unreadable(error.to_string());
        if certificate.issuer().as_raw() != self.issuer_name {
            return untrusted("its responder is another authority's");
        }
        self.issuer_key.has_signed(der)?;
        let purposes = certificate.extended_key_usage().map_err(unreadable)?;
        if !purposes.is_some_and(|purposes| purposes.value.ocsp_signing) {
            return untrusted("its responder may not sign answers");
        }
        let usage = certificate.key_usage().map_err(unreadable)?;
        if usage.is_some_and(|usage| !usage.value.digital_signature()) {
            return untrusted("its responder's key may not sign");
        }
        let validity = certificate.validity();
        let now_s = i64::try_from(now_ms / 1_000).unwrap_or(i64::MAX);
        let skew_s = i64::try_from(SKEW_MS / 1_000).unwrap_or(0);
        if validity.not_before.timestamp() > now_s.saturating_add(skew_s)
            || validity.not_after.timestamp() < now_s
        {
            return untrusted("its responder's certificate is not valid now");
        }
        Ok(())
    }

    /// What one part says, if it is about this certificate.
    fn single(&self, single: AnyRef<'_>, now_ms: u64) -> Result<Option<Checked>, OcspError> {
        let mut parts = fields(single)?;
        if !self.is_named(any(&mut parts)?)? {
            return Ok(None);
        }
        let status = any(&mut parts)?;
        let this_update_ms = ms(parts.decode()?);
        let next_update = optional(&mut parts, 0)?;
        let extensions = optional(&mut parts, 1)?;
        parts.finish()?;
        refuse_critical(extensions)?;
        let status = match status.tag().number().value() {
            _ if !status.tag().is_context_specific() => {
                return Err(OcspError::Unreadable("it has no status".into()));
            }
            0 => Status::Good,
            1 => Status::Revoked(ms(SliceReader::new(status.value())?.decode()?)),
            2 => Status::Unknown,
            _ => return Err(OcspError::Unreadable("it has a status that nobody knows".into())),
        };
        let next_update_ms = match next_update {
            Some(next) => ms(GeneralizedTime::from_der(next)?),
            None => return Err(OcspError::Endless),
        };
        if this_update_ms > now_ms.saturating_add(SKEW_MS) {
            return Err(OcspError::NotYet);
        }
        if next_update_ms <= now_ms || next_update_ms <= this_update_ms {
            return Err(OcspError::Over);
        }
        Ok(Some(Checked { status, this_update_ms, next_update_ms }))
    }

    /// Whether a CertID (RFC 6960 §4.1.1) is that of this certificate.
    fn is_named(&self, id: AnyRef<'_>) -> Result<bool, OcspError> {
        let mut parts = fields(id)?;
        let algorithm: ObjectIdentifier = fields(any(&mut parts)?)?.decode()?;
        let name = <&OctetStringRef>::decode(&mut parts)?.as_bytes();
        let key = <&OctetStringRef>::decode(&mut parts)?.as_bytes();
        let serial = any(&mut parts)?;
        parts.finish()?;
        let algorithm = match algorithm {
            SHA1_ID => &SHA1_FOR_LEGACY_USE_ONLY,
            SHA256_ID => &SHA256,
            _ => return Ok(false),
        };
        Ok(serial.tag() == Tag::Integer
            && serial.value() == self.serial
            && name == hash(algorithm, &self.issuer_name)
            && key == hash(algorithm, &self.issuer_key.bits))
    }
}

impl Key {
    fn of(certificate: &X509Certificate<'_>) -> Result<Self, OcspError> {
        let mut parts = fields(AnyRef::from_der(certificate.public_key().raw)?)?;
        let algorithm = any(&mut parts)?.value().to_vec();
        Ok(Self { algorithm, bits: bits(&mut parts)?.to_vec() })
    }

    /// Whether it has signed a certificate.
    fn has_signed(&self, certificate: &[u8]) -> Result<(), OcspError> {
        let mut parts = fields(AnyRef::from_der(certificate)?)?;
        let (content, algorithm) = (any(&mut parts)?, any(&mut parts)?);
        self.verify(algorithm, &content.to_der()?, bits(&mut parts)?)
    }

    fn verify(&self, algorithm: AnyRef<'_>, message: &[u8], signature: &[u8]) -> Result<(), OcspError> {
        algorithm.tag().assert_eq(Tag::Sequence)?;
        let is = |id: AlgorithmIdentifier, bytes: &[u8]| id.as_ref() == bytes;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let mut known = provider.signature_verification_algorithms.all.iter().filter(|known| {
            is(known.signature_alg_id(), algorithm.value()) && is(known.public_key_alg_id(), &self.algorithm)
        });
        let verified = known.any(|known| known.verify_signature(&self.bits, message, signature).is_ok());
        if verified {
            Ok(())
        } else {
            Err(OcspError::Untrusted("the signature is wrong, or of a kind that is not trusted".into()))
        }
    }
}

/// The part of an answer that is signed, with its signature.
fn basic_of(answer: &[u8]) -> Result<AnyRef<'_>, OcspError> {
    let mut parts = fields(AnyRef::from_der(answer)?)?;
    let status = any(&mut parts)?;
    if status.tag() != Tag::Enumerated {
        return Err(OcspError::Unreadable("it has no status".into()));
    }
    // RFC 6960 §4.2.1.
    match status.value() {
        [0] => {}
        [1] => return Err(OcspError::Refused("that the question cannot be read")),
        [2] => return Err(OcspError::Refused("that it is in trouble")),
        [3] => return Err(OcspError::Refused("to try later")),
        [5] => return Err(OcspError::Refused("that questions have to be signed")),
        [6] => return Err(OcspError::Refused("that it does not know the certificate")),
        _ => return Err(OcspError::Refused("something that nobody knows")),
    }
    let bytes = optional(&mut parts, 0)?.ok_or_else(|| OcspError::Unreadable("it is empty".into()))?;
    parts.finish()?;
    let mut parts = fields(AnyRef::from_der(bytes)?)?;
    let kind: ObjectIdentifier = parts.decode()?;
    if kind != BASIC {
        return Err(OcspError::Unreadable("it is of another kind than basic".into()));
    }
    let content = <&OctetStringRef>::decode(&mut parts)?.as_bytes();
    parts.finish()?;
    Ok(AnyRef::from_der(content)?)
}

/// Whether a ResponderID is this name, or this key (RFC 6960 §4.2.1).
fn is_called(responder: AnyRef<'_>, name: &[u8], key: &Key) -> Result<bool, OcspError> {
    let context = |number| Tag::ContextSpecific { constructed: true, number: TagNumber(number) };
    if responder.tag() == context(1) {
        return Ok(responder.value() == name);
    }
    if responder.tag() == context(2) {
        let hashed = <&OctetStringRef>::from_der(responder.value())?.as_bytes();
        return Ok(hashed == hash(&SHA1_FOR_LEGACY_USE_ONLY, &key.bits));
    }
    Err(OcspError::Unreadable("it does not say who signed it".into()))
}

/// Extensions that have to be understood, of which we understand none (RFC 6960 §4.4).
fn refuse_critical(extensions: Option<&[u8]>) -> Result<(), OcspError> {
    let Some(extensions) = extensions else { return Ok(()) };
    let mut extensions = fields(AnyRef::from_der(extensions)?)?;
    while !extensions.is_finished() {
        let mut parts = fields(any(&mut extensions)?)?;
        let _kind: ObjectIdentifier = parts.decode()?;
        if any(&mut parts)?.tag() == Tag::Boolean {
            return Err(OcspError::Unreadable("it has an extension that would have to be understood".into()));
        }
    }
    Ok(())
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, OcspError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(OcspError::Unreadable("there is something behind a certificate".into())),
        Err(error) => Err(OcspError::Unreadable(format!("a certificate: {error}"))),
    }
}

/// The fields of a SEQUENCE.
fn fields(any: AnyRef<'_>) -> Result<SliceReader<'_>, der::Error> {
    any.tag().assert_eq(Tag::Sequence)?;
    SliceReader::new(any.value())
}

fn any<'a>(fields: &mut SliceReader<'a>) -> Result<AnyRef<'a>, der::Error> {
    fields.decode()
}

/// The content of a field with this tag, if it is next.
fn optional<'a>(fields: &mut SliceReader<'a>, number: u32) -> Result<Option<&'a [u8]>, der::Error> {
    let wanted = Tag::ContextSpecific { constructed: true, number: TagNumber(number) };
    if fields.is_finished() || Tag::peek(fields)? != wanted {
        return Ok(None);
    }
    Ok(Some(any(fields)?.value()))
}

fn bits<'a>(fields: &mut SliceReader<'a>) -> Result<&'a [u8], OcspError> {
    let bits: BitStringRef<'a> = fields.decode()?;
    bits.as_bytes().ok_or_else(|| OcspError::Unreadable("half a byte".into()))
}

fn sequence(parts: &[&[u8]]) -> Result<Vec<u8>, der::Error> {
    Any::new(Tag::Sequence, parts.concat())?.to_der()
}

fn hash(algorithm: &'static Algorithm, bytes: &[u8]) -> Vec<u8> {
    digest::digest(algorithm, bytes).as_ref().to_vec()
}

fn ms(time: GeneralizedTime) -> u64 {
    let since: Duration = time.to_unix_duration();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DnType,
        ExtendedKeyUsagePurpose, IsCa, KeyPair,
    };

    use super::*;

    const URL: &str = "HTTP://ocsp.example.com/ca";
    const SERIALS: [u8; 3] = [7, 8, 9];
    const DAY_MS: u64 = 24 * 3_600_000;

    type Issuer = CertifiedIssuer<'static, KeyPair>;

    /// An authority with certificates of the numbers above (good, revoked, unknown), and openssl as its responder.
    struct Authority {
        folder: tempfile::TempDir,
        issuer: Issuer,
        certificates: [Vec<u8>; 3],
    }

    fn authority(name: &str) -> Issuer {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    /// A certificate with this number that names a responder: DER and PEM, and the key.
    fn issued(
        issuer: &Issuer,
        number: u8,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Vec<u8>, String, KeyPair) {
        let mut params = CertificateParams::new(vec!["shop.example.com".to_owned()]).unwrap();
        params.serial_number = Some(vec![number].into());
        let url = [&[0x86, u8::try_from(URL.len()).unwrap()], URL.as_bytes()].concat();
        let method = ObjectIdentifier::new_unwrap(OCSP).to_der().unwrap();
        let access = sequence(&[&sequence(&[&method, &url]).unwrap()]).unwrap();
        params.custom_extensions =
            vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 5, 5, 7, 1, 1], access)];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let made = params.signed_by(&key, issuer).unwrap();
        (made.der().to_vec(), made.pem(), key)
    }

    impl Authority {
        fn new() -> Self {
            let (folder, issuer) = (tempfile::tempdir().unwrap(), authority("Test authority"));
            let own = Self { certificates: SERIALS.map(|n| issued(&issuer, n, |_| {}).0), issuer, folder };
            own.file("ca.pem", own.issuer.pem());
            own.file("ca.key", own.issuer.key().serialize_pem());
            let index = "V\t491231235959Z\t\t07\tunknown\t/CN=good\n\
                         R\t491231235959Z\t260102030405Z\t08\tunknown\t/CN=revoked\n";
            own.file("index", index);
            own
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            std::fs::write(self.path(name), text).unwrap();
            self.path(name)
        }

        fn subject(&self, number: usize) -> Subject {
            Subject::of(&self.certificates[number], self.issuer.der()).unwrap()
        }

        /// What openssl answers to our question, signed with this certificate and key.
        fn answer(&self, subject: &Subject, signer: &str, more: &[&str]) -> Vec<u8> {
            let question = self.file("question", subject.request().unwrap());
            self.openssl(signer, &[&["-reqin", question.to_str().unwrap()], more].concat())
        }

        fn openssl(&self, signer: &str, more: &[&str]) -> Vec<u8> {
            let answer = self.path("answer");
            let file = |name: &str| self.path(name);
            let said = Command::new("openssl")
                .args(["ocsp", "-index"])
                .arg(file("index"))
                .arg("-CA")
                .arg(file("ca.pem"))
                .arg("-rsigner")
                .arg(file(&format!("{signer}.pem")))
                .arg("-rkey")
                .arg(file(&format!("{signer}.key")))
                .args(more)
                .arg("-respout")
                .arg(&answer)
                .output()
                .expect("openssl is installed: scripts/setup test");
            assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
            std::fs::read(Path::new(&answer)).unwrap()
        }

        /// Somebody who signs answers for it.
        fn delegate(&self, name: &str, issuer: &Issuer, purpose: ExtendedKeyUsagePurpose) {
            let (_, pem, key) = issued(issuer, 50, |params| {
                params.distinguished_name = rcgen::DistinguishedName::new();
                params.distinguished_name.push(DnType::CommonName, name);
                params.extended_key_usages = vec![purpose];
            });
            self.file(&format!("{name}.pem"), pem);
            self.file(&format!("{name}.key"), key.serialize_pem());
        }
    }

    fn now_ms() -> u64 {
        (crate::Outside::system().now_ms)()
    }

    const WEEK: [&str; 2] = ["-ndays", "7"];

    #[test]
    fn the_responder_of_a_certificate_is_found_if_it_speaks_in_clear_text() {
        let own = Authority::new();
        assert_eq!(responder(&own.certificates[0]).as_deref(), Some(URL));
        assert_eq!(responder(own.issuer.der()), None);
        assert_eq!(responder(b"no certificate"), None);
    }

    #[test]
    fn what_the_issuer_or_its_delegate_says_is_believed_for_its_time_and_no_longer() {
        let own = Authority::new();
        own.delegate("delegate", &own.issuer, ExtendedKeyUsagePurpose::OcspSigning);
        let subject = own.subject(0);
        for (signer, more) in
            [("ca", &WEEK[..]), ("delegate", &WEEK), ("delegate", &["-ndays", "7", "-resp_key_id"])]
        {
            let answer = own.answer(&subject, signer, more);
            let checked = subject.check(&answer, now_ms()).unwrap();
            assert_eq!(checked.status, Status::Good, "{signer} {more:?}");
            let Checked { this_update_ms, next_update_ms, .. } = checked;
            assert_eq!(next_update_ms - this_update_ms, 7 * DAY_MS);
            assert!(subject.check(&answer, this_update_ms - SKEW_MS).is_ok(), "clocks differ a little");
            let early = subject.check(&answer, this_update_ms - SKEW_MS - 1);
            // A delegate's certificate has not begun either.
            assert!(matches!(early, Err(OcspError::NotYet | OcspError::Untrusted(_))), "{early:?}");
            assert!(subject.check(&answer, next_update_ms - 1).is_ok());
            assert_eq!(subject.check(&answer, next_update_ms), Err(OcspError::Over));
        }
        let endless = own.answer(&subject, "ca", &[]);
        assert_eq!(subject.check(&endless, now_ms()), Err(OcspError::Endless));
    }

    #[test]
    fn revoked_and_unknown_certificates_are_told_from_good_ones() {
        let own = Authority::new();
        for (number, status) in [(1, Status::Revoked(1_767_323_045_000)), (2, Status::Unknown)] {
            let subject = own.subject(number);
            let answer = own.answer(&subject, "ca", &WEEK);
            assert_eq!(subject.check(&answer, now_ms()).unwrap().status, status);
        }
    }

    #[test]
    fn an_answer_to_another_question_is_foreign_and_one_that_names_the_issuer_by_sha256_is_not() {
        let own = Authority::new();
        let answer = own.answer(&own.subject(0), "ca", &WEEK);
        assert_eq!(own.subject(2).check(&answer, now_ms()), Err(OcspError::Foreign));
        let (ca, pem) = (own.path("ca.pem"), own.path("own.pem"));
        let own_pem = crate::pem::chain_pem(&[own.certificates[0].clone().into()]);
        std::fs::write(&pem, own_pem).unwrap();
        let asked =
            ["-sha256", "-issuer", ca.to_str().unwrap(), "-cert", pem.to_str().unwrap(), "-ndays", "7"];
        let answer = own.openssl("ca", &asked);
        assert_eq!(own.subject(0).check(&answer, now_ms()).map(|checked| checked.status), Ok(Status::Good));
    }

    #[test]
    fn nobody_else_may_sign() {
        let own = Authority::new();
        let (stranger, twin) = (authority("Stranger"), authority("Test authority"));
        own.delegate("server", &own.issuer, ExtendedKeyUsagePurpose::ServerAuth);
        own.delegate("strangers", &stranger, ExtendedKeyUsagePurpose::OcspSigning);
        own.delegate("twins", &twin, ExtendedKeyUsagePurpose::OcspSigning);
        own.file("twin.pem", twin.pem());
        own.file("twin.key", twin.key().serialize_pem());
        let subject = own.subject(0);
        for signer in ["server", "strangers", "twins", "twin"] {
            let answer = own.answer(&subject, signer, &WEEK);
            let checked = subject.check(&answer, now_ms());
            assert!(matches!(checked, Err(OcspError::Untrusted(_))), "{signer}: {checked:?}");
        }
        own.delegate("silent", &own.issuer, ExtendedKeyUsagePurpose::OcspSigning);
        let answer = own.answer(&subject, "silent", &["-ndays", "7", "-resp_no_certs"]);
        assert!(matches!(subject.check(&answer, now_ms()), Err(OcspError::Untrusted(_))));
        let not_its_issuer = Subject::of(&own.certificates[0], twin.der());
        assert!(matches!(not_its_issuer, Err(OcspError::Untrusted(_))), "{not_its_issuer:?}");
    }

    #[test]
    fn an_answer_with_any_bit_flipped_or_cut_anywhere_and_what_is_none_are_refused() {
        let own = Authority::new();
        let subject = own.subject(0);
        // Without certificates everything in it is signed, or says what the signature is.
        let answer = own.answer(&subject, "ca", &["-ndays", "7", "-resp_no_certs"]);
        let now_ms = now_ms();
        assert!(subject.check(&answer, now_ms).is_ok());
        for at in 0..answer.len() {
            let mut flipped = answer.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(subject.check(&flipped, now_ms).is_err(), "byte {at}");
            assert!(subject.check(&answer[..at], now_ms).is_err(), "cut at {at}");
        }
        let longer = [&answer[..], &[0]].concat();
        assert!(subject.check(&longer, now_ms).is_err(), "there is something behind it");
        assert!(subject.check(b"<html>not found</html>", now_ms).is_err());
        assert!(subject.check(&vec![48; MAX_RESPONSE_BYTES + 1], now_ms).is_err());
        // RFC 6960 §4.2.1: a status alone.
        let refused = subject.check(&[0x30, 3, 0x0a, 1, 3], now_ms);
        assert_eq!(refused, Err(OcspError::Refused("to try later")));
    }
}
