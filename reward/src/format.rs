//! Rewards for keeping to a format.

/// Whether a completion is one thought in `<think>…</think>` and then anything (TRL's
/// `think_format_reward`): it begins with the tag, does not open a second one, and closes it.
pub fn is_think_format(completion: &str) -> bool {
    let thought = completion.strip_prefix("<think>");
    thought.is_some_and(|rest| !rest.contains("<think>") && rest.contains("</think>"))
}

/// The share of `tags` of which the completion has exactly one, opening and closing tag counted
/// apart: 1 where all is as it should be. 1 for no tags.
pub fn tag_share(completion: &str, tags: &[&str]) -> f64 {
    let once = |mark: String| completion.matches(&mark).count() == 1;
    let kept: usize = tags
        .iter()
        .map(|tag| usize::from(once(format!("<{tag}>"))) + usize::from(once(format!("</{tag}>"))))
        .sum();
    if tags.is_empty() { 1.0 } else { kept as f64 / (2 * tags.len()) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thought_comes_first() {
        for (text, want) in [
            ("<think>a\nb</think>", true),
            ("<think></think> so 5\n", true),
            (" <think>a</think>", false),
            ("<think>a", false),
            ("<think>a</think> <think>b</think>", false),
            ("a</think>", false),
            ("", false),
        ] {
            assert_eq!(is_think_format(text), want, "{text}");
        }
    }

    #[test]
    fn each_tag_is_wanted_once() {
        let tags = ["think", "answer"];
        for (text, want) in [
            ("<think>a</think><answer>b</answer>", 1.0),
            ("<think>a</think><answer>b", 0.75),
            ("<think><think>a</think>", 0.25),
            ("b", 0.0),
        ] {
            assert_eq!(tag_share(text, &tags), want, "{text}");
        }
        assert_eq!(tag_share("b", &[]), 1.0);
    }
}
