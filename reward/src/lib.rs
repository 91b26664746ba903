//! Graders with typed outcomes.

/// What a grader says of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It comes to the gold answer.
    Right,
    /// It comes to something else.
    Wrong,
    /// No answer was found in it.
    Unparsable,
}

impl Outcome {
    /// Name.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Right => "right",
            Outcome::Wrong => "wrong",
            Outcome::Unparsable => "unparsable",
        }
    }
}

/// Grade.
pub fn grade(grader: datasets::Grader, completion: &str, gold: &str) -> Outcome {
    let answer = match grader {
        datasets::Grader::Digit => completion.trim().to_string(),
        datasets::Grader::Numeric => {
            let tail = completion.rsplit("####").next().unwrap_or_default();
            let keep = |c: &char| c.is_ascii_digit() || *c == '.' || *c == '-';
            tail.trim().split_whitespace().next().unwrap_or("").chars().filter(keep).collect()
        }
    };
    match answer.trim_end_matches('.').parse::<f64>() {
        Err(_) => Outcome::Unparsable,
        Ok(x) if Some(x) == gold.parse().ok() => Outcome::Right,
        Ok(_) => Outcome::Wrong,
    }
}
