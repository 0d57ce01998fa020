//! Writes the seed corpus of the fuzz targets: `cargo run -p qpq-wire --example fuzz_corpus --
//! crates/wire/fuzz/corpus`.
//!
//! The seeds are frames that peers really send, and short invalid frames.

use std::{env, fs, io, path::Path};

use bytes::Bytes;
use qpq_wire::{
    EventFrame, EventHeader, MAX_PAYLOAD, Request, RequestHeader, Response, ResponseHeader,
};

fn main() -> io::Result<()> {
    let directory =
        env::args_os().nth(1).ok_or_else(|| io::Error::other("name the corpus directory"))?;
    let directory = Path::new(&directory);
    // Health without a payload, and an Enqueue with recipient (field 1, 32 bytes) and payload
    // (field 2).
    let enqueue: Bytes = [&[0x0a, 32][..], &[7; 32], &[0x12, 5], b"hello"].concat().into();
    let request =
        |method_id, request_id, payload| Request { method_id, request_id, payload }.encode();
    write(
        directory,
        "request",
        "health",
        &request(802, 1, Bytes::new()).map_err(io::Error::other)?,
    )?;
    let frame = request(200, 2, enqueue).map_err(io::Error::other)?;
    write(directory, "request", "enqueue", &frame)?;
    write(directory, "request", "truncated", &frame[..frame.len() - 1])?;
    write(directory, "request", "trailing", &[&frame[..], &[0]].concat())?;
    let header = RequestHeader { method_id: 200, request_id: 3, payload_len: MAX_PAYLOAD + 1 };
    write(directory, "request", "too_large", &header.encode())?;

    let response = |status, request_id, payload| Response { status, request_id, payload }.encode();
    write(
        directory,
        "response",
        "ok",
        &response(0, 2, vec![8, 1].into()).map_err(io::Error::other)?,
    )?;
    let detail: Bytes = [&[0x0a, 19][..], b"delivery.queue_full", &[0x18, 100]].concat().into();
    let frame = response(5, 2, detail).map_err(io::Error::other)?;
    write(directory, "response", "rate_limited", &frame)?;
    write(directory, "response", "truncated", &frame[..12])?;
    let header = ResponseHeader { status: 0, request_id: 3, payload_len: MAX_PAYLOAD + 1 };
    write(directory, "response", "too_large", &header.encode())?;

    let event = |event_type, payload| EventFrame { event_type, payload }.encode();
    let wake = event(1, vec![0x10, 9].into()).map_err(io::Error::other)?;
    let draining = event(4, vec![8, 0xb0, 0xea, 1].into()).map_err(io::Error::other)?;
    // The first byte of the target's input is the size of the pieces.
    let cut = |piece: u8, frames: &[&[u8]]| [&[piece][..], &frames.concat()].concat();
    write(directory, "event", "wake", &cut(1, &[&wake]))?;
    write(directory, "event", "two", &cut(3, &[&wake, &draining]))?;
    write(directory, "event", "truncated", &cut(5, &[&wake, &draining[..4]]))?;
    let header = EventHeader { event_type: 2, payload_len: MAX_PAYLOAD + 1 };
    write(directory, "event", "too_large", &cut(64, &[&wake, &header.encode()]))
}

fn write(directory: &Path, target: &str, name: &str, frame: &[u8]) -> io::Result<()> {
    let directory = directory.join(target);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), frame)
}
