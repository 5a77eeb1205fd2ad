//! Who may issue for a name (RFC 8659). An authority checks this itself; we look before, so as to say it in words and to ask
//! one that may.

use hickory_resolver::proto::rr::{RData, RecordType};

use super::Names;

/// One property of a record set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Property {
    pub(crate) critical: bool,
    pub(crate) tag: String,
    pub(crate) value: String,
}

/// What applies to a name: the first record set on the way up (RFC 8659 §3), and whose it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caa {
    owner: String,
    properties: Vec<Property>,
}

impl Names {
    /// The CAA records that apply to `name`.
    pub(crate) async fn caa(&self, name: &str) -> Result<Caa, String> {
        let mut at = name;
        loop {
            let records = self.records(at, RecordType::CAA).await?;
            let properties: Vec<Property> = records.into_iter().filter_map(property).collect();
            if !properties.is_empty() {
                return Ok(Caa { owner: at.to_owned(), properties });
            }
            match at.split_once('.') {
                Some((_, above)) => at = above,
                None => return Ok(Caa::default()),
            }
        }
    }
}

fn property(data: RData) -> Option<Property> {
    let RData::CAA(caa) = data else { return None };
    Some(Property {
        critical: caa.issuer_critical,
        tag: caa.tag.to_ascii_lowercase(),
        value: String::from_utf8_lossy(&caa.value).into_owned(),
    })
}

impl Caa {
    /// Nothing if an authority that goes by `identities` may issue; otherwise why not, and what to do.
    pub(crate) fn allows(&self, identities: &[String], wildcard: bool) -> Result<(), String> {
        if identities.is_empty() || self.properties.is_empty() {
            return Ok(());
        }
        let known = ["issue", "issuewild", "iodef", "issuemail", "contactemail", "contactphone"];
        if let Some(unknown) = self.properties.iter().find(|p| p.critical && !known.contains(&p.tag.as_str()))
        {
            return Err(format!(
                "CAA {} has a critical property \"{}\", which forbids issuing to who does not know it: remove it",
                self.owner, unknown.tag
            ));
        }
        let has_wild = self.properties.iter().any(|p| p.tag == "issuewild");
        let tag = if wildcard && has_wild { "issuewild" } else { "issue" };
        let issuers: Vec<&str> = self
            .properties
            .iter()
            .filter(|p| p.tag == tag)
            .map(|p| p.value.split(';').next().unwrap_or_default().trim())
            .collect();
        let ours = |issuer: &&str| identities.iter().any(|own| own.eq_ignore_ascii_case(issuer));
        if issuers.is_empty() || issuers.iter().any(ours) {
            return Ok(());
        }
        let named: Vec<&str> = issuers.into_iter().filter(|issuer| !issuer.is_empty()).collect();
        let named = if named.is_empty() { "nobody".to_owned() } else { named.join(", ") };
        Err(format!(
            "CAA {} allows {named} only: add {} CAA 0 {tag} \"{}\"",
            self.owner, self.owner, identities[0]
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caa(properties: &[(&str, &str)]) -> Caa {
        let property = |(tag, value): &(&str, &str)| Property {
            critical: tag.ends_with('!'),
            tag: tag.trim_end_matches('!').to_owned(),
            value: (*value).to_owned(),
        };
        Caa { owner: "example.com".into(), properties: properties.iter().map(property).collect() }
    }

    #[test]
    fn who_may_issue_is_read_as_rfc_8659_says() {
        let own = ["ca.example.net".to_owned()];
        for (properties, wildcard, fine) in [
            (&[][..], false, true),
            (&[("issue", "ca.example.net")], false, true),
            (&[("issue", "CA.example.net; accounturi=https://x")], false, true),
            (&[("issue", "other.test")], false, false),
            (&[("issue", ";")], false, false),
            (&[("iodef", "mailto:a@example.com")], false, true),
            (&[("issuewild", ";")], false, true),
            (&[("issue", "ca.example.net"), ("issuewild", ";")], true, false),
            (&[("issue", ";"), ("issuewild", "ca.example.net")], true, true),
            (&[("issue", "ca.example.net")], true, true),
            (&[("issue", "ca.example.net"), ("tbs!", "x")], false, false),
            (&[("issue", "other.test"), ("issue", "ca.example.net")], false, true),
        ] {
            assert_eq!(caa(properties).allows(&own, wildcard).is_ok(), fine, "{properties:?} {wildcard}");
        }
        assert_eq!(
            caa(&[("issue", "other.test")]).allows(&own, false).unwrap_err(),
            "CAA example.com allows other.test only: add example.com CAA 0 issue \"ca.example.net\""
        );
        assert_eq!(caa(&[("issue", "other.test")]).allows(&[], false), Ok(()), "nobody told its names");
    }
}
