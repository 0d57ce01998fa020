//! The setting with the addresses that the server listens on.

use std::{fmt, net::SocketAddr};

use qpq_runtime::config::{Leaf, Value};

/// One or more UDP addresses. `[::]` means all addresses of IPv6 and IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen(pub Vec<SocketAddr>);

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self(vec![address])
    }
}

impl From<([u8; 4], u16)> for Listen {
    fn from(address: ([u8; 4], u16)) -> Self {
        SocketAddr::from(address).into()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<_> = self.0.iter().map(SocketAddr::to_string).collect();
        f.write_str(&addresses.join(", "))
    }
}

impl Leaf for Listen {
    fn kind() -> String {
        "addresses".into()
    }

    fn allowed() -> String {
        "an address and port, as in 0.0.0.0:5001, [::]:5001 (IPv6 and IPv4) or \
         [fe80::1%eth0]:5001, or a list of them; an IPv6 address is in brackets"
            .into()
    }

    fn read(value: &Value) -> Option<Self> {
        let listed = Vec::<String>::read(value)?;
        let addresses: Vec<_> = listed.iter().map(|text| parse(text)).collect::<Option<_>>()?;
        (!addresses.is_empty()).then_some(Self(addresses))
    }

    fn show(&self) -> Option<String> {
        match &self.0[..] {
            [only] => Leaf::show(only),
            all => Leaf::show(&all.iter().map(SocketAddr::to_string).collect::<Vec<_>>()),
        }
    }
}

/// Parses an address and port. A zone id is the name of an interface or its number.
fn parse(text: &str) -> Option<SocketAddr> {
    let text = text.trim();
    let Some((address, rest)) = text.split_once('%') else { return text.parse().ok() };
    let (zone, port) = rest.split_once(']')?;
    let index = zone.parse().ok().or_else(|| interface_index(zone))?;
    match format!("{address}]{port}").parse().ok()? {
        SocketAddr::V6(mut address) => {
            address.set_scope_id(index);
            Some(address.into())
        }
        SocketAddr::V4(_) => None,
    }
}

/// Returns the number of the network interface `name` on Linux.
fn interface_index(name: &str) -> Option<u32> {
    let is_name = !name.is_empty() && !name.contains(['/', '.']);
    let path = is_name.then(|| format!("/sys/class/net/{name}/ifindex"))?;
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Vec<String>> {
        let Listen(addresses) = Listen::read(&Value::from(text))?;
        Some(addresses.iter().map(SocketAddr::to_string).collect())
    }

    #[test]
    fn one_address_or_a_list_is_read_and_shown() {
        assert_eq!(read("0.0.0.0:5001").unwrap(), ["0.0.0.0:5001"]);
        assert_eq!(read("[::]:5001").unwrap(), ["[::]:5001"]);
        assert_eq!(read("10.0.0.1:1, [::1]:2").unwrap(), ["10.0.0.1:1", "[::1]:2"]);
        let list = Value::from(vec!["10.0.0.1:1", "[::1]:2"]);
        let listen = Listen::read(&list).unwrap();
        assert_eq!(Leaf::show(&listen).unwrap(), "[\"10.0.0.1:1\", \"[::1]:2\"]");
        let one = Listen::from(SocketAddr::from(([127, 0, 0, 1], 7)));
        assert_eq!(Leaf::show(&one).unwrap(), "\"127.0.0.1:7\"");
    }

    #[test]
    fn a_zone_is_an_interface_by_name_or_number() {
        assert_eq!(read("[fe80::1%7]:5001").unwrap(), ["[fe80::1%7]:5001"]);
        let loopback = std::fs::read_to_string("/sys/class/net/lo/ifindex").unwrap();
        let expected = format!("[fe80::1%{}]:5001", loopback.trim());
        assert_eq!(read("[fe80::1%lo]:5001").unwrap(), [expected]);
        for wrong in
            ["[fe80::1%]:5001", "[fe80::1%no-such-if]:5001", "[fe80::1%lo:5001", "[::1%../lo]:1"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_ipv6_address_without_brackets_is_refused_with_an_example() {
        for wrong in ["::1:5001", "::", "2001:db8::1", "localhost:5001", "0.0.0.0", "5001", ""] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert!(Listen::allowed().contains("in brackets"));
    }
}
