//! UDP sockets with buffers for a burst of packets.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Once,
};

use socket2::{Domain, Protocol, Socket, Type};

/// The size of a socket's buffers. The kernel drops packets that do not fit. The default of the
/// kernel, about 200 KiB, is full after a few milliseconds on a busy edge.
const BUFFER: usize = 4 * 1024 * 1024;

/// Maximum attempts to find a port that is free for IPv4 and IPv6, if the configuration allows any
/// port.
const MAX_ATTEMPTS: usize = 16;

/// Binds a server's sockets.
///
/// `[::]` listens on IPv4 too, with a separate socket: quinn forgets its path estimates whenever a
/// v4-mapped client rebinds.
pub(crate) fn bind_all(
    listen: &[SocketAddr],
) -> Result<Vec<(SocketAddr, UdpSocket)>, (SocketAddr, io::Error)> {
    let mut bound: Vec<(SocketAddr, UdpSocket)> = Vec::new();
    for &addr in listen {
        if !bound.iter().any(|(other, _)| *other == addr) {
            let serves_both = addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            if serves_both && !listen.contains(&ipv4_of(addr.port())) {
                bound.extend(bind_both(addr)?);
            } else {
                bound.push(bind(addr).map_err(|error| (addr, error))?);
            }
        }
    }
    Ok(bound)
}

fn ipv4_of(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

/// Binds `[::]` and the same port of `0.0.0.0`.
fn bind_both(addr: SocketAddr) -> Result<[(SocketAddr, UdpSocket); 2], (SocketAddr, io::Error)> {
    let mut attempt = 1;
    loop {
        let v6 = bind(addr).map_err(|error| (addr, error))?;
        let v4 = ipv4_of(v6.0.port());
        match bind(v4) {
            Ok(v4) => return Ok([v6, v4]),
            Err(error) if addr.port() == 0 && attempt < MAX_ATTEMPTS => {
                tracing::debug!(%error, "the port is not free for IPv4, trying another");
                attempt += 1;
            }
            Err(error) => return Err((v4, error)),
        }
    }
}

fn bind(addr: SocketAddr) -> io::Result<(SocketAddr, UdpSocket)> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_recv_buffer_size(BUFFER)?;
    socket.set_send_buffer_size(BUFFER)?;
    warn_if_capped(&socket)?;
    socket.bind(&addr.into())?;
    let socket = UdpSocket::from(socket);
    Ok((socket.local_addr()?, socket))
}

/// Warns if the kernel has capped the buffers, which is not an error.
fn warn_if_capped(socket: &Socket) -> io::Result<()> {
    static ONCE: Once = Once::new();
    let (receive, send) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
    if receive < BUFFER || send < BUFFER {
        ONCE.call_once(|| {
            tracing::warn!(
                wanted = BUFFER,
                receive,
                send,
                "UDP buffers are capped by the kernel: raise net.core.rmem_max and net.core.wmem_max"
            );
        });
    }
    Ok(())
}
