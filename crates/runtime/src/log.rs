//! Logs: lines on standard error, as text for people or JSON for machines.
//!
//! Lines go through a bounded queue to a separate thread (`tracing-appender`), so that a terminal
//! or a pipe without a reader never blocks the server. Lines that do not fit into the queue are
//! dropped, and their number is logged.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write},
    panic,
    sync::{Arc, OnceLock},
};

use figment::value::Value;
use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, layer::SubscriberExt as _, registry::LookupSpan, reload,
    util::SubscriberInitExt as _,
};

use crate::{
    config::{self, Named},
    lifecycle::panic_message,
    trace::Traces,
};

/// The capacity of the queue, in lines.
const QUEUE_CAPACITY: usize = 4_096;

crate::section! {
    /// Logging, to standard error.
    pub struct Log {
        /// The logged events, by level and by module.
        filter: Filter = Filter("info".into()), variable: "RUST_LOG";
        /// The format of a line: for people or for machines.
        format: Named<Format> = Named(Format::Text);
    }
}

/// Valid directives for `tracing_subscriber`'s `EnvFilter`.
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

/// The format of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

impl qpq_domain::Choice for Format {
    const ALL: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

/// The running log. Dropping it writes the queued lines, within about a second, and ends the log.
pub struct LogGuard {
    set_filter: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
    worker: WorkerGuard,
}

/// Starts logging for the whole process, panics included, and tracing if `traces` are on. Must be
/// called once, before the first log event.
pub fn init(log: &Log, traces: &Traces) -> io::Result<LogGuard> {
    let (queue, worker) = queue(io::stderr(), QUEUE_CAPACITY);
    let filter = EnvFilter::new(&log.filter.0);
    // Without traces the filter is global, and a disabled event costs nothing. With traces it
    // applies to the log only.
    let (installed, set_filter): (_, Box<dyn Fn(_) -> _ + Send + Sync>) = match traces.layer() {
        None => {
            let (filter, handle) = reload::Layer::new(filter);
            let subscriber = Registry::default().with(filter).with(layer(log.format.0, queue));
            (subscriber.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
        Some(spans) => {
            let (filter, handle) = reload::Layer::new(filter);
            let lines = layer(log.format.0, queue).with_filter(filter);
            let subscriber = Registry::default().with(spans).with(lines);
            (subscriber.try_init(), Box::new(move |filter| handle.reload(filter)))
        }
    };
    installed.map_err(io::Error::other)?;
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(%place, message = panic_message(info.payload()), "panicked");
    }));
    Ok(LogGuard { set_filter, worker })
}

impl LogGuard {
    /// Changes the filter of the log.
    pub fn set_filter(&self, log: &Log) -> Result<(), reload::Error> {
        (self.set_filter)(EnvFilter::new(&log.filter.0))
    }
}

impl fmt::Debug for LogGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogGuard").field("worker", &self.worker).finish_non_exhaustive()
    }
}

/// Starts the thread that writes to `out`.
fn queue(out: impl Write + Send + 'static, capacity: usize) -> (NonBlocking, WorkerGuard) {
    let counter = Arc::default();
    let out = DropReporter { out, counter: Arc::clone(&counter), reported: 0 };
    let (queue, worker) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(capacity)
        .thread_name("log")
        .finish(out);
    counter.set(queue.error_counter()).expect("it is set once");
    (queue, worker)
}

/// A writer that reports the number of dropped lines after the next written line.
struct DropReporter<W> {
    out: W,
    /// Set after the queue has been created.
    counter: Arc<OnceLock<ErrorCounter>>,
    reported: usize,
}

impl<W: Write> Write for DropReporter<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.out.write_all(line)?;
        let dropped = self.counter.get().map_or(0, ErrorCounter::dropped_lines);
        let new = dropped - self.reported;
        if new > 0 {
            self.reported = dropped;
            writeln!(self.out, "{new} log lines were dropped: standard error is too slow")?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn layer<S>(format: Format, queue: NonBlocking) -> Box<dyn Layer<S> + Send + Sync>
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{SyncSender, sync_channel};

    use super::*;

    /// A writer that blocks until the test receives its line.
    struct Rendezvous(SyncSender<String>);

    impl Write for Rendezvous {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let line_text = String::from_utf8_lossy(line).into_owned();
            self.0.send(line_text).map_err(io::Error::other)?;
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_above_the_capacity_are_dropped_and_counted() {
        let (sender, lines) = sync_channel(0);
        let (mut queue, worker) = queue(Rendezvous(sender), 1);
        // The queue has one line and the blocked writer at most one more.
        let written = 10;
        for number in 0..written {
            // One write for each line, as the subscriber does.
            queue.write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        let reader = std::thread::Builder::new().spawn(move || lines.iter().collect::<String>());
        drop(queue);
        drop(worker);
        let log = reader.unwrap().join().unwrap();
        let kept = log.matches("line ").count();
        assert!((1..=2).contains(&kept), "{log}");
        let report = format!("{} log lines were dropped", written - kept);
        assert!(log.contains(&report), "{log}");
    }

    #[test]
    fn a_filter_that_does_not_parse_is_refused() {
        let read = |text: &str| <Filter as config::Leaf>::read(&Value::from(text));
        assert_eq!(read("warn,qpq_rpc=debug"), Some(Filter("warn,qpq_rpc=debug".into())));
        assert_eq!(read("qpq_rpc=loud"), None);
    }
}
