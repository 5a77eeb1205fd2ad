//! A client's address as text, made once for a connection and without a formatter: for a client that sends one
//! request, a formatter is a large part of what the edge does for it.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};

use http::HeaderValue;

/// The longest address: `ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255`.
const MAX_ADDRESS_BYTES: usize = 45;

/// An address as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AddressText {
    bytes: [u8; MAX_ADDRESS_BYTES],
    length: u8,
}

impl AddressText {
    pub(crate) fn of(address: IpAddr) -> Self {
        let mut text = Self { bytes: [0; MAX_ADDRESS_BYTES], length: 0 };
        match address {
            IpAddr::V4(v4) => text.write_v4(v4),
            IpAddr::V6(v6) => {
                let mut room = &mut text.bytes[..];
                // There is room for every address.
                drop(write!(room, "{v6}"));
                let left = room.len();
                text.length = (MAX_ADDRESS_BYTES - left) as u8;
            }
        }
        text
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    pub(crate) fn to_value(self) -> HeaderValue {
        HeaderValue::from_bytes(self.as_bytes()).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    }

    fn write_v4(&mut self, address: Ipv4Addr) {
        for (place, octet) in address.octets().into_iter().enumerate() {
            if place > 0 {
                self.push(b'.');
            }
            if octet >= 100 {
                self.push(b'0' + octet / 100);
            }
            if octet >= 10 {
                self.push(b'0' + octet / 10 % 10);
            }
            self.push(b'0' + octet % 10);
        }
    }

    fn push(&mut self, byte: u8) {
        self.bytes[usize::from(self.length)] = byte;
        self.length += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(address: IpAddr) -> String {
        String::from_utf8(AddressText::of(address).as_bytes().to_vec()).expect("text")
    }

    #[test]
    fn every_octet_is_written_as_the_standard_library_writes_it() {
        for octet in 0..=255_u8 {
            let address = IpAddr::from([octet, 0, 255 - octet, octet]);
            assert_eq!(text(address), address.to_string());
        }
    }

    #[test]
    fn the_longest_addresses_of_both_kinds_have_room() {
        let mapped = "::ffff:255.255.255.255";
        let full = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        for address in ["255.255.255.255", "0.0.0.0", "::1", "::", full, mapped, "2001:db8::1"] {
            let address: IpAddr = address.parse().expect("address");
            assert_eq!(text(address), address.to_string());
            assert_eq!(AddressText::of(address).to_value(), *address.to_string());
        }
    }
}
