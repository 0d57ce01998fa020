//! Notifications for a service manager, as systemd expects them (sd_notify(3)): datagrams to the
//! Unix socket that the variable `NOTIFY_SOCKET` names.

use std::{
    ffi::OsStr,
    io,
    os::unix::{
        ffi::OsStrExt as _,
        net::{SocketAddr, UnixDatagram},
    },
    sync::Arc,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use tokio::time::{MissedTickBehavior, interval};

use crate::http::Probe;

/// The service manager that started the process, if there is one. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ServiceManager(Option<Arc<Socket>>);

#[derive(Debug)]
struct Socket {
    own: UnixDatagram,
    address: SocketAddr,
}

/// A state of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The process serves, after its start or after a reload.
    Ready,
    /// The process reloads its configuration.
    Reloading,
    /// The process ends.
    Stopping,
    /// The process is alive.
    Alive,
}

impl ServiceManager {
    /// Creates the connection to the socket at `address`, the value of `NOTIFY_SOCKET`. A path
    /// that begins with `@` is in the abstract namespace. Without an address, notifications do
    /// nothing.
    pub fn at(address: Option<&OsStr>) -> io::Result<Self> {
        let Some(address) = address.filter(|address| !address.is_empty()) else {
            return Ok(Self::default());
        };
        let address = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => in_abstract_namespace(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        let own = UnixDatagram::unbound()?;
        // A full queue must not stop the server.
        own.set_nonblocking(true)?;
        Ok(Self(Some(Arc::new(Socket { own, address }))))
    }

    /// Sends the state. A failure is logged, because the service manager acts on the absence of a
    /// notification.
    pub fn notify(&self, state: State) {
        let Some(socket) = &self.0 else { return };
        let sent = message(state)
            .and_then(|message| socket.own.send_to_addr(message.as_bytes(), &socket.address));
        if let Err(error) = sent {
            tracing::warn!(%error, ?state, "service manager not notified");
        }
    }

    /// Sends [`State::Alive`] at intervals while `live` passes. The service manager restarts the
    /// process when the notifications stop. Never completes.
    pub async fn keep_alive(self, every: Duration, live: Probe) {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if live.passes() {
                self.notify(State::Alive);
            }
        }
    }
}

/// Returns the interval for [`ServiceManager::keep_alive`]: half of the time after which the
/// service manager restarts the process. `None` without a watchdog, or if it is another process's.
///
/// The arguments are the values of `WATCHDOG_USEC` and `WATCHDOG_PID`.
pub fn watchdog_interval(micros: Option<&OsStr>, process: Option<&OsStr>) -> Option<Duration> {
    let number = |text: &OsStr| text.to_str()?.parse::<u64>().ok();
    if process.is_some_and(|id| number(id) != Some(std::process::id().into())) {
        return None;
    }
    let micros = number(micros?)?;
    (micros > 1).then(|| Duration::from_micros(micros / 2))
}

#[cfg(target_os = "linux")]
fn in_abstract_namespace(name: &[u8]) -> io::Result<SocketAddr> {
    use std::os::linux::net::SocketAddrExt as _;
    SocketAddr::from_abstract_name(name)
}

/// Only Linux has the namespace, and systemd.
#[cfg(not(target_os = "linux"))]
fn in_abstract_namespace(_: &[u8]) -> io::Result<SocketAddr> {
    Err(io::ErrorKind::Unsupported.into())
}

fn message(state: State) -> io::Result<String> {
    Ok(match state {
        State::Ready => "READY=1\n".into(),
        State::Reloading => {
            // Services of the type `notify-reload` must send the time.
            let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
            format!("RELOADING=1\nMONOTONIC_USEC={}\n", Duration::from(now).as_micros())
        }
        State::Stopping => "STOPPING=1\n".into(),
        State::Alive => "WATCHDOG=1\n".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).expect("a notification");
        String::from_utf8(buffer[..length].to_vec()).expect("text")
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn states_reach_a_socket_with_a_path_and_one_in_the_abstract_namespace() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let name = format!("qpq-test-{}", std::process::id());
        let hidden = in_abstract_namespace(name.as_bytes()).expect("a name");
        for (socket, address) in [
            (UnixDatagram::bind(&path), path.into_os_string()),
            (UnixDatagram::bind_addr(&hidden), format!("@{name}").into()),
        ] {
            let socket = socket.expect("a socket");
            let manager = ServiceManager::at(Some(&address)).expect("an address");
            for (state, expected) in [
                (State::Ready, "READY=1\n"),
                (State::Stopping, "STOPPING=1\n"),
                (State::Alive, "WATCHDOG=1\n"),
            ] {
                manager.notify(state);
                assert_eq!(receive(&socket), expected);
            }
            manager.notify(State::Reloading);
            let reloading = receive(&socket);
            let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("the time");
            assert!(micros.trim_end().parse::<u64>().is_ok_and(|micros| micros > 0), "{micros}");
        }
    }

    #[test]
    fn without_a_service_manager_notifications_do_nothing() {
        for address in [None, Some(OsStr::new(""))] {
            let manager = ServiceManager::at(address).expect("none");
            manager.notify(State::Ready);
        }
        let absent = ServiceManager::at(Some(OsStr::new("/nonexistent/notify"))).expect("a path");
        absent.notify(State::Ready);
    }

    #[test]
    fn the_watchdog_of_another_process_is_ignored() {
        let own = std::process::id().to_string();
        let interval = |micros: Option<&str>, process: Option<&str>| {
            watchdog_interval(micros.map(OsStr::new), process.map(OsStr::new))
        };
        let half = Some(Duration::from_secs(15));
        assert_eq!(interval(Some("30000000"), None), half);
        assert_eq!(interval(Some("30000000"), Some(&own)), half);
        assert_eq!(interval(Some("30000000"), Some("1")), None);
        for micros in [None, Some("0"), Some("soon")] {
            assert_eq!(interval(micros, None), None);
        }
    }
}
