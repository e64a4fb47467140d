//! Text in HTML and SVG.

use std::borrow::Cow;

/// `text` as it stands between tags, or in quotes as an attribute's value. What XML has no place for, not even as a
/// reference, becomes U+FFFD: a browser would show nothing of a picture with a single such character.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    let plain = |letter: char| !matches!(letter, '&' | '<' | '>' | '"' | '\'') && allowed(letter);
    if text.chars().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            letter if allowed(letter) => escaped.push(letter),
            _ => escaped.push('\u{fffd}'),
        }
    }
    Cow::Owned(escaped)
}

fn allowed(letter: char) -> bool {
    match letter {
        '\t' | '\n' | '\r' => true,
        '\u{fffe}' | '\u{ffff}' => false,
        letter => letter >= ' ',
    }
}

/// What is wrong with the tags of a document: one that is never closed, or closed and never open.
#[cfg(test)]
pub(super) fn wrong(document: &str) -> Option<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = document;
    while let Some((_, after)) = rest.split_once('<') {
        let Some((tag, next)) = after.split_once('>') else { return Some(format!("<{after} has no end")) };
        rest = next;
        if tag.contains('<') || tag.matches('"').count() % 2 == 1 {
            return Some(format!("<{tag}> is no tag"));
        }
        let name = tag.split([' ', '/']).next().unwrap_or_default();
        match tag.strip_prefix('/') {
            Some(closed) if open.last() == Some(&closed) => {
                open.pop();
            }
            Some(closed) => return Some(format!("</{closed}> closes {open:?}")),
            None if tag.starts_with('!') || tag.ends_with('/') => {}
            None => open.push(name),
        }
    }
    open.pop().map(|name| format!("<{name}> is never closed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_is_markup() {
        assert_eq!(escape("kvm-ring"), "kvm-ring");
        assert_eq!(
            escape("<b a=\"1\">&'\x1b\0\u{ffff}ä\n"),
            "&lt;b a=&quot;1&quot;&gt;&amp;&#39;\u{fffd}\u{fffd}\u{fffd}ä\n"
        );
    }

    #[test]
    fn wrong_documents_are_told() {
        assert_eq!(wrong("<!doctype html><a b=\"c\"><d/>x</a>"), None);
        for bad in ["<a>", "<a></b>", "</a>", "<a", "<a b=\"></a>", "<a <b></a>"] {
            assert!(wrong(bad).is_some(), "{bad}");
        }
    }
}
