//! Problems that a program can grade, and the tasks that they come from.

use crate::Message;

/// How an answer is compared with the gold one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grader {
    /// The final number, wherever and however it is written.
    Numeric,
    /// One digit and nothing else.
    Digit,
    /// The letter of an option of a multiple-choice question.
    Letter,
    /// The gold text itself, up to case and white space.
    Exact,
}

/// A question with its worked answer and what is right.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Number of the row in its split, from 0.
    pub id: u64,
    /// The conversation up to the answer.
    pub prompt: Vec<Message>,
    /// The answer that is trained on.
    pub target: String,
    /// What a right answer comes to.
    pub gold: String,
}
