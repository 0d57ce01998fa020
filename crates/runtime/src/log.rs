//! Logs: lines on standard error, as text for people or JSON for machines.
//!
//! Lines go through a bounded queue to a thread of their own, so that a terminal or a pipe that
//! nobody reads never stops the server; what does not fit is dropped and counted.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
    panic,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use figment::value::Value;
use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt::MakeWriter, layer::SubscriberExt as _, registry::LookupSpan,
    reload, util::SubscriberInitExt as _,
};

use crate::{config, lifecycle::panic_message, trace::Traces};

/// Lines that wait for the writing thread.
const QUEUE: usize = 4_096;

crate::section! {
    /// Logging, to standard error.
    pub struct Log {
        /// What is logged, by level and by module.
        filter: Filter = Filter("info".into()), variable: "RUST_LOG";
        /// How a line looks: for people or for machines.
        format: Format = Format::Text;
    }
}

/// Directives of `tracing_subscriber`'s `EnvFilter`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

impl config::Leaf for Filter {
    fn kind() -> String {
        "log directives".into()
    }

    fn allowed() -> String {
        "log directives, as in info or warn,qpq_rpc=debug".into()
    }

    fn read(value: &Value) -> Option<Self> {
        let given = <String as config::Leaf>::read(value)?;
        EnvFilter::try_new(&given).is_ok().then_some(Self(given))
    }

    fn show(&self) -> Option<String> {
        config::Leaf::show(&self.0)
    }
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

impl config::Choice for Format {
    const ALL: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

/// Keeps the log going; dropping it writes what is queued and ends it.
pub struct LogGuard {
    set_filter: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
    lines: SyncSender<Line>,
    writer: Option<thread::JoinHandle<()>>,
}

enum Line {
    Text(Vec<u8>),
    /// Nothing comes after this: the writer ends.
    End,
}

/// Starts logging for the whole process, panics included, and tracing where `traces` are wanted.
/// Call it once, before anything logs.
pub fn init(log: &Log, traces: &Traces) -> io::Result<LogGuard> {
    let (lines, queued) = sync_channel(QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    let writer = thread::Builder::new().name("log".into()).spawn({
        let dropped = dropped.clone();
        move || write_lines(&queued, &dropped)
    })?;
    let (filter, queue) = (EnvFilter::new(&log.filter.0), Queue { lines: lines.clone(), dropped });
    // Alone, the filter is everybody's, and what it refuses costs nothing. Beside traces it is the
    // log's own.
    let (installed, set_filter): (_, Box<dyn Fn(_) -> _ + Send + Sync>) = match traces.layer() {
        None => {
            let (filter, handle) = reload::Layer::new(filter);
            let subscriber = Registry::default().with(filter).with(layer(log.format, queue));
            (subscriber.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
        Some(spans) => {
            let (filter, handle) = reload::Layer::new(filter);
            let lines = layer(log.format, queue).with_filter(filter);
            let subscriber = Registry::default().with(spans).with(lines);
            (subscriber.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
    };
    installed.map_err(io::Error::other)?;
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%place, message = panic_message(info.payload()), "panicked");
    }));
    Ok(LogGuard { set_filter, lines, writer: Some(writer) })
}

impl LogGuard {
    /// Changes what is logged from now on.
    pub fn set_filter(&self, log: &Log) -> Result<(), reload::Error> {
        (self.set_filter)(EnvFilter::new(&log.filter.0))
    }
}

impl fmt::Debug for LogGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogGuard").field("writer", &self.writer).finish_non_exhaustive()
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        let _ = self.lines.send(Line::End);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn layer<S>(format: Format, queue: Queue) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(format == Format::Text && io::stderr().is_terminal())
        .with_writer(queue);
    match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(true).boxed(),
    }
}

fn write_lines(queued: &Receiver<Line>, dropped: &AtomicU64) {
    let mut out = io::stderr();
    while let Ok(Line::Text(line)) = queued.recv() {
        let _ = out.write_all(&line);
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(out, "{lost} log lines were dropped: standard error is too slow");
        }
    }
}

/// Makes a writer for each event.
struct Queue {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

/// Collects one event and queues it when dropped.
struct Event<'a> {
    queue: &'a Queue,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event { queue: self, text: Vec::new() }
    }
}

impl io::Write for Event<'_> {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        let line = Line::Text(std::mem::take(&mut self.text));
        if self.queue.lines.try_send(line).is_err() {
            self.queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_lines_and_counts_them() {
        let (lines, queued) = sync_channel(1);
        let queue = Queue { lines, dropped: Arc::default() };
        for text in ["first", "second", "third"] {
            write!(queue.make_writer(), "{text}").unwrap();
        }
        assert_eq!(queue.dropped.load(Ordering::Relaxed), 2);
        assert!(matches!(queued.try_recv(), Ok(Line::Text(text)) if text == b"first"));
        assert!(queued.try_recv().is_err());
    }

    #[test]
    fn a_filter_that_does_not_parse_is_refused() {
        let read = |text: &str| <Filter as config::Leaf>::read(&Value::from(text));
        assert_eq!(read("warn,qpq_rpc=debug"), Some(Filter("warn,qpq_rpc=debug".into())));
        assert_eq!(read("qpq_rpc=loud"), None);
    }
}
