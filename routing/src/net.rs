//! Networks of addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A network in CIDR notation, or a single address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpNet {
    address: IpAddr,
    prefix_bits: u8,
}

/// A text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a network: write an address, or an address/prefix like 10.0.0.0/8")]
pub struct IpNetError(String);

impl IpNet {
    /// The network of an address and a prefix length; `None` if the length is too large.
    #[must_use]
    pub fn new(address: IpAddr, prefix_bits: u8) -> Option<Self> {
        let width = if address.is_ipv4() { 32 } else { 128 };
        (prefix_bits <= width).then_some(Self { address, prefix_bits })
    }

    /// Its address, as it was written.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// The length of its prefix in bits.
    #[must_use]
    pub const fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }

    /// Whether an address is in the network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(net), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits)).unwrap_or(0);
                (v4_bits(net) ^ v4_bits(address)) & mask == 0
            }
            (IpAddr::V6(net), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits)).unwrap_or(0);
                (v6_bits(net) ^ v6_bits(address)) & mask == 0
            }
            _ => false,
        }
    }
}

const fn v4_bits(address: Ipv4Addr) -> u32 {
    u32::from_be_bytes(address.octets())
}

const fn v6_bits(address: Ipv6Addr) -> u128 {
    u128::from_be_bytes(address.octets())
}

impl FromStr for IpNet {
    type Err = IpNetError;

    fn from_str(text: &str) -> Result<Self, IpNetError> {
        let wrong = || IpNetError(text.to_owned());
        let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let full = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = prefix.map_or(Ok(full), |prefix| prefix.parse().map_err(|_| wrong()))?;
        Self::new(address, prefix_bits).ok_or_else(wrong)
    }
}

impl std::fmt::Display for IpNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_holds_its_addresses_and_no_other() {
        for (net, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.1"),
            ("127.0.0.1", "127.0.0.1", "127.0.0.2"),
            ("0.0.0.0/0", "203.0.113.9", "::1"),
            ("2001:db8::/32", "2001:db8:1::1", "2001:db9::1"),
            ("::1", "::1", "::2"),
        ] {
            let net: IpNet = net.parse().expect("is a network");
            assert!(net.contains(inside.parse().expect("address")), "{net} {inside}");
            assert!(!net.contains(outside.parse().expect("address")), "{net} {outside}");
        }
        for text in ["10.0.0.0/33", "10.0.0", "::1/129", "x/8", "1.2.3.4/"] {
            assert!(text.parse::<IpNet>().is_err(), "{text}");
        }
    }
}
