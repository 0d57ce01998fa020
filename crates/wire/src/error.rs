//! The errors of encoding and decoding frames.

/// The reason why bytes are not a frame, or a payload does not fit one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload, or its announced length, is above the maximum.
    #[error("a payload of {len} bytes is above the maximum of {max}")]
    TooLarge {
        /// The length of the payload in bytes.
        len: u64,
        /// The maximum: [`MAX_PAYLOAD`](crate::MAX_PAYLOAD).
        max: u32,
    },
    /// The bytes end inside the frame.
    #[error("the frame ends {missing} bytes early")]
    Truncated {
        /// The number of bytes missing to the end of the header, or of the payload once the header
        /// is complete.
        missing: usize,
    },
    /// Further bytes follow the frame.
    #[error("{extra} bytes follow the frame")]
    TrailingBytes {
        /// The number of further bytes.
        extra: usize,
    },
}
