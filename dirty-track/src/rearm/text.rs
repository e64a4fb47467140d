//! A re-arming policy as the text of a command line or a configuration file.

use std::fmt;
use std::str::FromStr;

use crate::addr::LEAVES_PER_BLOCK;
use crate::rearm::{DenseSkip, Rearm, RearmError};

/// Why a text is no re-arming policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// No policy has this name.
    #[error("there is no re-arming policy {0:?}: use all or dense-skip[,threshold=75%][,for-epochs=16]")]
    Policy(String),
    /// An option that the policy does not have.
    #[error("{policy} has no option {option:?}; dense-skip has threshold=75% and for-epochs=16")]
    Option {
        /// The policy.
        policy: &'static str,
        /// What was given.
        option: String,
    },
    /// An option that was given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// A value that is no number.
    #[error("{option}={value} is no {what}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What there should be.
        what: &'static str,
    },
    /// A value out of range.
    #[error(transparent)]
    Range(#[from] RearmError),
}

impl FromStr for Rearm {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Rearm, ParseError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let unknown = |policy, option: &str| ParseError::Option { policy, option: option.to_owned() };
        match name {
            "all" => match parts.next() {
                None => Ok(Rearm::All),
                Some(option) => Err(unknown("all", option)),
            },
            "dense-skip" => {
                let (mut threshold, mut epochs) = (None, None);
                for part in parts {
                    let (target, option, value) = match part.split_once('=') {
                        Some(("threshold", value)) => (&mut threshold, "threshold", leaves(value)?),
                        Some(("for-epochs", value)) => (&mut epochs, "for-epochs", for_epochs(value)?),
                        _ => return Err(unknown("dense-skip", part)),
                    };
                    if target.replace(value).is_some() {
                        return Err(ParseError::Twice(option));
                    }
                }
                let default = DenseSkip::default();
                let threshold = threshold.unwrap_or(default.threshold());
                Ok(Rearm::DenseSkip(DenseSkip::new(threshold, epochs.unwrap_or(default.for_epochs()))?))
            }
            _ => Err(ParseError::Policy(name.to_owned())),
        }
    }
}

/// A number of leaves, or a share of a block, rounded up.
fn leaves(value: &str) -> Result<u64, ParseError> {
    let bad = || ParseError::Value {
        option: "threshold",
        value: value.to_owned(),
        what: "number of leaves such as 384, nor a share such as 75%",
    };
    let Some(percent) = value.strip_suffix('%') else { return number(value).ok_or_else(bad) };
    let percent = number(percent).ok_or_else(bad)?;
    // What is out of range stays so, and cannot overflow.
    Ok((percent.min(1 << 32) * LEAVES_PER_BLOCK).div_ceil(100))
}

fn for_epochs(value: &str) -> Result<u64, ParseError> {
    number(value).ok_or_else(|| ParseError::Value {
        option: "for-epochs",
        value: value.to_owned(),
        what: "number of epochs",
    })
}

/// Digits only: no sign, which `u64`'s own parser takes.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

impl fmt::Display for Rearm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rearm::All => f.write_str("all"),
            Rearm::DenseSkip(skip) => {
                write!(f, "dense-skip,threshold=")?;
                let percent = skip.threshold() * 100;
                if percent.is_multiple_of(LEAVES_PER_BLOCK) {
                    write!(f, "{}%", percent / LEAVES_PER_BLOCK)?;
                } else {
                    write!(f, "{}", skip.threshold())?;
                }
                write!(f, ",for-epochs={}", skip.for_epochs())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn skip(threshold: u64, for_epochs: u64) -> Rearm {
        Rearm::DenseSkip(DenseSkip::new(threshold, for_epochs).unwrap())
    }

    #[test]
    fn policies_are_read() {
        for (text, policy) in [
            ("all", Rearm::All),
            ("dense-skip", Rearm::DenseSkip(DenseSkip::default())),
            ("dense-skip,threshold=75%,for-epochs=16", Rearm::DenseSkip(DenseSkip::default())),
            ("dense-skip,for-epochs=3", skip(384, 3)),
            ("dense-skip,for-epochs=250,threshold=1", skip(1, 250)),
            ("dense-skip,threshold=1%", skip(6, 16)),
            ("dense-skip,threshold=100%", skip(512, 16)),
        ] {
            assert_eq!(text.parse(), Ok(policy), "{text}");
        }
        assert_eq!(
            Rearm::DenseSkip(DenseSkip::default()).to_string(),
            "dense-skip,threshold=75%,for-epochs=16"
        );
    }

    #[test]
    fn what_is_no_policy_is_a_typed_error_that_helps() {
        let error = |text: &str| text.parse::<Rearm>().unwrap_err();
        for text in ["", "All", "dense", "none", "dense-skip threshold=1"] {
            assert_eq!(error(text), ParseError::Policy(text.to_owned()));
        }
        assert!(matches!(error("all,threshold=1"), ParseError::Option { policy: "all", .. }));
        for text in ["dense-skip,", "dense-skip,threshold", "dense-skip,epochs=1", "dense-skip, threshold=1"]
        {
            assert!(matches!(error(text), ParseError::Option { policy: "dense-skip", .. }), "{text}");
        }
        assert_eq!(error("dense-skip,threshold=1,threshold=2"), ParseError::Twice("threshold"));
        for value in ["", "%", "x", "-1", "+1", "1.5%", "1 %", "75%%", "99999999999999999999"] {
            let text = format!("dense-skip,threshold={value}");
            assert!(matches!(error(&text), ParseError::Value { option: "threshold", .. }), "{text}");
        }
        assert_eq!(error("dense-skip,threshold=0"), ParseError::Range(RearmError::Threshold(0)));
        assert_eq!(error("dense-skip,threshold=513"), ParseError::Range(RearmError::Threshold(513)));
        for text in ["dense-skip,threshold=101%", "dense-skip,threshold=18446744073709551615%"] {
            assert!(matches!(error(text), ParseError::Range(RearmError::Threshold(_))), "{text}");
        }
        assert_eq!(error("dense-skip,for-epochs=0"), ParseError::Range(RearmError::Epochs(0)));
        assert_eq!(error("dense-skip,for-epochs=251"), ParseError::Range(RearmError::Epochs(251)));
        assert!(error("dense-skip,for-epochs=256").to_string().contains("1 to 250"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(threshold in 1..=512u64, epochs in 1..=250u64) {
            let policy = skip(threshold, epochs);
            prop_assert_eq!(policy.to_string().parse(), Ok(policy));
        }

        #[test]
        fn no_text_panics(text in "(dense-skip|all|[a-z]{0,3})(,(threshold|for-epochs|.{0,4})=?.{0,5}){0,3}") {
            let _ = text.parse::<Rearm>();
        }
    }
}
