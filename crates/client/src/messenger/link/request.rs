//! The request of a new device.

use prost::Message as _;
use qpq_domain::{DeviceId, DeviceKey, UnixMillis};
use qpq_mls::Device;
use sha2::{Digest as _, Sha256};

use super::{LINK_REQUEST_LIFETIME, LinkCode};
use crate::messenger::devices::check_name;

/// The first bytes of a message that is a request.
pub(super) const PREFIX: &[u8] = b"QPQL";
/// The label of the signature.
const LABEL: &[u8] = b"qpq/link-request/1";
const VERSION: u32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
struct Encoded {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(bytes = "vec", tag = "2")]
    device_id: Vec<u8>,
    #[prost(string, tag = "3")]
    device_name: String,
    #[prost(bytes = "vec", tag = "4")]
    device_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    hpke_key: Vec<u8>,
    /// Unix milliseconds, by the clock of the new device.
    #[prost(uint64, tag = "6")]
    created_at: u64,
    #[prost(bytes = "vec", tag = "7")]
    signature: Vec<u8>,
}

impl Encoded {
    /// Returns the label, followed by fields 1 to 6.
    fn to_be_signed(&self) -> Vec<u8> {
        let unsigned = Self { signature: Vec::new(), ..self.clone() };
        [LABEL, &unsigned.encode_to_vec()].concat()
    }
}

/// A request whose signature is valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::messenger) struct Request {
    pub(super) device: DeviceId,
    pub(super) name: String,
    pub(super) key: DeviceKey,
    /// The key to which the grant is sealed.
    pub(super) hpke_key: [u8; 32],
    pub(super) created_at: UnixMillis,
    bytes: Vec<u8>,
}

impl Request {
    /// Creates the request of a device, signed with the device's key.
    pub(super) fn create(device: &Device, hpke_key: &[u8; 32], created_at: UnixMillis) -> Self {
        let mut encoded = Encoded {
            version: VERSION,
            device_id: device.id().as_bytes().to_vec(),
            device_name: device.name().to_owned(),
            device_key: device.public().as_bytes().to_vec(),
            hpke_key: hpke_key.to_vec(),
            created_at: created_at.0,
            signature: Vec::new(),
        };
        encoded.signature = device.sign(&encoded.to_be_signed()).to_vec();
        Self {
            device: device.id(),
            name: device.name().to_owned(),
            key: device.public(),
            hpke_key: *hpke_key,
            created_at,
            bytes: encoded.encode_to_vec(),
        }
    }

    /// Reads a request. `None` unless it is of this version, encoded canonically and signed by its
    /// device key.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let encoded = Encoded::decode(bytes).ok()?;
        if encoded.version != VERSION || encoded.encode_to_vec() != bytes {
            return None;
        }
        check_name(&encoded.device_name).ok()?;
        let key = DeviceKey::try_from(&encoded.device_key[..]).ok()?;
        let signature = encoded.signature[..].try_into().ok()?;
        key.verify(&encoded.to_be_signed(), signature).ok()?;
        Some(Self {
            device: DeviceId::try_from(&encoded.device_id[..]).ok()?,
            name: encoded.device_name,
            key,
            hpke_key: encoded.hpke_key.try_into().ok()?,
            created_at: UnixMillis(encoded.created_at),
            bytes: bytes.to_vec(),
        })
    }

    /// Returns the serialized request.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the message that is sent: the prefix, followed by the serialized request.
    pub(super) fn message(&self) -> Vec<u8> {
        [PREFIX, &self.bytes].concat()
    }

    /// Returns the SHA-256 of the serialized request.
    pub(super) fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.bytes).into()
    }

    /// Derives the code. Takes some 200 ms of one core and 64 MiB.
    pub(super) fn code(&self) -> LinkCode {
        LinkCode::of(&self.bytes)
    }

    /// Returns whether the request was created within its lifetime before or after `now`. The
    /// clocks of the two devices may differ.
    pub(super) fn is_recent(&self, now: UnixMillis) -> bool {
        is_recent(self.created_at, now)
    }
}

/// Returns whether two times differ by at most the lifetime of a request.
pub(super) fn is_recent(at: UnixMillis, now: UnixMillis) -> bool {
    u128::from(at.0.abs_diff(now.0)) <= LINK_REQUEST_LIFETIME.as_millis()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const CREATED_AT: UnixMillis = UnixMillis(1_800_000_000_000);

    fn request() -> Request {
        let device = Device::new(DeviceId::new([1; 16]), "laptop", &[2; 32], [0; 64]);
        Request::create(&device, &[3; 32], CREATED_AT)
    }

    #[test]
    fn a_request_has_the_documented_bytes_and_code() {
        let request = request();
        assert_eq!(hex::encode(request.bytes()), REQUEST);
        assert_eq!(request.code().to_string(), CODE);
        assert_eq!(Request::read(request.bytes()), Some(request));
    }

    /// The request of a device with the id 01…01, the name "laptop", the seed 02…02 and the HPKE
    /// key 03…03, created at 1 800 000 000 000.
    const REQUEST: &str = concat!(
        "08011210010101010101010101010101010101011a066c6170746f7022208139",
        "770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b3942a20",
        "0303030303030303030303030303030303030303030303030303030303030303",
        "3080a0f1c2b1343a401c1351c07f16bfa0ca84b93933d90e06ca82d811338d94",
        "d7699dd8a58d9d0989dc29361e9b94c5af431ca6d11b763a980ed1301e452c8a",
        "592eb009ec6a5ebe06",
    );
    const CODE: &str = "7QSZH-0GTZS";

    #[test]
    fn a_request_that_was_changed_anywhere_is_refused() {
        let bytes = request().bytes().to_vec();
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            assert_eq!(Request::read(&changed), None, "byte {place}");
        }
        // A field that this version does not know would be in the code and not in the signature.
        assert_eq!(Request::read(&[&bytes[..], &[0x40, 1]].concat()), None);
        assert_eq!(Request::read(&bytes[..bytes.len() - 1]), None);
        assert_eq!(Request::read(b""), None);
    }

    #[test]
    fn a_request_is_recent_for_its_lifetime_by_either_clock() {
        let request = request();
        let margin = LINK_REQUEST_LIFETIME;
        for now in [CREATED_AT, CREATED_AT.plus(margin), CREATED_AT.minus(margin)] {
            assert!(request.is_recent(now));
        }
        let second = Duration::from_secs(1);
        assert!(!request.is_recent(CREATED_AT.plus(margin + second)));
        assert!(!request.is_recent(CREATED_AT.minus(margin + second)));
    }
}
