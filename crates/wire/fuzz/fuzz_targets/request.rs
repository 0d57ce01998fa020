//! Any bytes are a request frame or an error, and a frame is exactly the bytes it came from.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use qpq_wire::Request;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(request.encode().expect("it came out of a frame"), bytes);
    }
});
