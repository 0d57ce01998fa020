//! `qpq send --file` and `qpq save`: sends a file, saves a received one.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use qpq_client::{Event, Existing, Messenger, NewFile, SharedFile};
use serde::Serialize;

use super::{message, opened};
use crate::{
    args::Recipient,
    compose::Context,
    entry,
    error::{CliError, Exit},
    output::{Report, Style},
    text,
};

/// The number of entries of a conversation that are searched for a file.
const SEARCHED: usize = 100_000;

pub(crate) async fn send(context: &Context, to: &Recipient, path: &Path) -> Result<(), CliError> {
    let file = read(path).await?;
    opened::to_send(context, async |messenger, unreachable| {
        let (conversation, name) = message::resolve(messenger, to, unreachable.as_ref()).await?;
        if let Some(why) = unreachable {
            return Err(why);
        }
        let bar = context.progress.bytes("sending");
        let set = |done, total| bar.set(done, total);
        let sent = Box::pin(messenger.send_file(conversation, file, set)).await;
        drop(bar);
        message::report(context, messenger, conversation, &name, sent?).await
    })
    .await
    .map_err(unsent)
}

/// Adds to an error that the same command continues an interrupted upload.
fn unsent(mut error: CliError) -> CliError {
    if error.exit == Exit::Unreachable {
        error.message += "; the file is not sent. Run the same command again to continue";
    }
    error
}

/// Reads a file, with its name and type.
async fn read(path: &Path) -> Result<NewFile, CliError> {
    let cannot = |error: &io::Error| CliError::io(path.display(), error);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.filter(|name| name.len() <= SharedFile::MAX_NAME).ok_or_else(|| {
        CliError::usage(format_args!("{} has no name of at most 255 bytes", path.display()))
    })?;
    let content = tokio::fs::read(path).await.map_err(|error| cannot(&error))?;
    let (mime, picture) = kind(&name, &content);
    Ok(NewFile { name, mime: mime.to_owned(), picture, content })
}

#[derive(Debug, Serialize)]
struct Saved<'a> {
    event: &'static str,
    path: &'a str,
    size: u64,
}

impl Report for Saved<'_> {
    fn human(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let saved = format_args!("Saved {} ({}).", text::line(self.path), entry::size(self.size));
        writeln!(out, "{}", style.dim(saved))
    }
}

pub(crate) async fn save(
    context: &Context,
    from: &Recipient,
    number: u32,
    to: Option<PathBuf>,
    existing: Existing,
) -> Result<(), CliError> {
    opened::with_news(context, async |messenger| {
        let file = find(messenger, from, number).await?;
        let path = place(to, &file.name);
        let bar = context.progress.bytes("saving");
        let set = |done, total| bar.set(done, total);
        let saved = Box::pin(messenger.save_file(&file, &path, existing, set)).await;
        drop(bar);
        saved?;
        context.output.report(&Saved {
            event: "saved",
            path: &path.to_string_lossy(),
            size: file.size,
        })
    })
    .await
}

/// Returns the file with this number in a conversation, counted from the newest.
async fn find(
    messenger: &Messenger,
    from: &Recipient,
    number: u32,
) -> Result<SharedFile, CliError> {
    let (conversation, name) = message::resolve(messenger, from, None).await?;
    let entries = messenger.history(conversation, SEARCHED).await?;
    let files = entries.into_iter().rev().filter_map(|entry| match entry.event {
        Event::Sent { file, .. } | Event::Received { file, .. } => file,
        _ => None,
    });
    let files: Vec<_> = files.take(number as usize).collect();
    let count = files.len();
    files.into_iter().nth(number as usize - 1).ok_or_else(|| {
        let name = text::line(&name);
        CliError::new(
            Exit::Failure,
            "client.no_such_file",
            match count {
                0 => format!("the conversation with {name} has no files"),
                _ => format!("the conversation with {name} has {count} files"),
            },
        )
    })
}

/// Returns the path to write to. A name from a sender never leads to another directory.
fn place(to: Option<PathBuf>, name: &str) -> PathBuf {
    match to {
        Some(to) if to.is_dir() => to.join(safe(name)),
        Some(to) => to,
        None => safe(name).into(),
    }
}

/// Returns a name without directories, control characters and leading dots, which would hide the
/// file.
fn safe(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let safe: String = last.chars().filter(|char| !char.is_control()).collect();
    match safe.trim_start_matches('.').trim() {
        "" => "file".to_owned(),
        safe => safe.to_owned(),
    }
}

