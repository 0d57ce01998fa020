//! Why bytes are not a frame, or a payload does not fit one.

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload is, or is announced to be, longer than a frame may carry.
    #[error("a payload of {len} bytes is above the maximum of {max}")]
    TooLarge {
        /// Its length in bytes.
        len: u64,
        /// The most that is allowed: [`MAX_PAYLOAD`](crate::MAX_PAYLOAD).
        max: u32,
    },
    /// The bytes end inside the frame.
    #[error("the frame ends {missing} bytes early")]
    Truncated {
        /// How many bytes are known to be missing: up to the header's end, or up to the payload's.
        missing: usize,
    },
    /// Bytes follow the frame where nothing may follow.
    #[error("{extra} bytes follow the frame")]
    TrailingBytes {
        /// How many bytes follow it.
        extra: usize,
    },
}
