//! Arbitrary bytes decode to a request or an error, and a request encodes to the same bytes.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qpq_wire::Request;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(request.encode().expect("it came out of a frame"), bytes);
    }
});
