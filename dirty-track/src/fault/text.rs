//! What the text forms of the policies have in common.

/// Why a text is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// No policy has this name.
    #[error("there is no {what} policy {given:?}: use {choices}")]
    Policy {
        /// What the policy is for.
        what: &'static str,
        /// What was given.
        given: String,
        /// What there is.
        choices: &'static str,
    },
    /// A value that cannot be.
    #[error("{option}={value}: it must be {must}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        must: &'static str,
    },
    /// A line of a working set that is no range of frames.
    #[error("line {line} of the working set, {text:?}, is no range of frames such as 0x1200+16")]
    Range {
        /// Number of the line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
}

/// Digits only: no sign, which `u64`'s own parser takes.
pub(super) fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// A number of bytes such as `65536`, `64K` or `2M`.
pub(super) fn size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    number(digits)?.checked_mul(unit)
}
