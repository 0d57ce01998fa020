//! Arbitrary bytes decode to events or an error, and the result is the same for any size of the
//! pieces. The first byte of the input is that size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qpq_wire::EventDecoder;

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, stream)) = bytes.split_first() else { return };
    assert_eq!(decode(stream, usize::from(*piece).max(1)), decode(stream, stream.len().max(1)));
});

/// Returns the events, encoded again, and whether the stream ended with an error.
fn decode(stream: &[u8], piece: usize) -> (Vec<u8>, bool) {
    let mut decoder = EventDecoder::new();
    let mut seen = Vec::new();
    for bytes in stream.chunks(piece) {
        decoder.push(bytes);
        loop {
            match decoder.next_event() {
                Ok(Some(event)) => seen.extend(event.encode().expect("it came out of a frame")),
                Ok(None) => break,
                Err(_) => return (seen, true),
            }
        }
    }
    assert!(stream.starts_with(&seen));
    (seen, decoder.finish().is_err())
}
