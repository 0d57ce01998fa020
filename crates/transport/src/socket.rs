//! UDP sockets with buffers that hold a burst.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Once,
};

use socket2::{Domain, Protocol, Socket, Type};

/// The kernel drops what does not fit; its default of about 200 KiB is a few milliseconds of a busy
/// edge.
const BUFFER: usize = 4 * 1024 * 1024;

/// Binds a server's socket. An IPv6 one takes no IPv4: quinn forgets its path estimates at each
/// rebinding of a v4-mapped client.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_recv_buffer_size(BUFFER)?;
    socket.set_send_buffer_size(BUFFER)?;
    warn_if_capped(&socket)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// The kernel caps what was asked for without an error.
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
