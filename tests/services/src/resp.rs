//! A Redis client of a few lines: one connection, one command at a time. For tests that look at or
//! into a Redis directly; it shares nothing with the client that the store uses.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

/// What Redis answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Nil,
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Array(Vec<Reply>),
}

impl Reply {
    /// The text of a status or a bulk string.
    pub fn text(&self) -> anyhow::Result<&str> {
        match self {
            Self::Status(text) => Ok(text),
            Self::Bulk(bytes) => Ok(std::str::from_utf8(bytes)?),
            other => bail!("Redis answered {other:?}, not a text"),
        }
    }

    pub fn integer(&self) -> anyhow::Result<i64> {
        match self {
            Self::Integer(number) => Ok(*number),
            other => bail!("Redis answered {other:?}, not a number"),
        }
    }

    pub fn array(&self) -> anyhow::Result<&[Self]> {
        match self {
            Self::Array(replies) => Ok(replies),
            other => bail!("Redis answered {other:?}, not a list"),
        }
    }
}

/// One connection to one server.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub async fn open(addr: SocketAddr, password: &str) -> anyhow::Result<Self> {
        let stream =
            TcpStream::connect(addr).await.with_context(|| format!("no Redis at {addr}"))?;
        stream.set_nodelay(true)?;
        let mut connection = Self { stream: BufReader::new(stream) };
        connection.command(["AUTH", password]).await?;
        Ok(connection)
    }

    /// Sends a command and reads its reply; an error reply is an error.
    pub async fn command<A: AsRef<[u8]>>(
        &mut self,
        parts: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Reply> {
        let mut count = 0;
        let mut arguments = Vec::new();
        for part in parts {
            let part = part.as_ref();
            count += 1;
            arguments.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
            arguments.extend_from_slice(part);
            arguments.extend_from_slice(b"\r\n");
        }
        let mut request = format!("*{count}\r\n").into_bytes();
        request.append(&mut arguments);
        self.stream.write_all(&request).await?;
        match Box::pin(self.read()).await? {
            Reply::Error(message) => bail!("Redis refused: {message}"),
            reply => Ok(reply),
        }
    }

    async fn read(&mut self) -> anyhow::Result<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let line = line.strip_suffix("\r\n").context("Redis closed the connection")?;
        let (kind, rest) = line.split_at_checked(1).context("an empty reply")?;
        Ok(match kind {
            "+" => Reply::Status(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(rest.parse()?),
            "$" | "*" if rest == "-1" => Reply::Nil,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream.read_exact(&mut bytes).await?;
                ensure!(bytes.ends_with(b"\r\n"), "a bulk string without its end");
                bytes.truncate(bytes.len() - 2);
                Reply::Bulk(bytes)
            }
            "*" => {
                let mut replies = Vec::new();
                for _ in 0..rest.parse::<usize>()? {
                    replies.push(Box::pin(self.read()).await?);
                }
                Reply::Array(replies)
            }
            _ => bail!("a reply of unknown kind: {line}"),
        })
    }
}
