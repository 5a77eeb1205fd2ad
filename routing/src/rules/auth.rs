//! Who may ask: accounts with passwords, or another server that is asked.

use std::fmt;
use std::sync::Arc;

/// A password asked of every request (RFC 7617).
#[derive(Clone, PartialEq, Eq)]
pub struct BasicAuth {
    /// What the password is for, as browsers show it.
    pub realm: Arc<str>,
    /// Names with the hashes of their passwords, see [`PasswordHash`].
    pub users: Vec<(Arc<str>, Arc<str>)>,
    /// Whether `Authorization` goes on to the origin.
    pub forward: bool,
}

impl fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.users.iter().map(|(name, _)| name).collect();
        f.debug_struct("BasicAuth")
            .field("realm", &self.realm)
            .field("users", &names)
            .field("forward", &self.forward)
            .finish_non_exhaustive()
    }
}

/// Another server that decides whether a request goes on, asked on plain HTTP/1.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardAuth {
    /// Its host or address with a port.
    pub authority: Arc<str>,
    /// The path and query that it is asked for.
    pub path: Arc<str>,
    /// Fields of its answer that the request goes on with; the client's own of these names do not.
    pub copy_headers: Vec<Arc<str>>,
    /// Longest time for an answer.
    pub timeout_ms: u32,
}

/// A stored password, read: argon2id in the form of the PHC (`$argon2id$v=19$m=…,t=…,p=…$salt$hash`), or bcrypt
/// (`$2b$12$…`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum PasswordHash<'a> {
    /// RFC 9106.
    Argon2id {
        /// Memory.
        memory_kib: u32,
        /// Passes over it.
        passes: u32,
        /// Lanes of it.
        lanes: u32,
        /// In base64 without padding.
        salt: &'a str,
        /// In base64 without padding.
        hash: &'a str,
    },
    /// The whole text.
    Bcrypt(&'a str),
}

/// Why a text is no password hash that an edge would verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PasswordHashError {
    /// It is none, or of a kind that is not known.
    #[error("it is no argon2id or bcrypt hash")]
    Unknown,
    /// To verify it costs more than a stranger may have an edge spend.
    #[error("it costs too much: at most 64 MiB and 10 passes of argon2id, or cost 14 of bcrypt")]
    TooDear,
}

impl<'a> PasswordHash<'a> {
    /// Most memory of argon2id. A stranger's guess costs as much.
    pub const MAX_MEMORY_KIB: u32 = 64 * 1024;
    /// Most passes of argon2id.
    pub const MAX_PASSES: u32 = 10;
    /// Most lanes of argon2id.
    pub const MAX_LANES: u32 = 16;
    /// Highest cost of bcrypt.
    pub const MAX_BCRYPT_COST: u32 = 14;

    /// Reads a stored password.
    ///
    /// # Errors
    /// [`PasswordHashError`].
    pub fn parse(text: &'a str) -> Result<Self, PasswordHashError> {
        if text.starts_with("$2") {
            return Self::bcrypt(text);
        }
        let parts: Vec<&str> = text.split('$').collect();
        let ["", "argon2id", "v=19", costs, salt, hash] = parts[..] else {
            return Err(PasswordHashError::Unknown);
        };
        let costs: Vec<&str> = costs.split(',').collect();
        let [m, t, p] = costs[..] else { return Err(PasswordHashError::Unknown) };
        let number = |text: &str, name: &str| {
            text.strip_prefix(name)
                .and_then(|digits| digits.parse::<u32>().ok())
                .ok_or(PasswordHashError::Unknown)
        };
        let (memory_kib, passes, lanes) = (number(m, "m=")?, number(t, "t=")?, number(p, "p=")?);
        let is_base64 = |text: &str, bytes: std::ops::RangeInclusive<usize>| {
            let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
            text.bytes().all(fine) && text.len() % 4 != 1 && bytes.contains(&(text.len() * 3 / 4))
        };
        if !is_base64(salt, 8..=48) || !is_base64(hash, 16..=64) || passes == 0 || lanes == 0 {
            return Err(PasswordHashError::Unknown);
        }
        if memory_kib > Self::MAX_MEMORY_KIB || passes > Self::MAX_PASSES || lanes > Self::MAX_LANES {
            return Err(PasswordHashError::TooDear);
        }
        // RFC 9106 §3.1.
        if memory_kib < 8 * lanes {
            return Err(PasswordHashError::Unknown);
        }
        Ok(Self::Argon2id { memory_kib, passes, lanes, salt, hash })
    }

