//! What sampling does to one row of logits besides cap and temperature: the repetition penalty, and
//! filters that leave some tokens out.

/// A row's own rule. Its distribution is the softmax over the tokens that are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowRule {
    /// Tokens whose logits the repetition penalty changes, each once.
    pub penalised: Vec<u32>,
    /// The tokens that can be drawn, sorted; empty = all.
    pub kept: Vec<u32>,
}

impl RowRule {
    /// The rule of a row in a list that may be empty, where no row has one.
    pub fn of(rules: &[RowRule], row: usize) -> &RowRule {
        const NONE: &RowRule = &RowRule { penalised: Vec::new(), kept: Vec::new() };
        rules.get(row).unwrap_or(NONE)
    }
}

/// Divides positive and multiplies negative logits of `tokens` by `penalty` (transformers'
/// `repetition_penalty`).
pub fn penalise(logits: &mut [f32], tokens: &[u32], penalty: f32) {
    for token in tokens {
        let logit = &mut logits[*token as usize];
        *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
    }
}

/// The factor that [`penalise`] gave a logit that is now `l`: its sign has not changed.
pub(super) fn factor(l: f32, penalty: f32) -> f32 {
    if l < 0.0 { penalty } else { 1.0 / penalty }
}
