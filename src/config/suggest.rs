//! "Did you mean": the nearest known word to a misspelt one.

/// The candidate nearest to `word` within a third of its letters (at least two edits), ignoring
/// case and `-` against `_`. Ties go to the first candidate.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let word = plain(word);
    let limit = (word.chars().count() / 3).max(2);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &plain(candidate)), candidate))
        .filter(|(distance, candidate)| *distance <= limit && *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `"; did you mean x?"` for the nearest candidate, or nothing.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map(|near| format!("; did you mean {near}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_misspelt_words_and_leaves_strange_ones() {
        let keys = ["learning_rate", "lora_r", "seed"];
        assert_eq!(nearest("lerning-rate", keys), Some("learning_rate"));
        assert_eq!(nearest("sede", keys), Some("seed"));
        assert_eq!(nearest("wandb_project", keys), None);
        assert_eq!(did_you_mean("Seed", keys), "; did you mean seed?");
        assert_eq!(did_you_mean("zzz", keys), "");
    }
}