    fn bcrypt(text: &'a str) -> Result<Self, PasswordHashError> {
        const HASH_BYTES: usize = 53;
        let parts: Vec<&str> = text.split('$').collect();
        let ["", "2a" | "2b" | "2y", cost, hash] = parts[..] else { return Err(PasswordHashError::Unknown) };
        let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'/';
        let cost = Some(cost).filter(|cost| cost.len() == 2).and_then(|cost| cost.parse::<u32>().ok());
        match cost {
            Some(cost) if cost >= 4 && hash.len() == HASH_BYTES && hash.bytes().all(fine) => {
                if cost > Self::MAX_BCRYPT_COST {
                    Err(PasswordHashError::TooDear)
                } else {
                    Ok(Self::Bcrypt(text))
                }
            }
            _ => Err(PasswordHashError::Unknown),
        }
    }
}

impl fmt::Debug for PasswordHash<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Argon2id { .. } => "Argon2id(…)",
            Self::Bcrypt(_) => "Bcrypt(…)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: &str = "c29tZXNhbHRzYWx0";
    const HASH: &str = "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI";

    fn argon(costs: &str) -> String {
        format!("$argon2id$v=19${costs}${SALT}${HASH}")
    }

    #[test]
    fn hashes_of_two_kinds_are_read_and_what_costs_too_much_is_not() {
        let sound = argon("m=19456,t=2,p=1");
        let read = PasswordHash::parse(&sound).expect("is sound");
        assert_eq!(
            read,
            PasswordHash::Argon2id { memory_kib: 19_456, passes: 2, lanes: 1, salt: SALT, hash: HASH }
        );
        let bcrypt = |cost: &str| format!("$2b${cost}${}", "a".repeat(53));
        assert!(PasswordHash::parse(&bcrypt("12")).is_ok());
        for dear in
            [argon("m=65537,t=2,p=1"), argon("m=19456,t=11,p=1"), argon("m=19456,t=1,p=17"), bcrypt("15")]
        {
            assert_eq!(PasswordHash::parse(&dear), Err(PasswordHashError::TooDear), "{dear}");
        }
        for bad in [
            "",
            "hunter2",
            "$1$abc$def",
            "$apr1$abc$def",
            "$argon2i$v=19$m=8,t=1,p=1$a$b",
            &argon("m=19456,t=2"),
            &argon("t=2,m=19456,p=1"),
            &argon("m=7,t=1,p=1"),
            &argon("m=19456,t=0,p=1"),
            &bcrypt("03"),
            &bcrypt("1"),
            &format!("$2b$12${}", "a".repeat(52)),
            &format!("$2x$12${}", "a".repeat(53)),
            &format!("$argon2id$v=19$m=19456,t=2,p=1${SALT}$short"),
            &format!("{sound}$more"),
        ] {
            assert_eq!(PasswordHash::parse(bad), Err(PasswordHashError::Unknown), "{bad}");
        }
    }

    #[test]
    fn hashes_are_not_shown() {
        let auth = BasicAuth {
            realm: "r".into(),
            users: vec![("alice".into(), argon("m=8,t=1,p=1").into())],
            forward: false,
        };
        let shown = format!("{auth:?} {:?}", PasswordHash::parse(&auth.users[0].1));
        assert!(shown.contains("alice") && !shown.contains(SALT) && !shown.contains(HASH), "{shown}");
    }
}
