//! Any bytes are event frames or an error, however they are cut: the first byte says into what
//! pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qpq_wire::EventDecoder;

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, stream)) = bytes.split_first() else { return };
    assert_eq!(decode(stream, usize::from(*piece).max(1)), decode(stream, stream.len().max(1)));
});

/// The events' bytes, encoded again, and whether the stream then went wrong.
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
