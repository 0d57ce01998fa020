//! Arbitrary bytes decode to a response or an error, and a response encodes to the same bytes.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qpq_wire::Response;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(response) = Response::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(response.encode().expect("it came out of a frame"), bytes);
    }
});