/// Returns the MIME type of a file, and the size of a picture, by the content or else the name.
fn kind(name: &str, content: &[u8]) -> (&'static str, Option<(u32, u32)>) {
    if let Some(found) = png(content).or_else(|| gif(content)).or_else(|| jpeg(content)) {
        return found;
    }
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    let mime = match extension.as_deref() {
        Some("txt" | "md" | "log") => "text/plain",
        Some("html" | "htm") => "text/html",
        Some("csv") => "text/csv",
        Some("json") => "application/json",
        Some("pdf") => "application/pdf",
        Some("zip") => "application/zip",
        Some("gz" | "tgz") => "application/gzip",
        Some("png") => "image/png",
        Some("jpg" | "jpeg") => "image/jpeg",
        Some("webp") => "image/webp",
        Some("svg") => "image/svg+xml",
        Some("mp3") => "audio/mpeg",
        Some("ogg" | "opus") => "audio/ogg",
        Some("mp4") => "video/mp4",
        Some("webm") => "video/webm",
        _ => "application/octet-stream",
    };
    (mime, None)
}

type Kind = (&'static str, Option<(u32, u32)>);

fn png(content: &[u8]) -> Option<Kind> {
    let header = content.strip_prefix(b"\x89PNG\r\n\x1a\n")?.get(8..16)?;
    let number = |bytes: &[u8]| Some(u32::from_be_bytes(bytes.try_into().ok()?));
    Some(("image/png", Some((number(&header[..4])?, number(&header[4..])?))))
}

fn gif(content: &[u8]) -> Option<Kind> {
    let rest = content.strip_prefix(b"GIF87a").or_else(|| content.strip_prefix(b"GIF89a"))?;
    let &[a, b, c, d] = rest.first_chunk()?;
    let (width, height) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    Some(("image/gif", Some((width.into(), height.into()))))
}

/// Finds the size of a JPEG in the header of its frame, after other segments.
fn jpeg(content: &[u8]) -> Option<Kind> {
    let mut rest = content.strip_prefix(b"\xff\xd8")?;
    while let Some(&[0xff, marker, high, low]) = rest.first_chunk() {
        let length = usize::from(u16::from_be_bytes([high, low]));
        let is_frame = (0xc0..=0xcf).contains(&marker) && ![0xc4, 0xc8, 0xcc].contains(&marker);
        if is_frame && let Some(&[a, b, c, d]) = rest.get(5..9).and_then(|size| size.first_chunk())
        {
            let (height, width) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            return Some(("image/jpeg", Some((width.into(), height.into()))));
        }
        match rest.get(2 + length..) {
            Some(next) if length >= 2 => rest = next,
            _ => break,
        }
    }
    Some(("image/jpeg", None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_recognised_with_their_sizes() {
        let png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x00\x00\x02\x80\x00\x00\x01\xe0\x08";
        assert_eq!(kind("a", png), ("image/png", Some((640, 480))));
        assert_eq!(kind("a", b"GIF89a\x80\x02\xe0\x01more"), ("image/gif", Some((640, 480))));
        let jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08\x01\xe0\x02\x80\x03";
        assert_eq!(kind("a", jpeg), ("image/jpeg", Some((640, 480))));
        for cut in 0..jpeg.len() {
            kind("a", &jpeg[..cut]);
        }
        assert_eq!(kind("a.TXT", b"hello"), ("text/plain", None));
        assert_eq!(kind("a", b""), ("application/octet-stream", None));
    }

    #[test]
    fn the_name_of_a_sender_stays_in_the_directory() {
        for (name, expected) in [
            ("photo.jpg", "photo.jpg"),
            ("/etc/passwd", "passwd"),
            ("../../x", "x"),
            ("a\\b.txt", "b.txt"),
            (".bashrc", "bashrc"),
            ("a\nb\0", "ab"),
            ("..", "file"),
            ("dir/", "file"),
            ("", "file"),
        ] {
            assert_eq!(safe(name), expected, "{name:?}");
        }
        let directory = std::env::temp_dir();
        assert_eq!(place(Some(directory.clone()), "../x"), directory.join("x"));
        assert_eq!(place(Some("new".into()), "x"), Path::new("new"));
    }
}
